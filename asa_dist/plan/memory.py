"""Bytes of one rank, part by part, as DeepSpeed and this project allocate them.

Ψ parameters, N ranks, b bytes of the compute dtype (4 in float32, 2 in bfloat16).

    stage   weights   masters        moments   gradients   in flight   reduce bucket   gathered weights
    0       b·Ψ       4·Ψ if b = 2   8·Ψ       b·Ψ         –           –               –
    1, 2    b·Ψ       4·Ψ/N          8·Ψ/N     4·Ψ/N       b·Ψ         500M elements   –
    3       b·Ψ/N     4·Ψ/N          8·Ψ/N     4·Ψ/N       –           500M elements   b·min(Ψ, 10⁹)

Stage 1 in bfloat16 (DeepSpeed's BF16_Optimizer) keeps (4 + b)·Ψ of gradients, whole. ZeRO clones the masters even from
float32. While the backward of stages 1 and 2 runs there are whole gradients and the
bucket, too: stage 2 frees the former as it goes on, counted is what both may need. Stage 3 keeps gathered what is
needed again within 10⁹ parameters (DeepSpeed's ``stage3_max_reuse_distance`` and ``stage3_max_live_parameters``).
Buckets are DeepSpeed's default and allocated in full: on a CPU they are address space until they are written, on a GPU
memory. ``tests/plan/test_memory.py`` compares states and bucket with real engines of stages 0 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from asa_dist.config import Config
from asa_dist.plan.machine import Machine
from asa_dist.plan.shape import BYTES_OF, Trunk, Work, count_parameters, trunk_of, work_of

REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # its stage3_max_live_parameters
MOMENTS_BYTES = 8  # Adam's two, float32


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part: on its device, and in the host's memory beside a GPU (on a CPU all are the device's)."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def model_state_bytes(self) -> float:
        """Weights, masters, moments, gradients, wherever they are."""
        return sum(part.get(name, 0) for part in (self.device, self.host) for name in MODEL_STATES)


MODEL_STATES = ("weights", "float32 masters", "Adam moments", "gradients")


def rank_memory(config: Config, machine: Machine) -> Memory:
    """Of one trainer rank at its peak."""
    states = model_states(config)
    trunk, work, each = trunk_of(config), work_of(config), BYTES_OF[config.model.dtype]
    piece = each * -(-trunk.num_parameters // config.num_ranks)
    device = states | buffers(config) | activations(config, trunk, work) | logits(config, trunk, work)
    host = {"publish: two buffers of its shard": 2.0 * piece}
    if config.train.offload_optimizer:
        for name in ("float32 masters", "Adam moments", "gradients"):
            host[name] = device.pop(name)
    if not machine.has_gpus:
        return Memory(device | host, {})
    return Memory(device | {"reserved": machine.assumptions["reserved_bytes"]}, host)


def kept_bytes(config: Config, memory: Memory) -> float:
    """On a rank's device while no step is taken. Of gradients' buffers only those of stage 3 outlive a step."""
    names = ["weights", "float32 masters", "Adam moments", "reserved"]
    if config.train.zero_stage == 3:
        names += ["gradients", "reduce bucket"]
    return sum(memory.device.get(name, 0) for name in names)


def model_states(config: Config) -> dict[str, float]:
    """What lives from step to step; see the table above."""
    stage, ranks, each = config.train.zero_stage, config.num_ranks, BYTES_OF[config.model.dtype]
    whole = float(sum(count_parameters(config).values()))
    share = whole / ranks
    kept = whole if stage == 0 else share
    masters = 4 * kept if each < 4 or stage > 0 else 0.0
    gradients = each * whole if stage == 0 else 4 * share
    if stage == 1 and each < 4:  # DeepSpeed's BF16_Optimizer: whole gradients, and all of them in float32
        gradients = (4 + each) * whole
    return {
        "weights": each * (share if stage == 3 else whole),
        "float32 masters": masters,
        "Adam moments": MOMENTS_BYTES * kept,
        "gradients": gradients,
    }


def buffers(config: Config) -> dict[str, float]:
    """ZeRO's, of a fixed size."""
    stage, each = config.train.zero_stage, BYTES_OF[config.model.dtype]
    if stage == 0:
        return {}
    whole = sum(count_parameters(config).values())
    bucket = {"reduce bucket": float(each * REDUCE_BUCKET_ELEMENTS)}
    if stage == 3:
        return bucket | {"gathered weights": float(each * min(whole, LIVE_PARAMETERS))}
    return bucket | {"gradients in flight": float(each * whole)}


def activations(config: Config, trunk: Trunk, work: Work) -> dict[str, float]:
    """Of one micro-batch of N tokens: what a layer keeps for its backward, and masks.

    Per token and layer: b·(6·H + 3·Q + 2·K + 4·I), and 8·H for the norms' float32 copies if b = 2. With checkpointing
    a layer's input alone, b·H, and one layer as a whole while its backward runs.
    """
    each, hidden = BYTES_OF[config.model.dtype], trunk.hidden_size
    of_layer = each * (6 * hidden + 3 * trunk.query_size + 2 * trunk.key_size + 4 * trunk.intermediate_size)
    of_layer += 8 * hidden if each < 4 else 0
    states = each * hidden * (trunk.num_layers + 1)
    layers = states + of_layer if config.model.activation_checkpointing else trunk.num_layers * of_layer
    rows = work.corpus_rows + work.rollout_rows
    return {
        "activations": float(work.tokens * layers),
        "attention masks": float((1 + each) * rows * work.row_tokens**2),  # boolean, and as SDPA takes it
    }


def logits(config: Config, trunk: Trunk, work: Work) -> dict[str, float]:
    """One chunk's logits and their gradient, float32; the projection's gradient in float32 while it is summed."""
    chunk = min(config.model.logprob_chunk_tokens, work.scored_tokens)
    return {"logits": float(2 * 4 * chunk * trunk.vocab_size + 4 * trunk.embedding_weights)}


def worker_memory(config: Config, machine: Machine) -> dict[str, float]:
    """Of one device of a rollout worker: weights, and the cache of what it decodes at a time, at its longest."""
    trunk, work, each = trunk_of(config), work_of(config), BYTES_OF[config.model.dtype]
    devices = max(1, config.rollout.gpus_per_worker)
    cached = work.answers_at_a_time * (work.prompt_tokens + work.new_tokens)
    parts = {
        "weights": each * trunk.num_parameters / devices,
        "key/value cache": each * 2 * trunk.num_layers * trunk.key_size * cached / devices,
    }
    return parts | ({"reserved": machine.assumptions["reserved_bytes"]} if machine.has_gpus else {})

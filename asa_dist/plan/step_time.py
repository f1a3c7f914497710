"""Seconds of one step: compute, ZeRO's collectives by an α–β model, publish, rollouts.

A collective over N ranks moves S bytes in a ring of N − 1 hops:

    seconds(S, messages) = messages·(N − 1)·α + S·(N − 1)/N / β

    stage 3     per micro-batch: all-gather for the forward, reduce-scatter of gradients, and for the backward another
                all-gather of what DeepSpeed has not kept, of at most 10⁹ parameters (``memory.LIVE_PARAMETERS``)
    stage 2     per micro-batch: reduce of gradients;  per step: all-gather of the new weights
    stage 1     per step: both
    stage 0     per step: all-reduce = reduce-scatter + all-gather

What does not hide under compute is exposed; on CPUs nothing hides, for DeepSpeed's streams are none there.
Policy age 0, or shared GPUs: rollouts and training take turns, the step is their sum; else it is the longer one, or,
on a machine with fewer cores than threads, all that its cores have to compute meanwhile.

What was rehearsed on this machine (``rehearsal``) takes the place of compute, optimizer, collectives and rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

from asa_dist.config import Config
from asa_dist.plan import flops
from asa_dist.plan.machine import Machine
from asa_dist.plan.memory import LIVE_PARAMETERS, REDUCE_BUCKET_ELEMENTS, activations
from asa_dist.plan.shape import BYTES_OF, Trunk, Work, count_parameters, trunk_of, work_of

GATHERS_PER_LAYER = 9  # matrices and norms, each a module that DeepSpeed fetches by itself
OPTIMIZER_BYTES = 28  # that AdamW moves per parameter: gradient, master, two moments; the last three twice
PASSES_OVER_ACTIVATIONS = 3  # written once, read twice
OPS_PER_LAYER = 150  # that a CPU rank dispatches for a layer's forward and backward
DECODE_OPS_PER_LAYER = 60


@dataclass(frozen=True)
class StepTime:
    """Seconds.

    Attributes:
        crowded: what cores that ranks and workers share need for both at the same time; 0 if each has its own.
    """

    compute: float
    exposed_collectives: float
    hidden_collectives: float
    optimizer: float
    publish: float
    rollouts: float
    take_turns: bool
    crowded: float = 0.0

    @property
    def training(self) -> float:
        return self.compute + self.exposed_collectives + self.optimizer + self.publish

    @property
    def step(self) -> float:
        if self.take_turns:
            return self.training + self.rollouts
        return max(self.training, self.rollouts, self.crowded)

    @property
    def waiting(self) -> float:
        """Of the ranks, for rollouts."""
        return self.rollouts if self.take_turns else max(0.0, self.rollouts - self.training)


def step_time(config: Config, machine: Machine, num_nodes: int = 1) -> StepTime:
    """
    Args:
        num_nodes: that train.
    """
    trunk, work = trunk_of(config), work_of(config)
    take_turns = config.rollout.max_policy_age == 0 or config.rollout.placement == "shared"
    shard = BYTES_OF[config.model.dtype] * trunk.num_parameters / work.num_ranks
    publish = shard / (machine.host_link_bytes_per_second * machine.assumptions["copy_bandwidth_share"])
    if machine.is_rehearsed:
        return _rehearsed(config, machine, publish, take_turns)
    compute = compute_seconds(config, machine, trunk, work)
    collectives = collective_seconds(config, machine, trunk, work, num_nodes)
    hidden = min(collectives, compute * machine.assumptions["overlap"])
    return StepTime(
        compute=compute,
        exposed_collectives=collectives - hidden,
        hidden_collectives=hidden,
        optimizer=optimizer_seconds(config, machine, work),
        publish=publish,
        rollouts=rollout_seconds(config, machine, trunk, work),
        take_turns=take_turns,
    )


def _rehearsed(config: Config, machine: Machine, publish: float, take_turns: bool) -> StepTime:
    """Of this machine; compute includes the optimizer."""
    compute, collectives, rollouts = (
        machine.measured[f"other_{part}_seconds"]
        + config.model.architecture.num_layers * machine.measured[f"layer_{part}_seconds"]
        for part in ("compute", "collective", "rollout")
    )
    threads, cores = config.rollout.workers * config.rollout.threads_per_worker, machine.measured["cores"]
    rollouts *= max(1.0, threads / cores)
    training = compute + collectives + publish
    busy = min(threads, cores) * rollouts + config.num_ranks * config.train.threads_per_rank * training
    return StepTime(compute, collectives, 0.0, 0.0, publish, rollouts, take_turns, crowded=busy / cores)


def training_flops(config: Config) -> float:
    """Of a rank's step: forward and backward of all its micro-batches."""
    work = work_of(config)
    rows, is_recomputed = work.corpus_rows + work.rollout_rows, config.model.activation_checkpointing
    of_micro_batch = flops.train(trunk_of(config), rows, work.row_tokens, work.scored_tokens, is_recomputed)
    return work.micro_batches * of_micro_batch


def rollout_flops(config: Config) -> float:
    """Of a worker's step: it reads its prompts, then decodes token by token."""
    trunk, work = trunk_of(config), work_of(config)
    cached = work.prompt_tokens + work.new_tokens / 2
    reading = flops.prefill(trunk, work.prompts_per_worker, work.prompt_tokens)
    return reading + work.new_tokens * flops.decode(trunk, work.answers_per_worker, cached)


def optimizer_seconds(config: Config, machine: Machine, work: Work) -> float:
    share = sum(count_parameters(config).values()) / (work.num_ranks if config.train.zero_stage else 1)
    copied = machine.assumptions["copy_bandwidth_share"]
    rate = machine.memory_bytes_per_second * copied
    if config.train.offload_optimizer and machine.has_gpus:  # the gradient down, the weights up
        rate = machine.host_link_bytes_per_second * copied * OPTIMIZER_BYTES / 6
    return share * OPTIMIZER_BYTES / rate


def compute_seconds(config: Config, machine: Machine, trunk: Trunk, work: Work) -> float:
    """Forward and backward of all micro-batches of a rank.

    On GPUs the efficiency stands for everything. On this machine it is the rate of bare matrix products, so that what
    lies between them is added: activations through memory, and the dispatch of every operation.
    """
    rate = machine.peak_flops[config.model.dtype] * machine.assumptions["training_efficiency"]
    seconds = training_flops(config) / rate
    if not machine.has_gpus:
        moved = sum(activations(config, trunk, work).values()) + 4 * 3 * work.scored_tokens * trunk.vocab_size
        of_micro_batch = PASSES_OVER_ACTIVATIONS * moved / machine.memory_bytes_per_second
        of_micro_batch += trunk.num_layers * OPS_PER_LAYER * machine.measured["op_seconds"]
        seconds += work.micro_batches * of_micro_batch
    return seconds


def collective_seconds(config: Config, machine: Machine, trunk: Trunk, work: Work, num_nodes: int) -> float:
    """Of ZeRO, per step, as if nothing else ran."""
    if work.num_ranks == 1:
        return 0.0
    num_parameters = sum(count_parameters(config).values())
    whole = BYTES_OF[config.model.dtype] * num_parameters
    buckets = -(-num_parameters // REDUCE_BUCKET_ELEMENTS)
    layers = trunk.num_layers * GATHERS_PER_LAYER
    again = max(0.0, 1 - LIVE_PARAMETERS / num_parameters)  # gathered a second time
    of_micro_batch, of_step = {  # (bytes, messages)
        0: ((0, 0), (2 * whole, 2 * buckets)),
        1: ((0, 0), (2 * whole, 2 * buckets)),
        2: ((whole, buckets), (whole, buckets)),
        3: (((2 + again) * whole, (1 + again) * layers + buckets), (0, 0)),
    }[config.train.zero_stage]
    num_bytes, messages = (work.micro_batches * a + b for a, b in zip(of_micro_batch, of_step, strict=True))
    others = work.num_ranks - 1
    moving = num_bytes * others / work.num_ranks / machine.ring_bytes_per_second(num_nodes)
    return messages * others * machine.assumptions["hop_seconds"] + moving


def rollout_seconds(config: Config, machine: Machine, trunk: Trunk, work: Work) -> float:
    """A worker loads a version; then, lease after lease, it reads prompts and decodes their answers to the longest.

    One decoded token is bound by whichever is slowest: weights and cache through memory, arithmetic, or the host.
    """
    each, devices = BYTES_OF[config.model.dtype], max(1, config.rollout.gpus_per_worker)
    assumed, answers = machine.assumptions, work.answers_at_a_time
    rate = machine.peak_flops[config.model.dtype] * assumed["prefill_efficiency"] * devices
    bandwidth = machine.memory_bytes_per_second * assumed["decode_bandwidth_share"] * devices
    weights = each * trunk.num_parameters
    loading = weights / (machine.host_link_bytes_per_second * assumed["copy_bandwidth_share"])
    reading = flops.prefill(trunk, work.prompts_per_worker, work.prompt_tokens) / rate
    cached = work.prompt_tokens + work.new_tokens / 2
    cache = answers * cached * each * 2 * trunk.num_layers * trunk.key_size
    on_host = trunk.num_layers * assumed[f"{_engine(config)}_layer_seconds"]
    arithmetic = flops.decode(trunk, answers, cached) / rate
    token = max((weights + cache) / bandwidth, arithmetic, on_host)
    if not machine.has_gpus:  # one thread does all of it
        token = max((weights + cache) / bandwidth, arithmetic) + on_host
    return loading + reading + work.leases_per_worker * work.new_tokens * token


def _engine(config: Config) -> str:
    """Whose host time counts; auto: the slower one, as nobody knows what will be installed there."""
    return "vllm" if config.rollout.engine == "vllm" else "hf"

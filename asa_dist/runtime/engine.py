"""Everything DeepSpeed: one optimizer step over micro-batches, collectives, and a rank's own shard of the weights."""

from __future__ import annotations

import datetime
import logging
import math
import re
import resource
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from asa_dist.asa.objective import FusedOutput, StepInputs, StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.config import OptimizerConfig, TrainConfig
from asa_dist.runtime.collective_time import CollectiveTime
from asa_dist.runtime.gradients import clip_by_part, no_update
from asa_dist.runtime.model import PHI, XI, named_parts
from asa_dist.runtime.nonfinite import count_nonfinite, find_nonfinite, skip_reason
from asa_dist.runtime.rendezvous import open_store
from asa_dist.runtime.theory import StepObserver
from asa_dist.runtime.trunk import PSI, TrunkModel
from asa_dist.udasa.objective import PairInputs

PARTS = [PSI, PHI, XI]


@dataclass(frozen=True)
class Placement:
    """Where this process stands."""

    rank: int
    local_rank: int
    num_ranks: int
    device: torch.device


def join_process_group(placement: Placement, timeout_seconds: float) -> None:
    """Initialises torch.distributed (nccl on CUDA, else gloo), then DeepSpeed on top of it.

    DeepSpeed's own initialisation passes ``device_id``, which has hung other groups; and its shared-memory op would be
    compiled for a minute at the first CPU run.
    """
    # DeepSpeed still calls collectives by their old names, a line of warning for every call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    on_cuda = placement.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(placement.device)
    timeout = _backend_timeout(placement, timeout_seconds)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        timeout=timeout,
        rank=placement.rank,
        world_size=placement.num_ranks,
        store=open_store("asa", placement.rank, placement.num_ranks, timeout.total_seconds()),
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", verbose=False)


def _backend_timeout(placement: Placement, timeout_seconds: float) -> datetime.timedelta:
    """gloo raises at its time-out; NCCL aborts the process without a word, so there the watchdog has to come first."""
    return datetime.timedelta(seconds=timeout_seconds * (2 if placement.device.type == "cuda" else 1))


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def describe_lost_peer(error: RuntimeError, rank: int) -> str:
    """For the user of this rank: what a collective's failure means (``is_lost_peer``), and where to look."""
    said = str(error).strip().partition("\n")[0]
    waited = re.search(r"(?i)timed out waiting (\d+) ?ms|Timeout\(ms\)=(\d+)", said)
    if waited is not None:
        seconds = int(waited[1] or waited[2]) / 1000
        what = (
            f"another rank did not answer for {seconds:g} s (train.collective_timeout_seconds): it hangs, was stopped, "
            "or cannot be reached"
        )
    else:
        what = "the connection to another rank broke: its process ended, or its host cannot be reached"
    who = ", ".join([f"rank {rank} on {socket.gethostname()}", *getattr(error, "__notes__", [])])  # notes: its phase
    return f"{who}: {what}; see that rank's own last messages. ({said})"


def deepspeed_settings(train: TrainConfig, dtype: str, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's config. Clipping is ours (``gradients.clip_by_part``); losses come divided by global counts."""
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        zero |= {
            "sub_group_size": train.zero_sub_group_size,
            "stage3_param_persistence_threshold": train.zero_persistence_threshold,
        }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.gpus > 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.accumulation_steps,
        "train_batch_size": num_ranks * train.accumulation_steps,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        # stage 0 cannot accumulate bfloat16 gradients in float32
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32" if train.zero_stage else None},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: TrunkModel, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """ψ's matrices (decayed), ψ's vectors, φ, ξ, as far as there are: each with a rate of its own, set every step."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {
        (PSI, True): [],
        (PSI, False): [],
        (PHI, False): [],
        (XI, False): [],
    }
    for part, _, parameter in named_parts(model):
        groups[part, part == PSI and parameter.dim() >= 2].append(parameter)
    rates = {PSI: optimizer.lr_psi, PHI: optimizer.lr_phi, XI: optimizer.lr_xi}
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": optimizer.weight_decay if decayed else 0.0,
            "part": part,
        }
        for (part, decayed), parameters in groups.items()
        if parameters
    ]


def schedule_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of 0-based ``step`` as a share of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    elapsed = step - config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "robbins_monro":
        return (1 + elapsed / config.robbins_monro_t0) ** -config.robbins_monro_power
    progress = min(1.0, elapsed / max(1, num_steps - config.warmup_steps))
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(step: int, num_steps: int, config: OptimizerConfig) -> dict[str, float]:
    """Learning rate of each part at 0-based ``step``."""
    factor = schedule_factor(step, num_steps, config)
    return {PSI: factor * config.lr_psi, PHI: factor * config.lr_phi, XI: factor * config.lr_xi}


def _merged(records: Sequence[dict[str, Tensor]], merge: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """One dict of tensors from the micro-batches', all of which have the same names."""
    return {name: reduce(merge, [record[name] for record in records]) for name in records[0]}


class TrainEngine:
    """One rank's view of the sharded model.

    A collective whose other ranks are gone or silent raises a RuntimeError: see ``describe_lost_peer``.
    """

    def __init__(
        self, model: TrunkModel, train: TrainConfig, optimizer: OptimizerConfig, dtype: str, placement: Placement
    ):
        self.placement = placement
        self._zero_stage, self._clip_norm = train.zero_stage, optimizer.clip_norm
        # names and shapes before ZeRO-3 empties the parameters
        self.generator_shapes = [(name, tuple(p.shape)) for part, name, p in named_parts(model) if part == PSI]
        self._parameters: dict[str, list[torch.nn.Parameter]] = {part: [] for part in PARTS}  # found once: it is slow
        for part, _, parameter in named_parts(model):
            self._parameters[part].append(parameter)
        groups = parameter_groups(model, optimizer)
        self._part_of_group = [group["part"] for group in groups]
        self._parts = [part for part in PARTS if part in self._part_of_group]
        adam: dict[str, Any] = {"betas": (optimizer.adam_beta1, optimizer.adam_beta2), "eps": optimizer.adam_eps}
        adamw = (
            DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
            if train.offload_optimizer
            else torch.optim.AdamW(groups, **adam)
        )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=adamw, config=deepspeed_settings(train, dtype, placement.num_ranks)
        )
        self._set_collective_timeout(train.collective_timeout_seconds)
        self._collective_time = CollectiveTime(comm.comm.cdb)

    def _set_collective_timeout(self, timeout_seconds: float) -> None:
        """ZeRO's own groups ignore the timeout of ``init_process_group``: they would wait for a lost peer for ever."""
        timeout = _backend_timeout(self.placement, timeout_seconds)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    # --- one step ----------------------------------------------------------------------------------------------
    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs | PairInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        """Forward and backward per micro-batch, one optimizer step.

        If a loss, reward or gradient is not finite on any rank, no rank makes an update: weights, moments and step
        counts stay as they are, the gradients are dropped, and the result says why.

        Args:
            batches: exactly ``accumulation_steps`` micro-batches.
            learning_rates: by part; may name parts that the model has not.
        """
        self._set_learning_rates(learning_rates)
        batches = [batch.to(self.placement.device) for batch in batches]
        outputs: list[FusedOutput] = []
        for batch in batches:
            if outputs:
                self.engine.step()  # counts the micro-batch before; the last one's makes the update
            output: FusedOutput = self.engine(batch=batch, inputs=inputs)
            # DeepSpeed divides by ranks and micro-batches; ours are sums over global counts
            self.engine.backward(output.loss * self.placement.num_ranks, scale_wrt_gas=False)
            outputs.append(output._replace(loss=output.loss.detach()))
        num_nonfinite = torch.stack([count_nonfinite(output) for output in outputs]).sum()
        norms, is_finite = clip_by_part(
            self.optimizer, self._part_of_group, self._parts, self._clip_norm, num_nonfinite
        )
        result = StepResult(
            sums=_merged([output.sums for output in outputs], torch.add),
            maxima=_merged([output.maxima for output in outputs], torch.maximum),
            terms=[output.terms for output in outputs],
            gradient_norms=norms,
        )
        if is_finite:
            self.engine.step()
            return result
        with no_update(self.optimizer, self.engine.basic_optimizer):
            self.engine.step()
        found: list[Any] = [None] * self.placement.num_ranks
        comm.all_gather_object(found, find_nonfinite(batches, outputs))
        reason, prompt_ids = skip_reason(found, norms)
        return replace(result, skipped_because=reason, skipped_prompt_ids=prompt_ids)

    def observed_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        """``train_step``, and among its maxima what the theorems are about: see ``StepObserver.watch``."""
        observer = StepObserver(
            self.engine.module,
            self.optimizer,
            self.placement.rank,
            self.placement.num_ranks,
            lambda: self.shards(PHI),
            self.sum_over_ranks,
        )
        return observer.watch(lambda: self.train_step(batches, inputs, learning_rates), batches)

    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float:
        """This rank's share of the mean corpus loss (evaluation). A collective: every rank calls it equally often."""
        output: FusedOutput
        [output] = self._forward_only([batch], inputs)
        return float(output.loss)

    def evaluate(self, batches: Sequence[MicroBatch], inputs: PairInputs) -> dict[str, Tensor]:
        """This rank's sums over micro-batches, without training. A collective: as many on every rank, one at least."""
        outputs: list[FusedOutput] = self._forward_only(batches, inputs)
        return _merged([output.sums for output in outputs], torch.add)

    def reference_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probability of every position's target with the weights as they are, float32 [N] on the CPU, per batch.

        Of a ``PreferenceModel``. A collective: equally many batches on every rank.
        """
        return [logprob_N.cpu() for logprob_N in self._forward_only(batches, None)]

    @torch.no_grad()
    def _forward_only(self, batches: Sequence[MicroBatch], inputs: StepInputs | PairInputs | None) -> list[Any]:
        self.engine.eval()
        outputs = [self.engine(batch=batch.to(self.placement.device), inputs=inputs) for batch in batches]
        self.engine.train()
        return outputs

    def _set_learning_rates(self, learning_rates: Mapping[str, float]) -> None:
        for group, part in zip(self.optimizer.param_groups, self._part_of_group, strict=True):
            group["lr"] = learning_rates[part]

    # --- collectives -------------------------------------------------------------------------------------------
    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduced copy, float64 on the CPU."""
        summed = values.detach().to(self.placement.device, torch.float64, copy=True)
        comm.all_reduce(summed)
        return summed.cpu()

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        largest = torch.tensor(values, dtype=torch.float64, device=self.placement.device)
        comm.all_reduce(largest, op=comm.ReduceOp.MAX)
        return largest.tolist()

    def collective_seconds(self) -> float:
        """How long this rank has been blocked in collectives since this engine was made: see CollectiveTime."""
        return self._collective_time.seconds

    def peak_memory_bytes(self) -> int:
        """Of this process: allocated on the GPU, or resident on the CPU."""
        if self.placement.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.placement.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # --- shards ------------------------------------------------------------------------------------------------
    def generator_shards(self) -> Iterator[Tensor]:
        """This rank's flat piece of every ψ tensor, in the order of ``generator_shapes``; no collective."""
        return self.shards(PSI)

    def shards(self, part: str) -> Iterator[Tensor]:
        """This rank's flat piece of every tensor of a part, unpadded, in the dtype it computes with.

        Stage 3: the partition ZeRO holds anyway. Stages 0–2: the rank's slice of the whole parameter.
        """
        rank, num_ranks = self.placement.rank, self.placement.num_ranks
        for parameter in self._parameters[part]:
            if self._zero_stage == 3:
                piece: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                length = max(0, parameter.ds_numel - rank * piece.numel())  # type: ignore[attr-defined]
                yield piece if length >= piece.numel() else piece[:length]
            else:
                size = -(-parameter.numel() // num_ranks)
                yield parameter.detach().flatten()[rank * size : (rank + 1) * size]

    def close(self) -> None:
        """Gives back what DeepSpeed holds; call once, at the end. The process group stays."""
        self._collective_time.close()
        self.engine.destroy()

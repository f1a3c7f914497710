"""What the ranks of test_training.py run: training steps of which some have values that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from asa_dist.asa.objective import StepResult
from asa_dist.config import Config
from asa_dist.runtime import engine as engine_module
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PHI, PSI, XI
from tests.distributed import tiny

SETTINGS = list(itertools.product((0, 1, 2, 3), ("float32", "bfloat16"), (1, 2)))  # stage, dtype, micro-batches
KINDS = ("verdict", "reward", "loss", "gradient")
RATES = {PSI: 1e-2, PHI: 1e-2, XI: 1e-2}


@dataclass(frozen=True)
class Skipped:
    """What was seen of a step without an update."""

    reason: str
    prompt_ids: list[int]
    unchanged: bool  # weights, float32 masters, moments, step counts


@dataclass(frozen=True)
class Seen:
    skipped: dict[str, Skipped]  # by kind
    same_end: bool  # as without the bad steps, bit for bit
    good_reasons: list[str]


def all_settings(placement: Placement) -> dict[tuple[int, str, int], Seen]:
    return {setting: bad_steps_between_good_ones(placement, *setting) for setting in SETTINGS}


def bad_steps_between_good_ones(placement: Placement, stage: int, dtype: str, accumulation_steps: int) -> Seen:
    """The first step is a bad one, and so is every second; beside it a run of the good ones alone."""
    settings = tiny.config(stage, placement.num_ranks, accumulation_steps, model__dtype=dtype, optimizer__clip_norm=1.0)
    undisturbed = engine_without_padding(settings, placement)
    good_reasons = [good_step(undisturbed, placement, accumulation_steps).skipped_because for _ in KINDS]
    wanted = state_of(undisturbed)
    undisturbed.engine.destroy()
    engine = engine_without_padding(settings, placement)
    skipped = {}
    for kind in KINDS:
        before = state_of(engine)
        result = bad_step(engine, placement, accumulation_steps, kind)
        unchanged = is_same(before, state_of(engine))
        skipped[kind] = Skipped(result.skipped_because, result.skipped_prompt_ids, unchanged)
        good_reasons.append(good_step(engine, placement, accumulation_steps).skipped_because)
    same_end = is_same(wanted, state_of(engine))
    engine.engine.destroy()
    return Seen(skipped, same_end, good_reasons)


def engine_without_padding(settings: Config, placement: Placement) -> TrainEngine:
    """ZeRO-3 leaves the padding of a rank's pieces as it finds the memory: here it is 0, so that states compare."""
    engine = tiny.engine(tiny.model(settings), settings, placement)
    optimizer = engine.optimizer
    if settings.train.zero_stage == 3:
        for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            end = 0
            for parameter in parameters:
                size = parameter.ds_tensor.numel()
                used = min(size, max(0, parameter.ds_numel - placement.rank * size))
                parameter.ds_tensor.data[used:] = 0
                master.data[end + used : end + size] = 0
                end += size
    return engine


def good_step(engine: TrainEngine, placement: Placement, accumulation_steps: int) -> StepResult:
    return engine.train_step(
        tiny.micro_batches(placement.num_ranks, placement.rank, accumulation_steps), tiny.inputs(), RATES
    )


def bad_step(engine: TrainEngine, placement: Placement, accumulation_steps: int, kind: str) -> StepResult:
    """One rank's values go wrong: rank 0's rewards, or the last rank's loss or gradient."""
    inputs = tiny.inputs()
    is_last = placement.rank == placement.num_ranks - 1
    if kind == "reward" and placement.rank == 0:  # ω, and so R_self, is not a number
        inputs = replace(inputs, progress_F=torch.full((5,), float("nan")))
    if kind == "loss" and is_last:
        inputs = replace(inputs, coefficients=replace(inputs.coefficients, alpha=float("inf")))
    with ExitStack() as changes:
        if kind == "gradient" and is_last:
            changes.enter_context(infinite_gradient(engine))
        if kind == "verdict" and is_last:  # all gradients are finite: nothing in DeepSpeed would skip by itself
            one = torch.ones((), dtype=torch.float64)
            changes.enter_context(mock.patch.object(engine_module, "count_nonfinite", return_value=one))
        return engine.train_step(
            tiny.micro_batches(placement.num_ranks, placement.rank, accumulation_steps), inputs, RATES
        )


@contextmanager
def infinite_gradient(engine: TrainEngine) -> Iterator[None]:
    """Every loss and reward is finite; what flows back is not."""
    backward = engine.engine.backward

    def spoilt(loss: torch.Tensor, **settings: Any) -> torch.Tensor:
        return backward(loss * float("inf"), **settings)

    with mock.patch.object(engine.engine, "backward", spoilt):
        yield


def state_of(engine: TrainEngine) -> list[torch.Tensor]:
    """Copies of this rank's weights, float32 masters and everything Adam keeps of them."""
    tensors = [getattr(p, "ds_tensor", p) for p in engine.engine.module.parameters()]
    for master, moments in engine.engine.basic_optimizer.state.items():
        tensors += [master, *(moments[name] for name in sorted(moments))]
    return [tensor.detach().clone() for tensor in tensors]


def is_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(some) == len(others) and all(map(torch.equal, some, others))

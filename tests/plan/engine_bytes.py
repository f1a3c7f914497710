"""What the ranks of test_memory.py run: the bytes that a live engine holds; it walks DeepSpeed's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from asa_dist.config import Config
from asa_dist.plan.memory import MODEL_STATES
from asa_dist.runtime.engine import Placement, TrainEngine
from tests.distributed import tiny

BUCKET = "reduce bucket"
WEIGHTS, MASTERS, MOMENTS, GRADIENTS = MODEL_STATES


def held_bytes(engine: TrainEngine) -> dict[str, int]:
    """By part, of this rank; every storage counts once, for the first part that has it.

    Gradients are there between backward and step, moments after the first step.
    """
    seen: set[int] = set()
    return {part: _new_bytes(tensors, seen) for part, tensors in _tensors(engine)}


def _new_bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(engine: TrainEngine) -> Iterator[tuple[str, list[Any]]]:
    optimizer, innermost = engine.optimizer, engine.engine.basic_optimizer
    parameters = list(engine.engine.module.parameters())
    yield WEIGHTS, [getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    yield MASTERS, masters or [tensor for group in innermost.param_groups for tensor in group["params"]]
    yield MOMENTS, [tensor for state in innermost.state.values() for name, tensor in state.items() if name != "step"]
    averaged = getattr(optimizer, "averaged_gradients", None) or {}
    yield GRADIENTS, [
        *(parameter.grad for parameter in parameters),
        getattr(optimizer, "grad_partitions_flat_buffer", None),  # stage 3
        *getattr(optimizer, "fp32_groups_gradients_flat", ()),  # stage 0 in bfloat16
        *(tensor for group in averaged.values() if group is not None for tensor in group),
    ]
    buckets = getattr(optimizer, "ipg_buckets", None) or {}
    held = [bucket.buffer for bucket in buckets.values()]
    yield BUCKET, [tensor for buffer in held for tensor in (buffer if isinstance(buffer, list) else [buffer])]


def peak_bytes(engine: TrainEngine, step_without_update: Callable[[], None]) -> dict[str, int]:
    """The most that each part ever held: after a backward, and after the step that follows it.

    Args:
        step_without_update: forward and backward of one micro-batch, on DeepSpeed's engine.
    """
    step_without_update()
    between = held_bytes(engine)
    engine.engine.step()
    return {part: max(number, between[part]) for part, number in held_bytes(engine).items()}


def bytes_by_stage(placement: Placement, dtype: str) -> dict[int, dict[str, int]]:
    """By stage and part, what an engine really holds."""
    return {stage: _bytes_of(placement, stage, dtype) for stage in (0, 1, 2, 3)}


def _bytes_of(placement: Placement, stage: int, dtype: str) -> dict[str, int]:
    settings = planned(stage, placement.num_ranks, dtype)
    engine = tiny.engine(tiny.model(settings), settings, placement)
    [batch] = tiny.micro_batches(placement.num_ranks, placement.rank, 1)

    def forward_and_backward() -> None:
        output = engine.engine(batch=batch, inputs=tiny.inputs())
        engine.engine.backward(output.loss * placement.num_ranks, scale_wrt_gas=False)

    found = peak_bytes(engine, forward_and_backward)
    engine.engine.destroy()
    return found


def planned(stage: int, num_ranks: int, dtype: str) -> Config:
    """What the engine is built of, and the plan made of."""
    return tiny.config(stage, num_ranks, model__dtype=dtype)

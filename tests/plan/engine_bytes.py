"""What the ranks of test_memory.py run: the bytes that a live engine holds."""

from __future__ import annotations

from collections.abc import Callable

from planner_bytes import held_bytes

from asa_dist.config import Config
from asa_dist.runtime.engine import Placement, TrainEngine
from tests.distributed import tiny


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

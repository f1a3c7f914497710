"""A slow rank shows in the other one's collectives, and the parts of a step add up to it."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.distributed.step_time_cases import DELAY_SECONDS, step_with_a_slow_rank


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_who_waits_for_a_slow_rank_waits_in_a_collective(stage: int) -> None:
    waiting, slow = run_on_ranks(step_with_a_slow_rank, 2, stage)
    for times in (waiting, slow):
        parts = {key: seconds for key, seconds in times.items() if key != "time/step_seconds"}
        assert sum(parts.values()) == pytest.approx(times["time/step_seconds"])
        assert times["time/step_seconds"] > DELAY_SECONDS - 0.5 and times["time/compute_seconds"] > 0
    assert slow["time/data_seconds"] >= DELAY_SECONDS
    assert waiting["time/collective_seconds"] - slow["time/collective_seconds"] > DELAY_SECONDS / 2

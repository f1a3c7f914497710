"""What the ranks of test_timeouts.py run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from asa_dist.runtime.engine import Placement, describe_lost_peer, is_lost_peer
from asa_dist.runtime.model import PHI, PSI, XI
from tests.distributed import tiny

NUM_STEPS = 4


@dataclass(frozen=True)
class Seen:
    losses: list[float]  # of the whole step, by step
    complaint: str = ""  # what the user would read


def train_while_rank_1_gets(
    placement: Placement, stage: int, timeout_seconds: float, signal_number: int | None
) -> Seen:
    """Rank 1 sends itself the signal between two steps."""
    settings = tiny.config(
        stage,
        placement.num_ranks,
        train__collective_timeout_seconds=timeout_seconds,
        rollout__timeout_seconds=timeout_seconds / 2,  # has to be below
    )
    engine = tiny.engine(tiny.model(settings), settings, placement)
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, 1)
    losses: list[float] = []
    try:
        for step in range(NUM_STEPS):
            if step == NUM_STEPS // 2 and placement.rank == 1 and signal_number is not None:
                os.kill(os.getpid(), signal_number)
            result = engine.train_step(batches, tiny.inputs(), {PSI: 1e-2, PHI: 1e-2, XI: 1e-2})
            losses.append(float(engine.sum_over_ranks(result.sums["loss/total"])))
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        return Seen(losses, describe_lost_peer(error, placement.rank))
    return Seen(losses)

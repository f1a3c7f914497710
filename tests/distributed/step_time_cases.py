"""What the ranks of test_step_time.py run."""

from __future__ import annotations

import time

from asa_dist.asa.step_time import StepTime
from asa_dist.runtime.engine import Placement
from asa_dist.runtime.model import PHI, PSI, XI
from tests.distributed import tiny

DELAY_SECONDS = 3.0


def step_with_a_slow_rank(placement: Placement, stage: int) -> dict[str, float]:
    """This rank's times of a step for whose data rank 1 takes longer."""
    settings = tiny.config(stage, placement.num_ranks)
    engine = tiny.engine(tiny.model(settings), settings, placement)
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, 1)
    rates = {PSI: 1e-2, PHI: 1e-2, XI: 1e-2}
    engine.train_step(batches, tiny.inputs(), rates)  # whatever only the first step does
    engine.max_over_ranks([0.0])  # both begin together
    spent = StepTime(engine.collective_seconds)
    with spent.part("data"):
        time.sleep(DELAY_SECONDS * placement.rank)
    engine.train_step(batches, tiny.inputs(), rates)
    times = spent.metrics()
    engine.close()
    before = engine.collective_seconds()
    engine.max_over_ranks([0.0])
    assert engine.collective_seconds() == before, "a closed engine leaves DeepSpeed's backend as it was"
    return times

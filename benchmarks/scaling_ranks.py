"""What a rank of `scaling.py` does: its loads take turns, and each turn says where its time went."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from deepspeed import comm
from scaling_case import Load
from step_case import EOS, SEED
from step_ranks import WARM_UP_TURNS, matmul_flops_per_second, rotated
from step_variants import corpus_rows, fused_step, rollout_rows

from asa_dist.asa.objective import GlobalCounts
from asa_dist.asa.packing import join
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import build_model

Turn = dict[str, float]


def measure_on_rank(placement: Placement, loads: Mapping[str, Load], turns: int) -> dict[str, list[Turn]]:
    """Every load's turns, after those to warm up; all loads are of as many ranks."""
    steps = {name: make_step(load, placement) for name, load in loads.items()}
    measured: dict[str, list[Turn]] = {name: [] for name in loads}
    for turn in range(WARM_UP_TURNS + turns):
        for name in rotated(list(loads), turn):
            found = one_turn(*steps[name])
            if turn >= WARM_UP_TURNS:
                measured[name].append(found)
    return measured


def make_step(load: Load, placement: Placement) -> tuple[TrainEngine, Callable[[], float]]:
    """The fused step on this rank's made-up rows."""
    case, config = load.case, load.config
    rng = np.random.default_rng([SEED, placement.rank])
    batch = join(corpus_rows(case, rng), rollout_rows(case, rng))
    counts = GlobalCounts(*(load.num_ranks * GlobalCounts.of(batch)).tolist())  # as many on every rank
    model = build_model(config, case.vocab_size, EOS, on_cuda=False)
    engine = TrainEngine(model, config.train, config.optimizer, config.model.dtype, placement)
    return engine, fused_step(engine, batch, counts, case)


def one_turn(engine: TrainEngine, step: Callable[[], float]) -> Turn:
    """
    Raises:
        FloatingPointError: the loss is not finite, so that no update was made.
    """
    comm.barrier()
    rate = matmul_flops_per_second()  # all ranks at once, nothing sent
    comm.barrier()
    blocked = engine.collective_seconds()
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = step()
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started,
             "collective_seconds": engine.collective_seconds() - blocked, "matmul_flops_per_second": rate}
    if not math.isfinite(loss):
        raise FloatingPointError(f"scaling: the loss is {loss}: nothing was trained, its time means nothing")
    return found

"""What a rank of `step.py` does: it lets variants take turns, and measures time, bytes and memory."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed import comm
from step_case import RANKS, Case
from step_variants import make_step
from torch import Tensor

from asa_dist.runtime.collective_time import COLLECTIVES
from asa_dist.runtime.engine import Placement
from asa_kernels.cpu_linear import product

MATMUL_SIZE = 768
WARM_UP_TURNS = 2  # ZeRO-3 knows only after the first in which order parameters are wanted


class CollectiveBytes:
    """Bytes that a rank sends in collectives, if they go round a ring: (n − 1)/n of the whole, all-reduce twice that.

    Args:
        backend: ``deepspeed.comm.comm.cdb``; its collectives are replaced by ones that are counted.
    """

    def __init__(self, backend: Any) -> None:
        self.sent, self.calls, self._is_counting = 0.0, 0, False
        for name in COLLECTIVES:
            if hasattr(backend, name):
                setattr(backend, name, self._counted(name, getattr(backend, name)))

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        share = (RANKS - 1) / RANKS * (2 if name.startswith("all_reduce") else 1)

        @functools.wraps(collective)
        def counted(*arguments: Any, **named: Any) -> Any:
            if self._is_counting:  # the outermost one counts
                return collective(*arguments, **named)
            self.sent += share * max(map(num_bytes, (*arguments, *named.values())), default=0)
            self.calls += 1
            self._is_counting = True
            try:
                return collective(*arguments, **named)
            finally:
                self._is_counting = False

        return counted


def num_bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(num_bytes, argument)) if isinstance(argument, list | tuple) else 0


def matmul_flops_per_second() -> float:
    """As the trunk multiplies."""
    factor = torch.ones(MATMUL_SIZE, MATMUL_SIZE)
    started = time.perf_counter()
    for _ in range(4):
        product(factor, factor)
    return 4 * 2 * MATMUL_SIZE**3 / (time.perf_counter() - started)


def peak_resident_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure_on_rank(placement: Placement, case: Case, variants: Sequence[str], turns: int) -> dict[str, Any]:
    """Every variant's turns, after those to warm up; memory means something if there is one variant alone."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    start_bytes = psutil.Process().memory_info().rss
    traffic = CollectiveBytes(comm.comm.cdb)
    steps = {variant: make_step(variant, case, placement) for variant in variants}
    measured: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for turn in range(WARM_UP_TURNS + turns):
        for variant in rotated(variants, turn):
            found = one_turn(steps[variant], traffic)
            if turn >= WARM_UP_TURNS:
                measured[variant].append(found)
    return {"turns": measured, "peak_bytes_above_start": peak_resident_bytes() - start_bytes}


def rotated(variants: Sequence[str], turn: int) -> list[str]:
    """So that none always follows the same other one."""
    first = turn % len(variants)
    return [*variants[first:], *variants[:first]]


def one_turn(step: Callable[[], float], traffic: CollectiveBytes) -> Mapping[str, float]:
    """
    Raises:
        FloatingPointError: the loss is not finite, so that no update was made.
    """
    rate = matmul_flops_per_second()
    comm.barrier()
    sent, calls = traffic.sent, traffic.calls
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = step()
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started,
             "sent_bytes": traffic.sent - sent, "collectives": traffic.calls - calls, "loss": loss,
             "matmul_flops_per_second": rate}
    if not math.isfinite(loss):
        raise FloatingPointError(f"step: the loss is {loss}: nothing was trained, its time means nothing")
    return found

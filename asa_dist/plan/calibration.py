"""Figures of this machine, measured within seconds: matrix products, memory, dispatch, gloo; and a rehearsal.

A config is rehearsed if a few of its layers fit and are tried within two minutes, as the formulas have it; else they
say what a step takes, from matrix products, memory, dispatch and gloo alone.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

from asa_dist.config import Config
from asa_dist.plan.gloo import measure_gloo
from asa_dist.plan.machine import ASSUMED, Machine
from asa_dist.plan.memory import rank_memory
from asa_dist.plan.rehearsal import DEPTHS, STEPS, WARM_STEPS, rehearse, with_depth
from asa_dist.plan.shape import trunk_of, work_of
from asa_dist.plan.step_time import DECODE_OPS_PER_LAYER, step_time

TURNS = 5
COPIED_BYTES = 2**27
REHEARSAL_SECONDS = 120.0  # at most for one round of it


def this_machine(config: Config) -> Machine:
    """As one rank and one worker of this config would find it, with their threads; float32 is measured, or bfloat16.

    Raises:
        MeasuringError: gloo could not be measured, or the rehearsal failed.
    """
    import psutil
    import torch

    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.train.threads_per_rank)
    try:
        rate, bandwidth, op_seconds = _matmul_flops(config), _copy_bytes_per_second(), _op_seconds()
    finally:
        torch.set_num_threads(threads_before)
    hop_seconds, gloo = measure_gloo() if config.num_ranks > 1 else (0.0, bandwidth)
    assumptions = ASSUMED | dict.fromkeys(
        ("training_efficiency", "prefill_efficiency", "decode_bandwidth_share", "collective_bandwidth_share",
         "copy_bandwidth_share"), 1.0)  # fmt: skip
    host_seconds = DECODE_OPS_PER_LAYER * op_seconds
    assumptions |= {"overlap": 0.0, "hop_seconds": hop_seconds, "reserved_bytes": 0.0,
                    "hf_layer_seconds": host_seconds, "vllm_layer_seconds": host_seconds}  # fmt: skip
    total = psutil.virtual_memory().total
    share = total / (config.num_ranks + config.rollout.workers)
    cores = len(os.sched_getaffinity(0))
    measured = {"cores": cores, "matmul_flops": rate, "copy_bytes_per_second": bandwidth, "op_seconds": op_seconds,
                **({"gloo_bytes_per_second": gloo, "gloo_hop_seconds": hop_seconds} if config.num_ranks > 1 else {}),
                }  # fmt: skip
    machine = Machine(
        "this", config.num_ranks, False, {config.model.dtype: rate}, share,
        bandwidth, gloo, gloo, bandwidth, total, "measured just now", assumptions, measured)  # fmt: skip
    if not can_rehearse(config, machine):
        return machine
    return dataclasses.replace(machine, measured=measured | rehearse(config))


def can_rehearse(config: Config, machine: Machine) -> bool:
    """Whether its engine can be, it fits, and it does not take too long."""
    from asa_dist.rollout.engine_choice import chosen_engine

    if chosen_engine(config.rollout) == "vllm":
        return False
    shallow = [with_depth(config, depth) for depth in DEPTHS]
    needed = sum(rank_memory(one, machine).device_bytes for one in shallow)
    seconds = (WARM_STEPS + STEPS) * sum(step_time(one, machine).step for one in shallow)
    return needed < machine.device_bytes and seconds < REHEARSAL_SECONDS


def _median_seconds(do: Callable[[], object], turns: int = TURNS) -> float:
    do()
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _matmul_flops(config: Config) -> float:
    """Of a product as large as those of the config's MLP."""
    import torch

    from asa_kernels.cpu_linear import CpuLinear

    trunk, tokens = trunk_of(config), work_of(config).tokens
    dtype = getattr(torch, config.model.dtype)
    left = torch.randn(tokens, trunk.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = CpuLinear(trunk.hidden_size, trunk.intermediate_size, bias=False, dtype=dtype).requires_grad_(False)
    operations = 2 * tokens * trunk.hidden_size * trunk.intermediate_size
    repeats = max(1, int(2e8 // operations))
    return repeats * operations / _median_seconds(lambda: [layer(left) for _ in range(repeats)])


def _copy_bytes_per_second() -> float:
    """Read and written."""
    import torch

    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _median_seconds(lambda: target.copy_(source))


def _op_seconds() -> float:
    """Dispatch of one operation on next to nothing."""
    import torch

    one, times = torch.ones(8), 1000
    return _median_seconds(lambda: [one + one for _ in range(times)]) / times

"""Ranks of a benchmark: fresh processes of this machine, one thread and one core each, that talk by gloo.

The caller needs neither torch nor DeepSpeed of its own before it starts them: what a rank does is named, and imported
by the rank. What it returns goes through a file as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from live_run import Hang

from asa_dist.launcher import free_port

COLLECTIVE_SECONDS = 120.0


def run_on_ranks(num_ranks: int, module: str, arguments: tuple[Any, ...], deadline_seconds: float,
                 collective_seconds: float = COLLECTIVE_SECONDS) -> list[Any]:
    """What ``module.measure_on_rank(placement, *arguments)`` returned, in rank order.

    Raises:
        Hang: they did not end in time; then they are killed.
        torch.multiprocessing.ProcessRaisedException: one of them failed, with its traceback.
    """
    import torch.multiprocessing

    with tempfile.TemporaryDirectory(prefix="asa-ranks-") as name:
        folder = Path(name)
        context = torch.multiprocessing.spawn(
            _rank_main, (num_ranks, free_port(), folder, module, arguments, collective_seconds), nprocs=num_ranks,
            join=False)
        deadline = time.monotonic() + deadline_seconds
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                    process.join()
                raise Hang(f"{module}: {num_ranks} ranks did not end within {deadline_seconds:g} s")
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


def _rank_main(rank: int, num_ranks: int, port: int, folder: Path, module: str, arguments: tuple[Any, ...],
               collective_seconds: float) -> None:
    os.dup2(2, 1)  # DeepSpeed says much on stdout, which is for the result
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.sched_setaffinity(0, {core_of_rank(rank)})

    import logging

    import torch

    from asa_dist.runtime.engine import Placement, join_process_group

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    placement = Placement(rank, rank, num_ranks, torch.device("cpu"))
    join_process_group(placement, collective_seconds)
    measured = importlib.import_module(module).measure_on_rank(placement, *arguments)
    (folder / f"{rank}.json").write_text(json.dumps(measured), encoding="utf-8")
    torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it ends


def core_of_rank(rank: int) -> int:
    """Ranks beyond the cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[rank % len(cores)]

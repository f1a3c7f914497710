"""Latency and bandwidth of gloo between two processes of this machine, over the loopback.

    python -m asa_dist.plan.gloo RANK STORE     one of the two; rank 0 prints [seconds of a hop, bytes per second]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from asa_dist.plan.measuring_ranks import answer_of_ranks

INTERFACE = "lo"
GATHERED_BYTES = 2**22
TURNS = 20
ANSWER_SECONDS = 120.0


def measure_gloo() -> tuple[float, float]:
    """(seconds of a hop, bytes per second), by all-gathers.

    Raises:
        MeasuringError: the two processes failed, or did not answer in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        hop_seconds, bytes_per_second = answer_of_ranks(
            "gloo between two processes", __name__, str(Path(folder) / "store"),
            [{"GLOO_SOCKET_IFNAME": INTERFACE}] * 2, ANSWER_SECONDS)  # fmt: skip
    return hop_seconds, bytes_per_second


def run_rank(rank: int, store: str) -> tuple[float, float]:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, 2), rank=rank, world_size=2)
    medians = []
    for num_bytes in (4, GATHERED_BYTES):
        mine, seconds = torch.ones(num_bytes // 4), []
        whole = torch.empty(2 * len(mine))
        for _ in range(TURNS):
            started = time.perf_counter()
            dist.all_gather_into_tensor(whole, mine)
            seconds.append(time.perf_counter() - started)
        medians.append(statistics.median(seconds))
    dist.destroy_process_group()
    return medians[0], GATHERED_BYTES / max(medians[1] - medians[0], 1e-9)


if __name__ == "__main__":
    print(json.dumps(run_rank(int(sys.argv[1]), sys.argv[2])))

"""How the ranks of a run find each other: the launcher's variables, and the store at MASTER_ADDR:MASTER_PORT."""

from __future__ import annotations

import datetime
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its __all__


def follow_slurm() -> None:
    """srun numbers its tasks in variables of its own; everybody else reads torch's."""
    slurm = os.environ
    if "RANK" not in slurm and "SLURM_PROCID" in slurm:
        num_ranks, num_hosts = int(slurm["SLURM_NTASKS"]), int(slurm["SLURM_NNODES"])
        slurm |= {"RANK": slurm["SLURM_PROCID"], "LOCAL_RANK": slurm["SLURM_LOCALID"], "WORLD_SIZE": str(num_ranks),
                  "LOCAL_WORLD_SIZE": str(num_ranks // num_hosts)}  # fmt: skip


def open_store(name: str, rank: int, num_ranks: int, timeout_seconds: float) -> PrefixStore:
    """The launcher's store, or rank 0's own, listening on MASTER_ADDR alone: torch's default is every interface.

    Args:
        name: what all keys begin with.

    Raises:
        RuntimeError: rank 0 is not reached in time.
        OSError: rank 0 cannot listen there.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = rank == 0 and not launcher_serves
    listener = socket.create_server((host, port)) if is_server else None
    store = TCPStore(
        host,
        port,
        num_ranks,
        is_server,
        datetime.timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )
    return PrefixStore(name, store)

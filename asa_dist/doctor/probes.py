"""What `asa doctor` runs in processes of their own: python -m asa_dist.doctor.probes NAME ARGUMENTS.

Each raises, hangs or dies as it likes, and prints what it has to report.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import socket
import sys
from collections.abc import Callable


def import_package(name: str) -> None:
    importlib.import_module(name)


def find_gpus() -> None:
    """What torch was built for, what the driver can run, and what torch finds."""
    import torch
    import torch.distributed as dist

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    has_nccl = dist.is_available() and dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
    build = {"torch": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip, "nccl": nccl}
    print(json.dumps(build | {"driver": _driver_cuda(), "names": names}))


def _driver_cuda() -> str | None:
    """The newest CUDA that NVIDIA's driver runs."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def all_reduce(backend: str, store: str, rank: str, num_ranks: str) -> None:
    """One rank of an all-reduce. Its own time-out, ten minutes or more, never comes before ours."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=store, rank=int(rank), world_size=int(num_ranks))
    ones = torch.ones(1000, device=device)
    dist.all_reduce(ones)
    if ones.tolist() != [float(num_ranks)] * 1000:
        raise ArithmeticError(f"{backend}: the sum of {num_ranks} ranks' ones is {ones[0].item()}")
    dist.destroy_process_group()


def start_ray() -> None:
    """A Ray as `asa train` starts it, and its end; also when this process is asked to end before it is there."""
    from asa_dist.rollout.cluster import start_local_ray

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    start_local_ray(1, 0, 100 * 2**20).stop()


def resolve_hostname() -> None:
    """A lookup may wait for a name server."""
    print(socket.gethostbyname(socket.gethostname()))


PROBES: dict[str, Callable[..., None]] = {
    "import": import_package, "gpus": find_gpus, "all-reduce": all_reduce, "ray": start_ray,
    "hostname": resolve_hostname,
}  # fmt: skip

if __name__ == "__main__":
    PROBES[sys.argv[1]](*sys.argv[2:])

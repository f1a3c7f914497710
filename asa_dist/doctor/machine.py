"""The machine without its packages: sizes, limits, names, tools. Everything here answers at once."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from asa_dist.doctor.findings import Finding, State

GIB = 2**30
MIN_PYTHON = (3, 11)  # setup.py's python_requires; older ones cannot even import this
FEW_MEMORY_BYTES = 4 * GIB  # quickstart's three processes
FEW_SHM_BYTES = GIB  # Ray's object store of a small run is a quarter of it
FEW_DISK_BYTES = 10 * GIB
TOO_FEW_DISK_BYTES = GIB // 4
FEW_OPEN_FILES = 4096  # Ray opens some for every actor, connection and object


def check_machine(progress: Callable[[str], None]) -> list[Finding]:
    """In the order in which they are shown."""
    progress("machine")
    return [
        _python(), _cpus(), _memory(), _shared_memory(), _disk("disk (here)", Path.cwd()),
        _disk("disk (temporary)", Path(tempfile.gettempdir())), _open_files(), _loopback(), _compiler(), _ninja(),
        _slurm(), _infiniband(),
    ]  # fmt: skip


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("Python", "broken", found, "use Linux: DeepSpeed and the file locks need it", is_needed=True)
    if sys.version_info[:2] != MIN_PYTHON:
        return Finding("Python", "limited", found, "tested with 3.11 only", is_needed=True)
    return Finding("Python", "ok", found, is_needed=True)


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0))
    found = f"{usable} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    if usable < 2:
        return Finding("CPU", "limited", found, "trainer and rollout worker will take turns: give it two cores or more")
    return Finding("CPU", "ok", found)


def _memory() -> Finding:
    try:
        kib = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        total, available = (int(kib[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError) as error:
        return Finding("memory", "not known", f"/proc/meminfo: {error}")
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if (limit := _container_limit_bytes()) is not None and limit < total:
        found += f", the container may use {limit / GIB:.1f} GiB"
        available = min(available, limit)
    if available < FEW_MEMORY_BYTES:
        advice = "the quickstart takes about 4 GiB; larger models 20 bytes per parameter and more"
        return Finding("memory", "limited", found, advice)
    return Finding("memory", "ok", found)


def _container_limit_bytes() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # versions 2 and 1
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there; "max"
            continue
    return None


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding("/dev/shm", "limited", str(error), "mount it: Ray would put its objects into files, slowly")
    found = f"{free / GIB:.1f} GiB free"
    if free < FEW_SHM_BYTES:
        advice = "enlarge it (docker run --shm-size=8g): Ray keeps four versions of the weights there, or in slow files"
        return Finding("/dev/shm", "limited", found, advice)
    return Finding("/dev/shm", "ok", found)


def _disk(name: str, folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name, "broken", f"{folder}: {error.strerror}", "choose another folder", is_needed=True)
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        advice = "run `asa train` elsewhere, or give --run-dir" if name == "disk (here)" else "set TMPDIR"
        return Finding(name, "limited", f"{folder} is not writable", advice)
    if free < FEW_DISK_BYTES:
        state: State = "broken" if free < TOO_FEW_DISK_BYTES else "limited"
        advice = "make room: a checkpoint takes 12 bytes per parameter, and three are kept"
        return Finding(name, state, found, advice, is_needed=True)
    return Finding(name, "ok", found, is_needed=True)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES:
        return Finding("open files", "limited", f"at most {soft} (could be {hard})", "ulimit -n 65536")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        advice = "bring the loopback up (ip link set lo up): trainer ranks and Ray talk over it"
        return Finding("loopback", "broken", f"127.0.0.1: {error}", advice, is_needed=True)
    return Finding("loopback", "ok", "127.0.0.1 accepts connections", is_needed=True)


def _compiler() -> Finding:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if path := next(filter(None, map(shutil.which, wanted)), None):
        return Finding("C++ compiler", "ok", path)
    advice = "install one (apt-get install g++); only DeepSpeed's own ops need it"
    return Finding("C++ compiler", "limited", f"none: {', '.join(wanted)}", advice)


def _ninja() -> Finding:
    beside_python = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if path := shutil.which("ninja", path=beside_python):
        return Finding("ninja", "ok", path)
    return Finding("ninja", "limited", "not there", "pip install ninja; only DeepSpeed's own ops need it")


def _slurm() -> Finding:
    commands = ("srun", "sbatch", "scontrol")
    there = [command for command in commands if shutil.which(command)]
    if len(there) == len(commands):
        return Finding("Slurm", "ok", ", ".join(commands))
    missing = [command for command in commands if command not in there]
    return Finding("Slurm", "limited", f"no {', '.join(missing)}")


def _infiniband() -> Finding:
    folder = Path("/sys/class/infiniband")
    devices = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not devices:
        return Finding("InfiniBand", "limited", "no devices: several machines would talk over TCP")
    return Finding("InfiniBand", "ok", ", ".join(devices))

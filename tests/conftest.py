"""What every test process needs before heavy imports, and the watch for processes left behind."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HAS_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))  # asking torch would import it
if not HAS_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are defined: they then run on CPU tensors

SESSION_VARIABLE = "ASA_TEST_SESSION"
EXIT_DEADLINE_SECONDS = 15.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests marked long, which CI has no time for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="only with --long: `make faults`, `make test-cluster`"))


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fails the session if anything it started, daemons included, outlives its last test; ends it too."""
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex
    yield
    deadline = time.monotonic() + EXIT_DEADLINE_SECONDS
    while (left := started_here()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        names = [describe(process) for process in left]
        for process in left:
            end(process)
        psutil.wait_procs(left, timeout=5)
        pytest.fail("processes left behind by the tests (now ended):\n" + "\n".join(names), pytrace=False)


def started_here() -> list[psutil.Process]:
    """Live descendants of this session. Daemons leave the process tree, but keep the environment they started with."""
    children = set(psutil.Process().children(recursive=True))
    marker = os.environ[SESSION_VARIABLE]
    for process in psutil.process_iter(["environ"]):
        if process.pid != os.getpid() and (process.info["environ"] or {}).get(SESSION_VARIABLE) == marker:
            children.add(process)
    return [process for process in children if is_leftover(process)]


def is_leftover(process: psutil.Process) -> bool:
    try:
        # Python's own resource tracker lives exactly as long as the process that started it, which is this one.
        is_tracker = "multiprocessing.resource_tracker" in " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and not is_tracker
    except psutil.NoSuchProcess:
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"  pid {process.pid}: {' '.join(process.cmdline())[:200] or process.name()}"
    except psutil.NoSuchProcess:
        return f"  pid {process.pid}: ended in the meantime"


def end(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return

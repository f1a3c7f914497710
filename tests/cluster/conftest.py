"""Where hosts can be made, and that a test leaves nothing of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster_run import CONFIG, OVERRIDES, ClusterRun
from tests.cluster.hosts import ROOT, why_not_here
from tests.conftest import describe, started_here

EXIT_SECONDS = 15.0
# of every command on a host: of this shell's environment Ray's token, for one, must not get there
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
               "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def hosts_can_be_made() -> None:
    if reason := why_not_here():
        pytest.skip(reason)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_the_file(hosts_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from _nothing_left(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def nothing_left_by_the_test(hosts_can_be_made: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield from _nothing_left(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ClusterRun:
    """One host with two ranks, uninterrupted."""
    run = ClusterRun(tmp_path_factory.mktemp("reference") / "run")
    command = [sys.executable, "-m", "asa_dist.cli", "train", str(CONFIG), "train.ranks=2", *OVERRIDES]
    ended = subprocess.run([*command, "--run-dir", str(run.run_dir)], env=os.environ | ENVIRONMENT, timeout=400,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return run


def _nothing_left(folder: Path) -> Iterator[None]:
    """Processes of this session, mounts on its folder. What is in a host's own namespaces: see Cluster."""
    before = _what_is_there(folder)
    yield
    deadline = time.monotonic() + EXIT_SECONDS
    while (left := _what_is_there(folder) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left behind: {sorted(left)}"


def _what_is_there(folder: Path) -> set[str]:
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    return {describe(process) for process in started_here()} | set(mounts)

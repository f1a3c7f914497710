"""A local Ray: who reaches it, how it ends, what is said if it cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from asa_dist.rollout.cluster import LOOPBACK_SWITCH, ClusterError, RayHandle, connect, start_local_ray
from tests.rollout.ray_run import local_ray, session_members

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


def test_ray_listens_on_loopback_only(ray_handle: RayHandle) -> None:
    processes = session_members(ray_handle._head.pid)
    assert any("gcs_server" in process.name() for process in processes)
    hosts = {connection.laddr.ip for process in processes for connection in process.net_connections("inet")
             if connection.status == psutil.CONN_LISTEN}
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1"} and hosts


def test_connect_names_what_is_amiss(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        with pytest.raises(ClusterError, match=f"cannot connect to Ray at {address}: set RAY_AUTH_MODE"):
            connect(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.delenv(LOOPBACK_SWITCH, raising=False)
        with pytest.raises(ClusterError, match=f"set {LOOPBACK_SWITCH}"):
            connect(address)
        monkeypatch.setenv(LOOPBACK_SWITCH, "0")
        with pytest.raises(ClusterError, match=f"cannot connect to Ray at '{address}'.*refused"):
            connect(address)


def test_a_ray_that_cannot_start_says_why(tmp_path: Path) -> None:
    long_folder = tmp_path / ("x" * 100)  # a socket's path has at most 107 bytes
    with pytest.raises(ClusterError, match=r"(?s)Ray did not start: its head process ended. .*107 bytes"):
        start_local_ray(num_cpus=1, num_gpus=0, object_store_bytes=100_000_000, temp_dir=long_folder)


def test_ray_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """kill -9 of the owner: nothing tells Ray's head but its closed standard input."""
    script = ("from asa_dist.rollout.cluster import start_local_ray; import time\n"
              "ray = start_local_ray(1, 0, 100_000_000)\nprint(ray._head.pid, ray._owned_folder, flush=True)\n"
              "time.sleep(600)")
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    head, folder = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while (left := session_members(int(head)) or os.path.exists(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left

"""Runs by launch/deepspeed.sh on several hosts: they are the run of one host."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster_run import CONFIG, DEADLINE_SECONDS, OVERRIDES, STEPS, ClusterRun
from tests.cluster.conftest import ENVIRONMENT
from tests.cluster.hosts import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TOKEN = re.compile(r"[0-9a-f]{64}")


class Launch(ClusterRun):
    """launch/deepspeed.sh, started on node0."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(folder / "run")
        self.cluster, self._folder = cluster, folder
        self.process: subprocess.Popen[bytes]

    def start(self, trainers: list[str], generating: list[str], *overrides: str) -> None:
        hosts, rollouts = self._folder / "hostfile", self._folder / "rollouts"
        hosts.write_text("# those that train\n" + "".join(f"{host} slots=1\n" for host in trainers))
        rollouts.write_text("".join(f"{host} slots=1\n" for host in generating))
        command = ["bash", str(ROOT / "launch/deepspeed.sh"), str(hosts), str(CONFIG), *OVERRIDES, *overrides,
                   "--rollout-hostfile", str(rollouts), "--run-dir", str(self.run_dir)]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self.process = self.cluster.start("node0", *command, stdout=log, stderr=log, cwd=self._folder)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: len(self.steps) >= step or self.process.poll() is not None, f"step {step}", DEADLINE_SECONDS)
        assert self.process.poll() is None, self.log

    def interrupt(self) -> None:
        """SIGTERM to the script."""
        script, = psutil.Process(self.process.pid).children()
        script.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The script's exit code; nothing may be left on any host."""
        code = self.process.wait(DEADLINE_SECONDS)
        self.cluster.wait_until_idle()
        return code


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with Cluster(["node0", "node1", "node2", "node3"], tmp_path / "cluster", ENVIRONMENT) as cluster:
        cluster.start_ssh()
        yield Launch(cluster, tmp_path)


def test_a_rollout_host_is_lost_for_good(launch: Launch, reference: ClusterRun) -> None:
    """The run goes on with the other one, and no worse; here until it is asked to end."""
    launch.start(["node0", "node1"], ["node2", "node3"], "rollout.workers=2", "train.steps=100000")
    launch.wait_for_step(2)
    assert_the_token_is_secret(launch)
    launch.cluster.crash("node3")
    wait_until(lambda: launch.events("worker_died"), "its worker is missed", DEADLINE_SECONDS)
    launch.wait_for_step(max(STEPS, len(launch.steps) + 2))
    launch.interrupt()
    assert launch.wait() == 0, launch.log
    launch.assert_same(reference, len(launch.steps))


@pytest.mark.long
def test_stopped_and_started_again(launch: Launch, reference: ClusterRun) -> None:
    launch.start(["node0", "node1"], ["node2"])
    launch.wait_for_step(6)
    launch.interrupt()
    assert launch.wait() == 0, launch.log
    assert 6 <= len(launch.steps) < 20
    launch.start(["node0", "node1"], ["node2"])
    assert launch.wait() == 0, launch.log
    launch.assert_same(reference)


@pytest.mark.long
def test_a_trainer_host_is_lost(launch: Launch, reference: ClusterRun) -> None:
    """An error, not a hang; the same command, with another host in its place, goes on."""
    launch.start(["node0", "node1"], ["node2"])
    launch.wait_for_step(6)
    launch.cluster.crash("node1")
    assert launch.wait() not in (0, 2)
    launch.start(["node0", "node3"], ["node2"])
    assert launch.wait() == 0, launch.log
    launch.assert_same(reference)


def assert_the_token_is_secret(launch: Launch) -> None:
    """Neither on a command line, which everybody on a host can read, nor in the run folder; its file is private."""
    for host in launch.cluster.nodes:
        for process in launch.cluster.processes(host):
            assert not TOKEN.search(" ".join(process.cmdline())), process.cmdline()
        files = launch.cluster.run(host, "find", "/tmp", "-mount", "-name", "token", "-printf", "%m %p").split()
        assert files[0] == "600" and files[1].endswith("/token"), files
    told = [path for path in launch.run_dir.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".pt")]
    assert not [path for path in told if TOKEN.search(path.read_text(errors="replace"))]

"""What the preflight says, to the letter, of hosts that are fine and of each thing that can be wrong with them.

Two hosts train, one only generates; Ray runs across all three. One thing is broken at a time, and mended again.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import psutil
import pytest

from asa_dist.runtime.host_facts import PACKAGES
from tests.cluster.conftest import ENVIRONMENT, ROOT
from tests.cluster.hosts import CONTROLLER, Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

TRAINERS, ROLLOUT = ("node0", "node1"), "node2"
HEAD = "node0:6379"
SMALL_DISK_BYTES = 128 * 1024  # a checkpoint of tests/tiny.yaml takes more
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
DEADLINE_SECONDS = 250.0  # for a hang, not for a slow machine
ports = itertools.count(20_000)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts and a Ray across them."""
    hosts = [*TRAINERS, ROLLOUT]
    with Cluster(hosts, tmp_path_factory.mktemp("hosts"), ENVIRONMENT | TOKEN) as cluster:
        rays = [start_ray(cluster, host) for host in hosts]
        cluster.run("node0", *ray_hosts("wait"), *hosts)
        yield cluster
        for ray in rays:
            for process in psutil.Process(ray.pid).children():  # nsenter passes no signal on
                process.terminate()
        for ray in rays:
            assert ray.wait(DEADLINE_SECONDS) == 0
        cluster.wait_until_idle()


def ray_hosts(command: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "asa_dist.rollout.ray_hosts", command, "--head", HEAD, *options]


def start_ray(cluster: Cluster, host: str) -> subprocess.Popen[Any]:
    return cluster.start(host, *ray_hosts("start", "--num-cpus", "1"))


def preflight(cluster: Cluster, run_dir: Path, *options: str, ranks: tuple[int, ...] = (0, 1), port: int = 0,
              environment: Mapping[str, str] | None = None) -> list[tuple[int, str]]:  # fmt: skip
    """(exit code, what it printed) of each rank. ``environment``: of the last one, beside that of all."""
    command = [sys.executable, "-m", "asa_dist.preflight", "tests/tiny.yaml", "data.sources.0.path=README.md",
               "--run-dir", str(run_dir), "--ray-address", HEAD, "--timeout-seconds", "200", *options]  # fmt: skip
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node0",
              "MASTER_PORT": str(port or next(ports)), "ASA_TRAINER_HOSTS": ",".join(TRAINERS)}  # fmt: skip
    processes = [
        cluster.start(TRAINERS[rank], *command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                      environment=common | {"RANK": str(rank)} | (dict(environment or {}) if rank == ranks[-1] else {}))
        for rank in ranks
    ]  # fmt: skip
    outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def problems(outcomes: list[tuple[int, str]]) -> list[str]:
    """What rank 0 lists; both ranks end with 1, and rank 1 has nothing to add."""
    (code, output), (other_code, other_output) = outcomes
    assert (code, other_code) == (1, 1), outcomes
    assert "asa:" not in other_output
    headline, *listed = output.partition("preflight: NOT ready, ")[2].strip().split("\n")
    assert re.fullmatch(rf"{len(listed)} problems?, after \d+\.\d s:", headline), output
    return [line.removeprefix("  - ") for line in listed]


def complaint(outcome: tuple[int, str]) -> str:
    """What a rank ends with that got no verdict."""
    code, output = outcome
    assert code == 75 and "preflight of" not in output, output
    return output.strip().split("\n")[-1]


def test_all_is_well(cluster: Cluster, tmp_path: Path) -> None:
    (code, output), (other_code, other_output) = preflight(cluster, tmp_path, "--rollout-hosts", ROLLOUT)
    assert code == other_code == 0, output + other_output
    told = re.sub(r"[\d.,]+ (s\b|MB|%)", r"… \1", output[output.index("preflight of") :])
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    assert told.split("\n") == [
        "preflight of 2 ranks on 3 hosts",
        "  all-reduce: gloo, 2 ranks, … s",
        "  clocks: within … s",
        "  Ray: … MB to every host and back, … s",
        "  hosts: node0, node1, node2",
        f"  versions: {', '.join([f'python {platform.python_version()}', *versions])}",
        f"  run folder: {tmp_path}, shared by all",
        "  room in it: … MB, a checkpoint takes … MB",
        "  room for Ray: /tmp … % full at most, /dev/shm … MB free at least",
        "preflight: ready, after … s",
        "",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_does_not_come(cluster: Cluster, tmp_path: Path) -> None:
    port = next(ports)
    [outcome] = preflight(cluster, tmp_path, "--start-timeout-seconds", "10", ranks=(0,), port=port)
    assert complaint(outcome) == (
        f"asa: preflight: rank 0: rank 1 (node1) did not come to node0:{port}, here 10.77.0.100, within 10 s, unlike "
        "rank 0 (node0). What does that host say? Is it up, and every port open to it and from it?"
    )


def test_a_host_without_ray(cluster: Cluster) -> None:
    waiting = cluster.start("node0", *ray_hosts("wait", "--timeout-seconds", "1"), "node0", CONTROLLER, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    _, said = waiting.communicate(timeout=DEADLINE_SECONDS)
    assert waiting.returncode == 75 and said == (
        f"asa: no Ray on {CONTROLLER} after 1 s, but on 1 of the 2 hosts that it is to be on: is that host up, and "
        "does its name lead to the others?\n"
    )


def test_a_name_that_leads_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    leads = r"host node9: its name leads nowhere from node0 \(\[Errno .*\): is it spelt as in /etc/hosts or DNS\? .*"
    assert re.fullmatch(f"asa: {leads}", cluster.run("node0", *ray_hosts("wait"), "node0", "node9", check=False))
    [problem] = problems(preflight(cluster, tmp_path, "--rollout-hosts", "node9"))
    assert re.fullmatch(leads, problem)


def test_more_rollout_workers_than_there_is_room_for(cluster: Cluster, tmp_path: Path) -> None:
    assert problems(preflight(cluster, tmp_path, "rollout.threads_per_worker=4")) == [
        "1 rollout workers x 4 CPU need more than the 3 CPU that Ray has, at most 1 on a host: lower rollout.workers"
    ]


def test_another_torch(cluster: Cluster, tmp_path: Path) -> None:
    real = Path(str(distribution("torch").locate_file(f"torch-{version('torch')}.dist-info/METADATA")))
    edited = tmp_path / "METADATA"
    edited.write_text(re.sub(r"(?m)^Version: .*", "Version: 2.0.0", real.read_text(), count=1))
    with cluster.mounted("node1", edited, real):
        assert problems(preflight(cluster, tmp_path)) == [
            f"node1: torch 2.0.0, other hosts have {version('torch')}: install the same everywhere (pip install -c "
            "constraints.txt)"
        ]


def test_a_blocked_port(cluster: Cluster, tmp_path: Path) -> None:
    port = next(ports)
    with cluster.port_blocked("node0", port):
        first, second = preflight(cluster, tmp_path, "--start-timeout-seconds", "10", port=port)
    assert complaint(second) == (
        f"asa: preflight: rank 1: node1 does not reach rank 0 at node0:{port}: timed out. Has rank 0 started there, is "
        "that port open to node1, and does the name lead to the right address?"
    )
    assert complaint(first) == (
        f"asa: preflight: rank 0: rank 1 (node1) did not come to node0:{port}, here 10.77.0.100, within 10 s, unlike "
        "rank 0 (node0). What does that host say? Is it up, and every port open to it and from it?"
    )


@contextlib.contextmanager
def firewall(cluster: Cluster, host: str, open_port: int) -> Iterator[None]:
    """The host drops all connections that others begin, but to one port."""
    rule = ["INPUT", "--protocol", "tcp", "--in-interface", "eth0", "--syn", "!", "--dport", str(open_port)]
    cluster.run(host, "iptables", "--append", *rule, "--jump", "DROP")
    try:
        yield
    finally:
        cluster.run(host, "iptables", "--delete", *rule, "--jump", "DROP")


def test_a_firewall_between_ranks(cluster: Cluster, tmp_path: Path) -> None:
    port = next(ports)
    with firewall(cluster, "node0", port):
        [problem] = problems(preflight(cluster, tmp_path, "--timeout-seconds", "50", port=port))
    assert problem.startswith("node0, node1: no all-reduce with gloo: Gloo connectFullMesh failed with ")
    assert problem.endswith(
        ". Are all ports open between the hosts, and is the network interface the right one (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)?"
    )


def test_a_firewall_before_ray(cluster: Cluster, tmp_path: Path) -> None:
    with firewall(cluster, ROLLOUT, 22):
        [problem] = problems(
            preflight(cluster, tmp_path, "--timeout-seconds", "80", "--rollout-hosts", ROLLOUT))  # fmt: skip
    assert re.sub(r"\d+ s:", "… s:", problem) == (
        "node2: 4 MB did not get there from node0 and back within … s: are all ports open between the two, in both "
        "directions?"
    )


def test_a_run_folder_that_cannot_be_written_to(cluster: Cluster, tmp_path: Path) -> None:
    with cluster.mounted("node1", tmp_path, tmp_path, "-o", "ro"):
        assert problems(preflight(cluster, tmp_path)) == [
            f"node1: the run folder {tmp_path} cannot be written to: Read-only file system. It has to be on a file "
            "system that all hosts share, for this user to write to"
        ]


def test_a_run_folder_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    run_dir, own = tmp_path / "run", tmp_path / "own"
    for folder in (run_dir, own):
        folder.mkdir()
    with cluster.mounted("node1", own, run_dir):
        assert problems(preflight(cluster, run_dir)) == [
            f"node1: what it writes to {run_dir} is not to be seen on node0: choose a run folder that all hosts share"
        ]
    assert [*own.iterdir(), *run_dir.iterdir()] == []


def test_a_name_that_means_the_host_itself(cluster: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(re.sub(r"\S+ node1", "127.0.1.1 node1", cluster.run("node1", "cat", "/etc/hosts")))
    means = "node1: its own name means 127.0.1.1, where no other host reaches it: remove that line from its /etc/hosts"
    with cluster.mounted("node1", hosts, Path("/etc/hosts")):
        assert problems(preflight(cluster, tmp_path)) == [
            f"{means}, or give there the address that the other hosts use"]  # fmt: skip
        said = cluster.run("node1", *ray_hosts("start"), check=False)
        assert said == f"asa: host {means}, or give the address that the other hosts use"


@contextlib.contextmanager
def small_disk(cluster: Cluster, host: str, folder: Path) -> Iterator[None]:
    """Of this host alone, and gone with it: hosts cannot share what one of them mounts."""
    cluster.run(host, "mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder))
    try:
        yield
    finally:
        cluster.run(host, "umount", "--lazy", str(folder))


def test_a_full_disk(cluster: Cluster, tmp_path: Path) -> None:
    with small_disk(cluster, "node0", tmp_path), small_disk(cluster, "node1", tmp_path):
        assert problems(preflight(cluster, tmp_path)) == [
            f"node1: what it writes to {tmp_path} is not to be seen on node0: choose a run folder that all hosts share",
            "node0, node1: the disk of the run folder has 0.1 MB left, a checkpoint takes 0.3 MB: make room, or choose "
            "another run folder",
        ]


def test_a_wrong_token(cluster: Cluster, tmp_path: Path) -> None:
    assert problems(preflight(cluster, tmp_path, environment={"RAY_AUTH_TOKEN": "b" * 64})) == [
        "node1: cannot connect to Ray at node0:6379: Failed to connect to Ray cluster at node0:6379. Are RAY_AUTH_MODE "
        "and RAY_AUTH_TOKEN of this process those of the cluster?"
    ]

"""The hosts themselves: what the other tests of this folder stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.conftest import ENVIRONMENT
from tests.cluster.hosts import CONTROLLER, Cluster, wait_until


def test_hosts_with_ssh_and_slurm_a_firewall_and_a_lost_one(tmp_path: Path) -> None:
    with Cluster(["node0", "node1"], tmp_path, ENVIRONMENT) as cluster:
        cluster.start_ssh()
        assert cluster.run("node0", "ssh", "node1", "hostname") == "node1"
        with cluster.port_blocked("node1", 22):
            answer = cluster.run("node0", "ssh", "-o", "ConnectTimeout=1", "node1", "hostname", check=False)
            assert "timed out" in answer
        cluster.start_slurm()
        assert sorted(cluster.run(CONTROLLER, "srun", "--nodes=2", "hostname").split()) == ["node0", "node1"]
        assert cluster.processes("node0") == [] == cluster.processes("node1")
        sleeping = cluster.start("node0", "sleep", "600")
        wait_until(lambda: cluster.processes("node0"), "its process is seen", 5)
        cluster.crash("node1")
        with pytest.raises(AssertionError, match=r"No route to host|timed out"):
            cluster.run("node0", "ssh", "-o", "ConnectTimeout=5", "node1", "hostname")
    assert sleeping.wait(5) != 0  # with its host

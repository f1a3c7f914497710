"""Runs as SLURM jobs on several hosts: they are the run of one host, whatever happens to the hosts meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster_run import STEPS, ClusterRun, Job
from tests.cluster.conftest import ENVIRONMENT
from tests.cluster.hosts import CONTROLLER, Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NODES = ["node0", "node1", "node2", "node3", "node4"]  # two that train, one that only generates; the others to spare
LAYOUT = ["--nodes", "3", "--rollout-nodes", "1", "--time", "30"]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with Cluster(NODES, tmp_path / "cluster", ENVIRONMENT) as cluster:
        cluster.start_slurm()
        yield Job(cluster, tmp_path / "run")


def begin(job: Job) -> None:
    job.submit(*LAYOUT)
    job.wait_until(lambda: len(job.steps) >= 6, "step 6")


def test_usr1_before_the_limit_is_a_checkpoint_and_a_requeue(job: Job, reference: ClusterRun) -> None:
    begin(job)
    job.cluster.run(CONTROLLER, "scancel", "--batch", "--signal=USR1", job.number)
    job.wait()
    assert job.details("Restarts") == "1", job.log
    job.assert_same(reference)


@pytest.mark.parametrize("which", [1, pytest.param(0, marks=pytest.mark.long)], ids=["trainer", "batch host"])
def test_a_trainer_host_is_lost(job: Job, reference: ClusterRun, which: int) -> None:
    """Without FIN or RST. The first host runs the script, rank 0 and Ray's head, too."""
    begin(job)
    job.cluster.crash(job.hosts()[which])
    job.wait()
    assert job.details("Restarts") == "1", job.log
    job.assert_same(reference)


@pytest.mark.long
@pytest.mark.parametrize("which", [1, 0], ids=["trainer", "batch host"])
def test_a_partition_in_which_the_old_tasks_survive(job: Job, reference: ClusterRun, which: int) -> None:
    """45 s: SLURM starts the job again elsewhere, while the lost host trains on, or tries to."""
    begin(job)
    lost = job.hosts()[which]
    job.cluster.cut(lost)
    time.sleep(45)  # the partition
    assert job.cluster.processes(lost), "the old tasks did not survive: this tests nothing"
    job.cluster.heal(lost)
    job.wait(lost)
    assert job.details("Restarts") == "1", job.log
    job.assert_same(reference)


@pytest.mark.long
def test_a_short_partition_costs_a_pause(job: Job, reference: ClusterRun) -> None:
    begin(job)
    lost = job.hosts()[1]
    job.cluster.cut(lost)
    time.sleep(5)  # the partition
    assert len(job.steps) < STEPS, "it had ended before: this tests nothing"
    job.cluster.heal(lost)
    job.wait()
    assert job.details("Restarts") == "0", job.log
    job.assert_same(reference)


@pytest.mark.long
@pytest.mark.parametrize("which", [3, 0], ids=["rollout host", "batch host"])
def test_one_of_two_rollout_hosts_may_be_lost(job: Job, reference: ClusterRun, which: int) -> None:
    """The job goes on: SLURM is told not to end it (--no-kill). So another host has to notice if its script is lost."""
    job.submit("--nodes", "4", "--rollout-nodes", "2", "--time", "30", "rollout.workers=2", "train.steps=100000")
    job.wait_until(lambda: len(job.steps) >= 2, "step 2")
    job.cluster.crash(job.hosts()[which])
    if which == 3:
        job.wait_until(lambda: bool(job.events("worker_died")), "its worker is missed")
    else:
        job.wait_until(lambda: bool(job.events("resumed")), "the next start")
    job.wait_until(lambda: len(job.steps) >= STEPS + 2, "two steps more")
    (job.run_dir / "stop").touch()
    job.wait()
    assert job.details("Restarts") == ("0" if which == 3 else "1"), job.log
    job.assert_same(reference, len(job.steps))

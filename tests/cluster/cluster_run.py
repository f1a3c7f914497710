"""One run of the quickstart's model, wherever it is: on one host, or on several of a cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.live_run import ROOT, VisibleRun
from tests.cluster.hosts import CONTROLLER, Cluster, wait_until

CONFIG = ROOT / "configs/quickstart.yaml"
STEPS = 20
TOLERANCE = 1e-5  # relative, of losses: sums have another order
# synchronous, so that every run generates the same; self-alignment soon, checkpoints often
OVERRIDES = [f"train.steps={STEPS}", "rollout.max_policy_age=0", "evaluator.max_warmup_steps=4",
             "train.eval_every_steps=10", "checkpoint.every_steps=2", "optimizer.schedule=constant",
             "rollout.timeout_seconds=80", "train.collective_timeout_seconds=90"]  # fmt: skip
PROMPTS_PER_STEP = 4
DEADLINE_SECONDS = 400.0  # for a hang, not for a slow machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class ClusterRun(VisibleRun):
    """What can be seen of a run from outside."""

    def assert_same(self, reference: VisibleRun, num_steps: int = STEPS) -> None:
        """One history: every step once, each prompt once, and the losses of the other run as far as that goes."""
        assert [row["step"] for row in self.steps] == list(range(1, num_steps + 1))
        for row, expected in zip(self.steps, reference.steps, strict=False):
            for key in (key for key in expected if key.startswith("loss/")):
                assert row[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=TOLERANCE), (key, row["step"])
        trained = Counter(prompt for row in self.rows("trained") for prompt in row["prompt_ids"])
        assert trained == dict.fromkeys(range(num_steps * PROMPTS_PER_STEP), 1)

    def events(self, name: str) -> list[dict[str, object]]:
        return [row for row in self.rows("events") if row["event"] == name]


class Job(ClusterRun):
    """The same as a SLURM job, from `asa submit` on."""

    def __init__(self, cluster: Cluster, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.cluster = cluster
        self.number = ""

    def submit(self, *options: str) -> None:
        answer = self.cluster.run(CONTROLLER, "python", "-m", "asa_dist.cli", "submit", str(CONFIG), "train.ranks=1",
                                   *OVERRIDES, "--run-dir", str(self.run_dir), *options)  # fmt: skip
        self.number = answer.split("submitted job ")[1].split(";")[0]

    @property
    def log(self) -> str:
        path = self.run_dir / f"job-{self.number}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def details(self, key: str) -> str:
        """What SLURM says of the job, e.g. "JobState"."""
        said = self.cluster.run(CONTROLLER, "scontrol", "show", "job", "-o", self.number, check=False)
        found = dict(word.partition("=")[::2] for word in said.split())
        return found.get(key, "")

    def hosts(self) -> list[str]:
        return self.cluster.run(CONTROLLER, "scontrol", "show", "hostnames", self.details("NodeList")).split()

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_so():
            state = self.details("JobState")
            assert state not in ENDED or is_so(), f"{what}: the job is {state} already:\n{self.log}"
            assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_SECONDS:g} s:\n{self.log}"
            time.sleep(0.2)

    def wait(self, lost: str | None = None) -> None:
        """Until it is completed, and nothing is left of it on any host. On a host that was ``lost`` and came back SLURM
        has killed all of it at once: there the next start removes what is left in /tmp."""
        self.wait_until(lambda: self.details("JobState") == "COMPLETED", "the end of the job")
        if lost:
            wait_until(lambda: not self.cluster.processes(lost), f"{lost} is idle", DEADLINE_SECONDS)
            clean_up = "from asa_dist.rollout import ray_hosts; ray_hosts.remove_leftovers()"
            self.cluster.run(lost, "python", "-c", clean_up)
        self.cluster.wait_until_idle()

"""Whole runs to which something happens: a process is killed or stands still, the disk is full, the time is up.

Each of them survives it, or ends with a readable error before its deadline and goes on with `asa resume`.
"""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from asa_dist.launcher import free_port
from asa_dist.runtime.checkpoint_files import list_checkpoints
from tests.real_run import ASA, TINY, Run, Start
from tests.runtime.data.corpora import documents

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

ENDLESS = ["train.steps=1000000", "train.eval_every_steps=1000000"]
TWO_RANKS = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, as the launcher wants it
LEARNING = ["optimizer.lr_psi=1.0e-3", "optimizer.lr_phi=1.0e-3", "optimizer.lr_xi=1.0e-3"]


def wait_for_steps(run: Run, num_steps: int) -> None:
    """So many more."""
    last_step = len(run.steps) + num_steps
    run.wait_until(lambda: len(run.steps) >= last_step)


def stop(run: Run) -> None:
    """As a user does, by Ctrl-C."""
    assert run.process is not None
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.errors


def stand_still(process: psutil.Process, seconds: float) -> None:
    process.suspend()
    time.sleep(seconds)
    process.resume()


def events(run: Run, name: str) -> list[dict[str, Any]]:
    return [row for row in run.rows("events") if row["event"] == name]


def assert_nothing_lost(run: Run) -> None:
    """Each prompt of each step up to the last one was trained on once, in order."""
    ids = [prompt_id for row in run.rows("trained") for prompt_id in row["prompt_ids"]]
    assert ids == list(range(2 * len(run.steps))) and ids


# --- survived -----------------------------------------------------------------------------------------------------
def test_workers_die_and_processes_stand_still(start: Start) -> None:
    """One run, with a bound of 1 on the policy's age."""
    run = start(ASA, *ENDLESS, *LEARNING, "rollout.workers=2", "rollout.max_policy_age=1",
                "rollout.heartbeat_timeout_seconds=4.0")
    wait_for_steps(run, 3)
    killed = run.the("worker")
    killed.kill()
    run.wait_until(lambda: len(events(run, "worker_started")) == 3)
    died, = events(run, "worker_died")
    assert died["worker"] in ("worker-0", "worker-1") and died["reason"]
    for kind in ("rank 0", "rank 1", "coordinator"):
        wait_for_steps(run, 1)
        stand_still(run.the(kind), seconds=5)
    wait_for_steps(run, 5)
    assert len(events(run, "worker_died")) == 1, "who stood still was not the workers"
    hung = run.the("worker")
    hung.suspend()
    run.wait_until(lambda: len(events(run, "worker_died")) == 2)
    assert "no heartbeat" in events(run, "worker_died")[1]["reason"]
    run.wait_until(lambda: not hung.is_running())
    wait_for_steps(run, 5)
    stop(run)
    assert max(step["rollout/policy_age_max"] for step in run.steps) == 1
    assert_nothing_lost(run)


def test_a_full_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The checkpoint fails, training goes on; when there is room again, the next one is written."""
    with run_on_small_disk(tmp_path_factory) as run:
        run.wait_until(lambda: len(events(run, "checkpoint")) == 1)
        fill(run.run_dir / "filler")
        run.wait_until(lambda: "could not be written" in run.errors)
        before = list_checkpoints(run.run_dir)
        seen = len(run.errors)
        run.wait_until(lambda: "could not be written" in run.errors[seen:])
        assert list_checkpoints(run.run_dir) == before, "the one before stands"
        (run.run_dir / "filler").unlink()
        run.wait_until(lambda: list_checkpoints(run.run_dir)[0].step > before[0].step)
        stop(run)
        assert events(run, "checkpoint_failed")[0]["reason"]
        assert_nothing_lost(run)


@contextmanager
def run_on_small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n\n".join(documents(60)), encoding="utf-8")
    run = Run(tmp_path_factory.mktemp("run"))
    run.run_dir.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(run.run_dir)], capture_output=True,
                             text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr}")
    try:
        run.start(*ASA, str(TINY), f"data.sources.0.path={corpus}", *ENDLESS, *LEARNING, "checkpoint.every_steps=5",
                  "--run-dir", str(run.run_dir))
        yield run
    finally:
        run.end()
        subprocess.run(["umount", str(run.run_dir)], check=True)


def fill(path: Path) -> None:
    """Until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


# --- ended readably, and resumed ----------------------------------------------------------------------------------
@pytest.mark.long
def test_a_killed_coordinator_of_a_slow_trainer(start: Start) -> None:
    """Up to five steps are generated ahead, never more. What was trained is saved, though no checkpoint was due."""
    run = start(ASA, *ENDLESS, *LEARNING, "rollout.max_policy_age=4", "train.corpus_rows_per_step=64",
                "rollout.max_new_tokens=2")
    wait_for_steps(run, 20)
    run.the("coordinator").kill()
    assert run.wait() == 1
    assert "Traceback" not in run.errors and "coordinator" in run.errors, run.errors
    assert list_checkpoints(run.run_dir)[0].step == len(run.steps)
    assert f"asa resume {run.run_dir}" in run.errors
    assert max(step["rollout/policy_age_max"] for step in run.steps) <= 4
    assert statistics.mean(step["rollout/policy_age_mean"] for step in run.steps[5:]) >= 1, "it really runs ahead"
    last_step = len(run.steps) + 3
    run.resume(f"train.steps={last_step}")
    assert run.wait() == 0, run.errors
    assert len(run.steps) == last_step
    assert max(step["rollout/policy_age_max"] for step in run.steps) <= 4
    assert_nothing_lost(run)


@pytest.mark.long
def test_a_rank_that_stands_still_for_good(start: Start) -> None:
    run = start(ASA, *ENDLESS, "rollout.timeout_seconds=18", "train.collective_timeout_seconds=20")
    wait_for_steps(run, 2)
    run.the("rank 1").suspend()
    assert run.wait() == 1
    said = next(line for line in run.errors.splitlines() if line.startswith("asa: rank 0 on "))
    assert re.search(r", while \S.*: another rank did not answer for 20 s \(train.collective_timeout_seconds\)", said)
    dumped = (run.run_dir / "stacks/rank-0.txt").read_text(encoding="utf-8")
    assert re.search(r'File ".*asa_dist/runtime/engine.py", line \d+, in ', dumped), "where it waited"
    assert "Thread 0x" in dumped, "all other threads"


# --- started without `asa` ----------------------------------------------------------------------------------------
def test_ended_early_without_asa(start: Start) -> None:
    """By the wall time, then by a signal to one rank: exit code 75 both times, and nothing is lost."""
    launcher = ["deepspeed.launcher.launch", "--world_info", TWO_RANKS, "--master_addr", "127.0.0.1",
                "--master_port", str(free_port()), "--module", "asa_dist.train"]
    run = start(launcher, *ENDLESS, *LEARNING, "train.max_wall_time_minutes=0.3")
    assert run.wait() == 75, run.errors
    first = list_checkpoints(run.run_dir)[0].step
    assert first == len(run.steps)
    assert "max_wall_time_minutes" in events(run, "stopped")[0]["reason"]
    unlimited = ["train.max_wall_time_minutes=null", "--run-dir", str(run.run_dir), "--resume"]
    run.start(*launcher, str(run.run_dir / "config.yaml"), *unlimited)
    run.wait_until(lambda: len(run.steps) >= first + 3)
    run.the("rank 1").send_signal(signal.SIGUSR1)
    assert run.wait() == 75, run.errors
    assert events(run, "resumed")[0]["step"] == first
    assert list_checkpoints(run.run_dir)[0].step == len(run.steps)
    assert_nothing_lost(run)

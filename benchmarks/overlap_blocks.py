"""Blocks of steps of a real run, each at one `max_policy_age`: what a step takes, and which process works how long."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import psutil
from live_run import HANG_SECONDS, ROOT, Hang, LiveRun, Progress, VisibleRun, kind_of

CONFIG = ROOT / "configs/quickstart.yaml"
SETTINGS = (
    "seed=0", "train.ranks=1", "optimizer.lr_psi=0.0", "optimizer.lr_phi=0.0", "optimizer.lr_xi=0.0",
    "data.max_documents=2000", "data.sequence_length=256",
    "rollout.max_new_tokens=224",  # few and long: decoding is slow, training on them is not
    "rollout.prompts_per_step=2", "rollout.responses_per_prompt=3", "evaluator.max_warmup_steps=0",
    "rollout.heartbeat_timeout_seconds=300", "rollout.lease_timeout_seconds=300",  # worker and trainer stand still
    "train.eval_every_steps=1000000", "checkpoint.every_steps=1000000", "metrics.samples_every_steps=1000000",
)
SPARE_STEPS = 8  # trained while processes are looked for, and after the last one that counts
IDLE_SECONDS, IDLE_SHARE = 2.0, 0.06  # a worker that computes less for so long has made all rollouts
FIRST_ROWS = 11  # of the corpus per step: what calibrating found on 2 cores of an AMD EPYC, and where it begins
TRAINER_CORE, WORKER_CORE = 0, 1  # of rank 0; of the worker, and of all else that belongs to the run


Tried = dict[int, tuple[float, float]]  # corpus rows per step → seconds of (train, rollout)


@dataclass(frozen=True)
class Block:
    """Per step of a block; seconds are means.

    Args:
        wall_seconds: from one step of trained.jsonl to the next, seen from outside.
        wait_seconds: of the trainer, for rollouts.
        core_seconds: of each kind of process: "rank 0", "worker", "coordinator", "others".
        train_alone_seconds: of :func:`train_alone_seconds` in the same round; None: not measured.
    """

    age: int
    num_steps: int
    wall_seconds: float
    wait_seconds: float
    publish_seconds: float
    policy_age: float
    core_seconds: dict[str, float]
    train_alone_seconds: float | None = None

    @property
    def busy_seconds(self) -> float:
        """What the trainer does but wait. At age 0 nothing is generated meanwhile, but each step begins cold."""
        return self.wall_seconds - self.wait_seconds


def train_and_rollout_seconds(synchronous: Block) -> tuple[float, float]:
    """Each alone. The rollout is the wait at age 0, when the trainer has nothing else to do.

    That is a little less than it takes: it begins when the weights are published, some milliseconds before the trainer
    asks for it.
    """
    train = synchronous.train_alone_seconds
    return synchronous.busy_seconds if train is None else train, synchronous.wait_seconds


def pin(run: VisibleRun) -> dict[str, list[psutil.Process]]:
    """The trainer to one core, everything else of the run to the other; the processes by kind.

    All threads there are; later ones, and later processes of Ray, inherit it.
    """
    found: dict[str, list[psutil.Process]] = {}
    for process in run.processes():
        kind = kind_of(process)
        found.setdefault(kind if kind in ("rank 0", "worker", "coordinator") else "others", []).append(process)
        with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has ended
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {TRAINER_CORE if kind == "rank 0" else WORKER_CORE})
    return found


def core_seconds(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
    """So far, of those that have not ended."""
    spent = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            spent[process] = times.user + times.system
    return spent


def run_block(run: LiveRun, command: Sequence[str], age: int, num_steps: int, warm_steps: int) -> Block:
    """Trains so many more steps, after some to get warm; the last ones, with less to generate, do not count either.

    Args:
        command: `train …` or `resume …`, without age and number of steps.

    Raises:
        Hang: the run does not get there.
    """
    begun = run.last_step
    enough = warm_steps + num_steps + SPARE_STEPS + age
    run.start(*command, f"rollout.max_policy_age={age}", f"train.steps={begun + enough}")
    run.wait_until(lambda: run.last_step > begun, "the first step")
    processes = pin(run)
    everyone = [*chain.from_iterable(processes.values())]
    first = max(begun + warm_steps, run.last_step + 1)  # it has gone on meanwhile
    last = first + num_steps
    run.wait_until(lambda: run.last_step >= first, f"step {first}")
    started, spent_before = time.monotonic(), core_seconds(everyone)
    if not run.wait_until(lambda: run.last_step >= last, f"step {last}"):
        raise Hang(f"ended before step {last}:\n{run.last_words()}")
    seconds, spent = time.monotonic() - started, core_seconds(everyone)
    if run.wait() != 0:
        raise Hang(f"the run failed:\n{run.last_words()}")
    steps = [step for step in run.steps if first < step["step"] <= last]

    def mean(key: str) -> float:
        return round(statistics.fmean(step[key] for step in steps), 5)

    return Block(
        age, num_steps, round(seconds / num_steps, 5), mean("time/wait_rollout_seconds"), mean("time/publish_seconds"),
        mean("rollout/policy_age_mean"),
        {kind: round(sum(spent[one] - spent_before[one] for one in of_kind if one in spent) / num_steps, 4)
         for kind, of_kind in sorted(processes.items())})


def train_alone_seconds(run: LiveRun, command: Sequence[str], num_steps: int) -> float:
    """Per step, with all rollouts at hand: the trainer stands still until the worker has made them, then the worker.

    Raises:
        Hang: the run does not get there.
    """
    begun, enough = run.last_step, num_steps + SPARE_STEPS  # all rollouts are asked for at once
    run.start(*command, f"rollout.max_policy_age={enough}", f"train.steps={begun + enough}")
    run.wait_until(lambda: run.last_step > begun, "the first step")
    processes = pin(run)
    rank, worker = processes["rank 0"][0], processes["worker"][0]
    rank.suspend()
    wait_until_idle(worker)
    worker.suspend()
    rank.resume()
    first = run.last_step + 2  # the next one has stood still
    run.wait_until(lambda: run.last_step >= first, f"step {first}")
    started = time.monotonic()
    if not run.wait_until(lambda: run.last_step >= first + num_steps, f"step {first + num_steps}"):
        raise Hang(f"ended before step {first + num_steps}:\n{run.last_words()}")
    seconds = time.monotonic() - started
    worker.resume()
    if run.wait() != 0:
        raise Hang(f"the run failed:\n{run.last_words()}")
    return round(seconds / num_steps, 5)


def wait_until_idle(process: psutil.Process) -> None:
    """Until it computes next to nothing for a while.

    Raises:
        Hang: it goes on computing.
    """
    deadline = time.monotonic() + HANG_SECONDS
    spent = sum(process.cpu_times()[:2])
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < IDLE_SECONDS:
        time.sleep(0.5)
        before, spent = spent, sum(process.cpu_times()[:2])
        if spent - before > IDLE_SHARE * 0.5:
            idle_since = time.monotonic()
        if time.monotonic() > deadline:
            raise Hang(f"process {process.pid} still computes after {HANG_SECONDS:g} s")


def train_command(run: LiveRun, rows: int, overrides: Sequence[str]) -> list[str]:
    settings = [*SETTINGS, f"train.corpus_rows_per_step={rows}", *overrides]
    return ["train", str(CONFIG), *settings, "--run-dir", str(run.run_dir)]


def calibrate(most_runs: int, num_steps: int, warm_steps: int, overrides: Sequence[str], progress: Progress) -> Tried:
    """Approaches the corpus rows with which training takes as long as the rollout."""
    tried: Tried = {}
    rows = FIRST_ROWS
    while rows not in tried and len(tried) < most_runs:
        with tempfile.TemporaryDirectory(prefix="asa-overlap-") as folder, LiveRun(Path(folder)) as run:
            found = run_block(run, train_command(run, rows, overrides), 0, num_steps, warm_steps)
            alone = train_alone_seconds(run, ["resume", str(run.run_dir)], num_steps)
        train, rollout = tried[rows] = train_and_rollout_seconds(replace(found, train_alone_seconds=alone))
        progress.say(f"calibrating: {rows} corpus rows: train {train:.3f} s, rollout {rollout:.3f} s")
        rows = balanced_rows(tried)
    return tried


def most_balanced(tried: Tried) -> int:
    return min(tried, key=lambda rows: abs(tried[rows][0] - tried[rows][1]))


def balanced_rows(tried: Tried) -> int:
    """Where training would take as long as the rollout, by what was tried."""
    trains, rollout = [train for train, _ in tried.values()], statistics.fmean(rollout for _, rollout in tried.values())
    if len(tried) > 1:
        slope, offset = statistics.linear_regression([*tried], trains)
        if slope > 0:  # else the machine was slower with fewer rows
            return max(1, round((rollout - offset) / slope))
    rows = [*tried][-1]
    return max(1, round(rows * rollout / trains[-1]))

"""Kills processes of a real run at random, restarts it as a user's script would, and counts its prompts at the end.

    python benchmarks/chaos.py --minutes 10 --seed 0                  for ten minutes
    python benchmarks/chaos.py --minutes 60 --seed 1 --kills 20       20 kills, within an hour
    python benchmarks/chaos.py --minutes 10 --seed 0 --kills 5 --kind worker \\
        rollout.max_policy_age=0 data.sequence_length=128 rollout.max_new_tokens=100
                                                                      what a worker's death costs the trainer

One JSON line on stdout. Exit code 0 only if the last step was reached with no prompt lost and none repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from live_run import ROOT, Hang, LiveRun, Progress, when_and_where

CONFIG = ROOT / "tests/tiny.yaml"
SETTINGS = (  # it learns, writes checkpoints often, and reads text that is on every machine
    "data.sources.0.kind=python_docs", "data.max_documents=300",
    "optimizer.lr_psi=1.0e-3", "optimizer.lr_phi=1.0e-3", "optimizer.lr_xi=1.0e-3", "optimizer.schedule=constant",
    "rollout.workers=2", "rollout.max_policy_age=1", "checkpoint.every_steps=10",
    "train.steps=1000000", "train.eval_every_steps=1000000", "metrics.samples_every_steps=1000000",
)
KINDS = ("rank 0", "rank 1", "coordinator", "worker", "launcher", "raylet", "gcs", "asa")
PAUSED_KINDS = ("rank 0", "rank 1", "coordinator", "worker")
PAUSES_PER_KILL = 0.25
PAUSE_SECONDS = 10.0  # within every deadline of the run: it must survive
MAX_STEPS_BETWEEN_KILLS = 30
MAX_DELAY_SECONDS = 1.0  # after that step: a kill can come anywhere within one
STEPS_WATCHED = 15  # after a worker's death
STEPS_AT_THE_END = 10  # after the last kill


@dataclass
class WorkerDeath:
    """What the trainer noticed of it, in seconds."""

    detection_seconds: float  # until the supervisor said so
    pause_seconds: float  # the longest step after it, beyond the median step before it
    wait_rollout_seconds: float  # median before it: at rollout.max_policy_age=0 one engine call


@dataclass
class Tally:
    """What was done to the run."""

    kills: Counter[str] = field(default_factory=Counter)
    pauses: Counter[str] = field(default_factory=Counter)  # SIGSTOP, later SIGCONT
    restarts: int = 0
    unexpected_ends: int = 0  # of a run from which nothing had been killed but workers, or of a worker that stood still
    steps_redone: int = 0
    worker_deaths: list[WorkerDeath] = field(default_factory=list)


class Chaos:
    """Keeps one run going, and kills parts of it."""

    def __init__(self, run: LiveRun, rng: random.Random, kinds: Sequence[str], progress: Progress) -> None:
        self.tally = Tally()
        self._run, self._rng, self._kinds, self._progress = run, rng, kinds, progress
        self._num_starts = 1  # that the run has told of
        self._reached = 0  # steps, before the start that it has not told of yet

    def kill_one(self) -> None:
        """At a random place: at once, even while the run is starting, or some steps later. The run then goes on."""
        run, rng = self._run, self._rng
        if rng.random() < PAUSES_PER_KILL:
            self._pause(rng.choice(PAUSED_KINDS))
        kind = rng.choice(self._kinds)
        step = run.last_step + rng.randint(0, MAX_STEPS_BETWEEN_KILLS)
        delay_seconds = rng.uniform(0, MAX_DELAY_SECONDS)
        run.wait_until(lambda: run.last_step >= step and bool(run.of_kind(kind)), f"step {step} and a process: {kind}")
        time.sleep(delay_seconds)
        is_killed = self._kill(kind)
        survives = kind == "worker" or not is_killed
        if is_killed and survives:
            self._watch_survival()
        if run.has_ended and survives:
            self.tally.unexpected_ends += 1
            self._progress.say(f"an unexpected end; the run printed:\n{run.last_words()}")
        if run.has_ended or not survives:
            self._resume()

    def _pause(self, kind: str) -> None:
        """Stops one of that kind for a while; the run goes on afterwards."""
        run = self._run
        run.wait_until(lambda: bool(run.of_kind(kind)), f"a process: {kind}")
        step, num_deaths, (victim, *_) = run.last_step, self._num_deaths(), run.of_kind(kind)
        victim.suspend()
        time.sleep(PAUSE_SECONDS)
        victim.resume()
        self.tally.pauses[kind] += 1
        run.wait_until(lambda: run.last_step > step + 1, f"steps after a pause of {kind}")
        self._progress.say(f"{kind} stood still for {PAUSE_SECONDS:g} s")
        if run.has_ended or self._num_deaths() > num_deaths:
            self.tally.unexpected_ends += 1
            self._progress.say(f"it was not survived; the run printed:\n{run.last_words()}")
        if run.has_ended:
            self._resume()

    def _kill(self, kind: str) -> bool:
        """One of that kind; False: there is none any more."""
        victims = self._run.of_kind(kind)
        try:
            self._rng.choice(victims).kill()
        except (IndexError, psutil.NoSuchProcess):
            return False
        self.tally.kills[kind] += 1
        self._progress.say(f"kill {self.tally.kills.total()}: {kind}, after step {self._run.last_step}")
        return True

    def finish(self) -> bool:
        """Stops the run as a user would, resumes it with an end in sight; whether it got there."""
        run = self._run
        step = run.last_step
        run.wait_until(lambda: run.last_step > step, "a step after the last kill")
        run.send(signal.SIGINT)
        last_step = self._resume(num_more_steps=STEPS_AT_THE_END)
        code = run.wait()
        self._count_redone()
        self._progress.say(f"exit code {code} after step {run.last_step} of {last_step}")
        return code == 0 and run.last_step == last_step

    def _resume(self, num_more_steps: int | None = None) -> int:
        """When the run has ended; returns the step to end with, 0 if there is none."""
        run = self._run
        code = run.wait()
        self._count_redone()
        self._reached = run.last_step
        last_step = self._reached + num_more_steps if num_more_steps else 0
        run.start("resume", str(run.run_dir), *([f"train.steps={last_step}"] if last_step else []))
        self.tally.restarts += 1
        self._progress.say(f"exit code {code} after step {self._reached}; resuming")
        return last_step

    def _count_redone(self) -> None:
        """Once the run has told where its newest start went on from."""
        starts = [row["step"] for row in self._run.rows("events") if row["event"] in ("started", "resumed")]
        if len(starts) > self._num_starts:
            self.tally.steps_redone += self._reached - starts[-1]
            self._num_starts = len(starts)

    def _watch_survival(self) -> None:
        """Of a worker's death, until the run has made a few more steps."""
        run = self._run
        killed_seconds, step, num_deaths = time.monotonic(), run.last_step, self._num_deaths()
        before = run.steps
        run.wait_until(lambda: self._num_deaths() > num_deaths, "the event worker_died")
        detection_seconds = time.monotonic() - killed_seconds
        run.wait_until(lambda: run.last_step >= step + STEPS_WATCHED, "steps after a worker's death")
        after = [row["time/step_seconds"] for row in run.steps if row["step"] > step]
        if not run.has_ended and len(before) >= STEPS_WATCHED:  # else there is nothing to compare with
            pause_seconds = max(after) - statistics.median(row["time/step_seconds"] for row in before)
            wait_seconds = statistics.median(row["time/wait_rollout_seconds"] for row in before)
            figures = (detection_seconds, pause_seconds, wait_seconds)
            self.tally.worker_deaths.append(WorkerDeath(*(round(seconds, 3) for seconds in figures)))

    def _num_deaths(self) -> int:
        return sum(row["event"] == "worker_died" for row in self._run.rows("events"))


def count_prompts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of trained.jsonl: P prompts per step, numbered from 0; each is to be trained on exactly once."""
    times = Counter(prompt_id for row in rows for prompt_id in row["prompt_ids"])
    num_prompts = sum(len(row["prompt_ids"]) for row in rows if row["step"] == 1) * max(row["step"] for row in rows)
    return {"lost": sum(times[prompt_id] == 0 for prompt_id in range(num_prompts)),
            "repeated": sum(count > 1 for count in times.values())}


def inspected(run_dir: Path) -> dict[str, int]:
    """The same, by `asa inspect`."""
    command = [sys.executable, "-m", "asa_dist.cli", "inspect", str(run_dir), "--json"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    return {name: len(found["ledger"][name]) for name in ("lost", "repeated")}


def torture(run: LiveRun, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """The whole experiment; what to report."""
    chaos = Chaos(run, random.Random(options.seed), options.kind or KINDS, progress)
    run.start("train", str(CONFIG), *SETTINGS, *options.overrides, "--run-dir", str(run.run_dir))
    is_there, problem = False, ""
    try:
        run.wait_until(lambda: run.last_step > 0, "the first step")
        while progress.seconds < 60 * options.minutes and chaos.tally.kills.total() < options.kills:
            chaos.kill_one()
            done = max(chaos.tally.kills.total() / options.kills, progress.seconds / (60 * options.minutes))
            left_minutes = progress.seconds / 60 * (1 - done) / done
            progress.say(f"{run.last_step} steps, {chaos.tally.kills.total()} kills; {left_minutes:.1f} minutes left")
        is_there = chaos.finish()
    except Hang as hang:
        problem = str(hang)
    prompts = count_prompts(rows) if (rows := run.rows("trained")) else {"lost": 0, "repeated": 0}
    if prompts != (found := inspected(run.run_dir)):
        problem += f"asa inspect counts {found}"
    return {
        "benchmark": "chaos", "seed": options.seed,
        "ok": is_there and not problem and not any(prompts.values()) and not chaos.tally.unexpected_ends,
        "minutes": round(progress.seconds / 60, 1), "kills": chaos.tally.kills.total(), "steps": run.last_step,
        "prompts": prompts, "problem": problem, "overrides": options.overrides,
        **{name: value for name, value in asdict(chaos.tally).items() if name not in ("kills", "pauses")},
        "kills_by_kind": dict(chaos.tally.kills), "pauses_by_kind": dict(chaos.tally.pauses), **when_and_where(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the run's config")
    parser.add_argument("--minutes", type=float, required=True, help="go on killing for so long")
    parser.add_argument("--seed", type=int, required=True, help="of what is killed when")
    parser.add_argument("--kills", type=float, default=float("inf"), metavar="N", help="at most so many")
    parser.add_argument("--kind", action="append", choices=KINDS, help="kill these only; may be given several times")
    return parser.parse_intermixed_args()


def main() -> int:
    options, progress = parse_arguments(), Progress()
    folder = Path(tempfile.mkdtemp(prefix="asa-chaos-"))
    with LiveRun(folder) as run:
        result = torture(run, options, progress)
    if result["ok"]:
        shutil.rmtree(folder)
    else:
        progress.say(f"kept: {folder}")
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

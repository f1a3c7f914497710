"""Is `asa plan CONFIG --machine this` right? What it says of three configs, beside real runs and real engines.

    python benchmarks/planner.py --out benchmarks/results/planner.json     three configs, three rounds
    python benchmarks/planner.py --short                                   one round; within 5 minutes
    python benchmarks/planner.py --smoke                                   one config, few steps

A round takes every config in turn: `asa plan` measures the machine and says what a step will take, then `asa train`
trains, so that a machine that gets slower meanwhile slows both. The step is the mean of `time/step_seconds` after the
first steps, error |planned / measured − 1| of the medians over rounds. Everything is kept to two cores. Beside it the
bytes that each part of a rank holds (`planner_bytes.py`), once per config: they do not depend on time.

The plan has seen none of these configs: it rehearses one and three layers of whatever it is given, they have more.
One JSON line on stdout. Promise: the step within 25 %, the bytes of every part that is compared within 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live_run import HANG_SECONDS, ROOT, Hang, LiveRun, Progress
from results import Ratio, add_sizes, make_result, write_result

TARGET_STEP, TARGET_BYTES = 0.25, 0.10
CONFIG = ROOT / "configs/quickstart.yaml"
CORES = 2
NEVER = 1_000_000
MEASURED_ONLY = (  # of a run that is measured; none changes what a step is
    "seed=0", "data.max_documents=2000", f"train.eval_every_steps={NEVER}", f"checkpoint.every_steps={NEVER}",
    f"metrics.samples_every_steps={NEVER}",
)
CASES: dict[str, tuple[str, ...]] = {  # overrides of the quickstart's config
    "quickstart": (),
    "wide, ZeRO-1, age 0": (
        "model.architecture.hidden_size=320", "model.architecture.num_layers=4", "data.sequence_length=256",
        "data.tokenizer.train.vocab_size=1024", "train.zero_stage=1", "train.corpus_rows_per_step=4",
        "rollout.max_policy_age=0", "rollout.max_new_tokens=32"),
    "deep, 1 rank": (
        "model.architecture.hidden_size=128", "model.architecture.num_layers=10", "train.ranks=1",
        "train.accumulation_steps=2", "rollout.responses_per_prompt=4"),
}
PARTS = {  # of a step: as a plan calls them, as a run does
    "compute": (("compute", "optimizer"), ("time/compute_seconds", "time/data_seconds")),
    "collectives": (("exposed_collectives",), ("time/collective_seconds",)),
    "publish": (("publish",), ("time/publish_seconds",)),
    "waiting": (("waiting",), ("time/wait_rollout_seconds",)),
    "step": (("step",), ("time/step_seconds",)),
}
Seconds = dict[str, float]  # of a step, by PARTS


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        steps: of a run, that count.
        warm_steps: of a run, before them.
        overrides: of every config.
    """

    cases: tuple[str, ...]
    rounds: int
    steps: int
    warm_steps: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "full": Size((*CASES,), 3, 48, 12),
    "short": Size((*CASES,), 1, 24, 8),
    "smoke": Size(("quickstart",), 1, 4, 2, (
        "data.max_documents=200", "model.architecture.hidden_size=64", "data.sequence_length=64")),
}


@dataclass(frozen=True)
class Turn:
    """One plan and the run after it, in seconds per step."""

    planned: Seconds
    measured: Seconds
    figures: dict[str, float]  # of the machine, as the plan found it

    @property
    def ratio(self) -> float:
        return self.planned["step"] / self.measured["step"]


@dataclass(frozen=True)
class Bytes:
    """Of rank 0, by part."""

    planned: dict[str, float]
    measured: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """planned / measured − 1; a part that neither has, has none."""
        return {part: self.planned[part] / measured - 1 for part, measured in self.measured.items() if measured}


def overrides_of(case: str, size: Size) -> list[str]:
    return [*CASES[case], *MEASURED_ONLY, *size.overrides, f"train.steps={size.warm_steps + size.steps + 2}"]


def plan(case: str, size: Size) -> dict[str, Any]:
    """What `asa plan` prints.

    Raises:
        Hang: it could not plan, or the config does not fit here.
    """
    command = [sys.executable, "-m", "asa_dist.cli", "plan", str(CONFIG), *overrides_of(case, size),
               "--machine", "this", "--json"]
    said = subprocess.run(  # a session of its own, as a run has: the kernel shares cores by session
        command, cwd=ROOT, capture_output=True, text=True, check=False, start_new_session=True,
        timeout=HANG_SECONDS)
    if said.returncode:
        raise Hang(f"asa plan, {case}: exit code {said.returncode}\n{said.stdout[-1000:]}{said.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def planned_seconds(found: Mapping[str, Any]) -> Seconds:
    seconds = found["chosen"]["seconds"]
    return {part: round(sum(seconds[name] for name in names), 5) for part, (names, _) in PARTS.items()}


def run(case: str, size: Size) -> Seconds:
    """Means over the steps that count; the last two have less to wait for.

    Raises:
        Hang: the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="asa-planner-") as folder, LiveRun(Path(folder)) as live:
        live.start("train", str(CONFIG), *overrides_of(case, size), "--run-dir", str(live.run_dir))
        if live.wait() != 0:
            raise Hang(f"the run of {case} failed:\n{live.last_words()}")
        rows = [row for row in live.steps if size.warm_steps < row["step"] <= size.warm_steps + size.steps]
    return measured_seconds(rows)


def measured_seconds(rows: Sequence[Mapping[str, float]]) -> Seconds:
    return {part: round(statistics.fmean(sum(row.get(key, 0.0) for key in keys) for row in rows), 5)
            for part, (_, keys) in PARTS.items()}


def measure(size: Size, progress: Progress) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {case: [] for case in size.cases}
    started = progress.seconds
    for number in range(size.rounds):
        for index, case in enumerate(size.cases):
            found = plan(case, size)
            turns[case].append(Turn(planned_seconds(found), run(case, size), found["machine"]["measured"]))
            turn, done = turns[case][-1], number * len(size.cases) + index + 1
            left_minutes = (progress.seconds - started) / done * (size.rounds * len(size.cases) - done) / 60
            progress.say(f"{case}: planned {turn.planned['step']:.3f} s, measured {turn.measured['step']:.3f} s per "
                         f"step; about {left_minutes:.0f} minutes left")
    return turns


def ratios_of(turns: Mapping[str, Sequence[Turn]], held: Mapping[str, Bytes]) -> list[Ratio]:
    found = []
    for case, of_case in turns.items():
        ratios = [turn.ratio for turn in of_case]
        errors = sorted(abs(ratio - 1) for ratio in ratios)
        middle = statistics.median(ratios)
        found.append(_ratio(f"error of step time, {case}", abs(middle - 1), "measured step", TARGET_STEP,
                            why_step(of_case), lowest=round(errors[0], 3), highest=round(errors[-1], 3)))
    for case, of_rank in held.items():
        part, error = max(of_rank.errors.items(), key=lambda item: abs(item[1]))
        why = f"{part}: planned {of_rank.planned[part]:,.0f}, held {of_rank.measured[part]:,.0f} bytes"
        found.append(_ratio(f"error of bytes, {case}", abs(error), "bytes held", TARGET_BYTES, why))
    return found


def _ratio(name: str, value: float, baseline: str, target: float, why: str, **keywords: Any) -> Ratio:
    value = round(value, 3)
    return Ratio(name, value, baseline, target=target, limit=0.0, why="" if value <= target else why, **keywords)


def why_step(turns: Sequence[Turn]) -> str:
    """Part by part, the one that is furthest off first."""
    medians = {part: (statistics.median(turn.planned[part] for turn in turns),
                      statistics.median(turn.measured[part] for turn in turns)) for part in PARTS}
    worst_first = sorted(medians, key=lambda part: -abs(medians[part][0] - medians[part][1]))
    return "planned (measured) seconds: " + ", ".join(
        f"{part} {medians[part][0]:.3f} ({medians[part][1]:.3f})" for part in worst_first)


def measurements(turns: Mapping[str, Sequence[Turn]], held: Mapping[str, Bytes]) -> dict[str, Any]:
    return {
        "turns": {case: [{"planned_seconds": turn.planned, "measured_seconds": turn.measured,
                          "planned_of_measured": round(turn.ratio, 3), "machine": turn.figures} for turn in of_case]
                  for case, of_case in turns.items()},
        "bytes": {case: {"planned": of_rank.planned, "held": of_rank.measured,
                         "planned_of_held_minus_1": {part: round(error, 4) for part, error in of_rank.errors.items()}}
                  for case, of_rank in held.items()},
    }


def settings(size: Size) -> dict[str, Any]:
    return {"config": CONFIG.name, "overrides": {case: overrides_of(case, size) for case in size.cases},
            "steps": size.steps, "warm_steps": size.warm_steps, "rounds": size.rounds, "cores": CORES}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < CORES:
        sys.exit(f"planner: needs {CORES} cores")
    os.sched_setaffinity(0, set(cores[:CORES]))  # what it starts inherits it
    from planner_bytes import measure_bytes

    progress, size = Progress(), SIZES[options.size]
    held = {case: Bytes(*measure_bytes(CONFIG, overrides_of(case, size))) for case in size.cases}
    progress.say("bytes by part: done")
    turns = measure(size, progress)
    return write_result(make_result("planner", options.size, ratios_of(turns, held), settings(size),
                                    measurements(turns, held)), options.out)


if __name__ == "__main__":
    sys.exit(main())

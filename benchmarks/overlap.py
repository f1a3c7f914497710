"""Does generating hide behind training? A step at each `max_policy_age`, beside the longer of the two alone.

    python benchmarks/overlap.py --out benchmarks/results/overlap.json     ages 0, 1, 2, 4, 8
    python benchmarks/overlap.py --short                                   ages 0 and 1, not calibrated
    python benchmarks/overlap.py --learning --work runs/overlap --out benchmarks/results/overlap_learning.json
                                                                           what is learnt: overlap_learning.py; hours

One trainer rank on one core; on another one the rollout worker, and everything else of the run: Ray, the coordinator,
the launcher. Both have as much to do: with the full size corpus rows per step are calibrated first, unless given. Then
one run goes through blocks of steps, each a fresh start of `asa resume`, and the ages take turns, so that a machine
that gets slower meanwhile slows all alike. Learning rates are 0: responses stay as long as they were.

Alone: training with all rollouts at hand, while the worker stands still (once a round); the rollout is what the trainer
waits for at age 0, when it has nothing else to do.

One JSON line on stdout. Promise: at age 1 a step takes at most 1.10 of the longer of the two, of which the shorter one
is at least 0.85.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from live_run import LiveRun, Progress
from overlap_blocks import (
    CONFIG,
    FIRST_ROWS,
    SETTINGS,
    TRAINER_CORE,
    WORKER_CORE,
    Block,
    Tried,
    calibrate,
    most_balanced,
    run_block,
    train_alone_seconds,
    train_and_rollout_seconds,
    train_command,
)
from results import Ratio, add_sizes, make_result, write_result

TARGET_RATIO, PROMISED_AGE = 1.10, 1
TARGET_BALANCE = 0.85
BASELINE = "max(train, rollout), each alone"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        rounds: blocks of every age.
        steps: of a block, that count.
        warm_steps: of a block, before them.
        calibrations: runs to find the corpus rows with; 0: none, they are what calibrating would begin with.
        overrides: of the run's config.
    """

    ages: tuple[int, ...]
    rounds: int
    steps: int
    warm_steps: int
    calibrations: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "full": Size((0, 1, 2, 4, 8), 5, 24, 4, 4),
    "short": Size((0, 1), 2, 16, 4, 0),
    "smoke": Size((0, 1), 1, 2, 1, 0, ("data.max_documents=200", "rollout.max_new_tokens=32")),
}
Round = dict[int, Block]  # by age


def measure(size: Size, rows: int, overrides: Sequence[str], progress: Progress) -> list[Round]:
    """All blocks of one run; every other round backwards."""
    rounds: list[Round] = []
    started = progress.seconds
    with tempfile.TemporaryDirectory(prefix="asa-overlap-") as folder, LiveRun(Path(folder)) as run:
        command = train_command(run, rows, overrides)
        for number in range(size.rounds):
            rounds.append({})
            for age in size.ages if number % 2 == 0 else size.ages[::-1]:
                block = rounds[-1][age] = run_block(run, command, age, size.steps, size.warm_steps)
                command = ["resume", str(run.run_dir)]
                done, all_blocks = sum(map(len, rounds)), size.rounds * len(size.ages)
                left_minutes = (progress.seconds - started) / done * (all_blocks - done) / 60
                progress.say(f"age {age}: {block.wall_seconds:.3f} s per step, waits {block.wait_seconds:.3f} s of it; "
                             f"about {left_minutes:.0f} minutes left")
            train = train_alone_seconds(run, command, size.steps)
            rounds[-1][0] = replace(rounds[-1][0], train_alone_seconds=train)
            progress.say(f"training alone: {train:.3f} s per step")
    return rounds


def ratios_of(rounds: Sequence[Round]) -> list[Ratio]:
    """Medians over the rounds, in each of which the ages took turns."""
    alone = [train_and_rollout_seconds(of_round[0]) for of_round in rounds]
    train, rollout = (statistics.median(seconds) for seconds in zip(*alone, strict=True))
    found = [_ratio("balance", [min(both) / max(both) for both in alone], "the longer of train and rollout",
                    better="higher", target=TARGET_BALANCE, limit=1.0,
                    why=f"train {train:.3f} s, rollout {rollout:.3f} s: choose --rows")]
    for age in rounds[0]:
        walls = [of_round[age].wall_seconds for of_round in rounds]
        mean_age = statistics.median(of_round[age].policy_age for of_round in rounds)
        found.append(_ratio(
            f"age {age}", [wall / max(both) for wall, both in zip(walls, alone, strict=True)], BASELINE,
            target=TARGET_RATIO if age == PROMISED_AGE else None, limit=1.0 if age else None,
            why=where_it_goes(rounds, age) if age == PROMISED_AGE else f"mean age {mean_age:.2f}"))
        if age:
            found.append(_ratio(
                f"age {age}, against taking turns",
                [wall / of_round[0].wall_seconds for wall, of_round in zip(walls, rounds, strict=True)],
                "a step at age 0", limit=round(max(train, rollout) / (train + rollout), 3)))
    return found


def _ratio(name: str, values: Sequence[float], baseline: str, why: str = "", **keywords: Any) -> Ratio:
    ratio = Ratio(name, round(statistics.median(values), 3), baseline, lowest=round(min(values), 3),
                  highest=round(max(values), 3), **keywords)
    return ratio if ratio.is_met else replace(ratio, why=why)


def where_it_goes(rounds: Sequence[Round], age: int) -> str:
    """What a step costs more than at age 0, by process: each core has room for as much as a step is long."""
    def median(of_age: int, kind: str) -> float:
        return statistics.median(of_round[of_age].core_seconds.get(kind, 0.0) for of_round in rounds)

    parts = [f"{kind} {median(age, kind):.3f} ({median(0, kind):.3f})" for kind in rounds[0][age].core_seconds]
    wait = statistics.median(of_round[age].wait_seconds for of_round in rounds)
    return (f"seconds of a core per step, at age {age} (at age 0): {', '.join(parts)}; the trainer has core "
            f"{TRAINER_CORE}, all others share core {WORKER_CORE}; it waits {wait:.3f} s per step")


def measurements(rounds: Sequence[Round], tried: Tried) -> dict[str, Any]:
    alone = [train_and_rollout_seconds(of_round[0]) for of_round in rounds]
    return {
        "alone_seconds": {"train": [round(train, 5) for train, _ in alone],
                          "rollout": [round(rollout, 5) for _, rollout in alone]},
        "calibration": {rows: {"train_seconds": train, "rollout_seconds": rollout}
                        for rows, (train, rollout) in tried.items()},
        "blocks": [[asdict(block) for block in of_round.values()] for of_round in rounds],
    }


def settings(size: Size, rows: int, overrides: Sequence[str]) -> Mapping[str, Any]:
    return {"config": CONFIG.name, "overrides": [*SETTINGS, f"train.corpus_rows_per_step={rows}", *overrides],
            "steps_per_block": size.steps, "warm_steps": size.warm_steps, "trainer_core": TRAINER_CORE,
            "core_of_the_rest": WORKER_CORE}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the run's config")
    parser.add_argument("--rows", type=int, help=f"corpus rows per step; default: calibrated, or {FIRST_ROWS}")
    parser.add_argument("--learning", action="store_true", help="instead: truth by step and by second; full size only")
    parser.add_argument("--seeds", type=int, choices=range(1, 4), default=3, help="with --learning; default 3")
    parser.add_argument("--work", type=Path, help="with --learning: folder for runs; finished ones are not repeated")
    add_sizes(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.learning and (options.size != "full" or options.rows is not None):
        parser.error("--learning has one size, and its own corpus rows")
    if (options.work is not None or options.seeds != 3) and not options.learning:
        parser.error("--work, --seeds: only with --learning")
    return options


def main() -> int:
    options = parse_arguments()
    if (os.cpu_count() or 1) < 2:
        sys.exit("overlap: needs two cores")
    if options.learning:
        from overlap_learning import learn

        return learn(options.work, options.seeds, options.overrides, options.out)
    progress, size = Progress(), SIZES[options.size]
    overrides = (*size.overrides, *options.overrides)
    rows, tried = options.rows or FIRST_ROWS, {}
    if options.rows is None and size.calibrations:
        tried = calibrate(size.calibrations, size.steps, size.warm_steps, overrides, progress)
        rows = most_balanced(tried)
    rounds = measure(size, rows, overrides, progress)
    return write_result(make_result("overlap", options.size, ratios_of(rounds), settings(size, rows, overrides),
                                    measurements(rounds, tried)), options.out)


if __name__ == "__main__":
    sys.exit(main())

"""Does UDASA make a model more truthful, and is it the curriculum? Arms of one method, on a world whose truth is known.

    python benchmarks/udasa.py --out benchmarks/udasa.json      every arm, 3 seeds; a quarter of an hour
    python benchmarks/udasa.py --short                          start and curriculum, one seed; within 4 minutes
    python benchmarks/udasa.py --work runs/udasa-benchmark      keeps the runs, and goes on with what is there

A start model is trained on the world of world.py, whose corpus also asks whether answers are true (`asa train`, MLE
only); every arm is an `asa train` of udasa.yaml on that model, with a setting of its own. The arms are in
udasa_runs.py, the measures in udasa_measures.py. The comparison goes to stdout; with --out, JSON and a picture beside
it.

Exit code 1 if a run failed, or, with --short, if the curriculum's answers are not ahead of the start's.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment import numbers, positive, problem_with_output
from live_run import when_and_where
from udasa_report import report_text
from udasa_runs import ARMS, CONFIG, CURRICULUM, START, START_OVERRIDES, Comparison, Run, resolved
from world import WorldConfig

from asa_dist.config import ConfigError

WORLD = WorldConfig(entities=16, verifications=96)
SHORT_ARMS = (START, CURRICULUM)
SHORT_MARGIN = 0.05  # of truth at T = 1, that the curriculum must be ahead of the start by
SHORT_LOSS = 0.05  # of greedy truth, that it may be behind
SEEDS = [10, 11, 12]
TUNING = "settings were chosen on seeds 0 and 1, for the curriculum alone"


def runs_of(options: argparse.Namespace, root: Path) -> list[Run]:
    """Seed by seed; of each the start first, and what is measured against the curriculum behind it."""
    arms = SHORT_ARMS if options.short else (START, *(arm for arm in ARMS if arm != START))
    question = resolved(options.overrides).udasa.factual.question
    return [Run(arm, replace(WORLD, seed=seed, verification_question=question), tuple(options.overrides), root)
            for seed in options.seeds for arm in arms]  # fmt: skip


def by_arm(measures: dict[Run, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{arm: {seed: measures}}."""
    found: dict[str, dict[str, Any]] = {}
    for run, measured in measures.items():
        found.setdefault(run.arm, {})[str(run.world.seed)] = measured
    return found


def is_ahead(result: dict[str, Any]) -> bool:
    """What CI asks: whether UDASA does anything at all."""
    from alignment_report import ArmRuns

    runs = ArmRuns(result["runs"])
    return runs.can_compare(CURRICULUM, START) and (
        runs.difference(CURRICULUM, START, "truth").mean >= SHORT_MARGIN
        and runs.difference(CURRICULUM, START, "greedy_truth").mean >= -SHORT_LOSS)  # fmt: skip


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=f"of {CONFIG.name}, for every arm")
    parser.add_argument("--seeds", type=numbers, default=SEEDS, metavar="10,11,12",
                        help="of world and runs; the settings were chosen on 0 and 1")
    parser.add_argument("--jobs", type=positive, default=2, help="seeds at once; each takes about a core")
    parser.add_argument("--work", type=Path, help="folder for the runs; finished ones in it are not repeated")
    parser.add_argument("--out", type=Path, help="file for the JSON; the picture goes beside it, as .svg")
    parser.add_argument("--short", action="store_true", help="start and curriculum, first seed: does it work at all?")
    options = parser.parse_intermixed_args(arguments)
    if options.short:
        options.seeds = options.seeds[:1]
    if options.out is not None and (problem := problem_with_output(options.out)):
        parser.error(f"--out {options.out}: {problem}")
    return options


def compare(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: before any run: settings that are none.
    """
    comparison, started = Comparison(runs_of(options, root), options.jobs), time.monotonic()
    comparison.complete()
    world = asdict(WORLD)
    del world["seed"]
    return {
        "benchmark": "udasa", "tuning": TUNING, "failed": [run.name for run in comparison.failed],
        "minutes": round((time.monotonic() - started) / 60, 1), "jobs": options.jobs, "world": world,
        "start": START_OVERRIDES, "overrides": options.overrides,
        "settings": resolved(options.overrides).model_dump(mode="json", include={"rollout", "udasa", "optimizer"}),
        "arms": {arm: asdict(of) for arm, of in ARMS.items()}, "runs": by_arm(comparison.measures), **when_and_where(),
    }  # fmt: skip


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs end with this process
    with ExitStack() as stack:
        root = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asa-udasa-")))
        try:
            result = compare(options, root.absolute())
        except ConfigError as error:
            sys.exit(f"udasa: {error}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report_text(result), flush=True)
    if options.out is not None and result["runs"]:
        from udasa_picture import draw

        draw(result, options.out.with_suffix(".svg"))
    return 1 if result["failed"] or (options.short and not is_ahead(result)) else 0


if __name__ == "__main__":
    sys.exit(main())

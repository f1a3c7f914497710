"""Does the loop learn what is true, or only certainty? Arms of one method, on a generated world whose truth is known.

    python benchmarks/alignment.py --out benchmarks/alignment.json      every arm, 3 seeds, 2 worlds; within an hour
    python benchmarks/alignment.py --short                              (a) and (b), one seed; within 5 minutes
    python benchmarks/alignment.py --ablations --out FILE               (b) without one of its parts each
    python benchmarks/alignment.py --work runs/alignment                keeps the runs, and goes on with what is there

Every arm is an `asa train` of alignment.yaml (ZeRO-3, Ray) with settings of its own, on the same corpus rows; (e) is
(a)'s model, sampled at the temperature at which it is as certain as (b)'s. The world is in world.py, the measures in
alignment_measures.py. The comparison goes to stdout; with --out, JSON and a picture beside it.

Exit code 1 if a run failed, or, with --short, if (b) is not ahead of (a).
"""

from __future__ import annotations

import argparse
import importlib.util
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

from alignment_runs import ABLATIONS, ARMS, CONFIG, Comparison, Run, differences_from_defaults, resolved
from live_run import when_and_where
from world import QUESTIONS, World, WorldConfig

from asa_dist.config import ConfigError

FALSE_MAJORITIES = {0.0: tuple("abcdefg"), 0.1: tuple("abdef")}  # the worlds of a full comparison, and the arms in them
SHORT_ARMS, SHORT_SETTINGS = ("a", "b"), ("train.steps=600", "evaluator.max_warmup_steps=300")
SHORT_MARGIN = 0.05  # of truth at T = 1, that (b) must be ahead by
FIRST_SEEDS = [10, 11, 12]
TUNING = "settings were chosen on seeds 0 and 1 (b); (f) and (g) had no tuning of their own"
MIN_RESPONSES = 2_000  # of an arm, over its seeds: a share of them then has a standard error of at most 0.011


def runs_of(options: argparse.Namespace, root: Path) -> list[Run]:
    """Seed by seed, so that an interrupted comparison is one of fewer seeds."""
    if options.short:
        worlds = {0.0: SHORT_ARMS}
    elif options.ablations:
        worlds = {0.0: ("b", "d", *ABLATIONS)}
    elif options.false_majority is not None:
        worlds = {options.false_majority: tuple(arm for arm in ARMS if arm not in ABLATIONS)}
    else:
        worlds = FALSE_MAJORITIES
    chosen = options.arms or list(ARMS)
    return [Run(arm, replace(options.world, seed=seed, false_majority=lies), common_overrides(options), root)
            for lies, arms in worlds.items() for seed in options.seeds for arm in ARMS
            if arm in arms and arm in chosen]  # fmt: skip


def check_worlds(runs: Sequence[Run], *, is_smoke: bool) -> None:
    """
    Raises:
        ConfigError: too few questions for a comparison; no clean documents to measure with.
    """
    from alignment_measures import NUM_SIBLINGS

    worlds = {run.world for run in runs}
    for share in {world.false_majority for world in worlds}:
        asked = sum(world.num_questions for world in worlds if world.false_majority == share) * NUM_SIBLINGS
        if asked < MIN_RESPONSES and not is_smoke:
            raise ConfigError(f"{asked} responses of each arm: fewer than {MIN_RESPONSES} tell nothing; take more "
                              "--entities, --paraphrases or --seeds (with --steps or --short any number will do)")
    for world in worlds:
        try:
            World(world).clean_documents(1)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def common_overrides(options: argparse.Namespace) -> tuple[str, ...]:
    """What all arms are overridden with; the later ones win."""
    steps = (f"train.steps={options.steps}",) if options.steps else ()
    return (*(SHORT_SETTINGS if options.short else ()), *options.overrides, *steps)


def worlds_of(measures: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """By share of false majorities: the world but for its seed, and {arm: {seed: measures}}."""
    worlds: dict[float, dict[str, Any]] = {}
    for run, found in measures.items():
        world = asdict(run.world)
        seed = str(world.pop("seed"))
        entry = worlds.setdefault(run.world.false_majority, {"world": world, "runs": {}})
        entry["runs"].setdefault(run.arm, {})[seed] = found
    return list(worlds.values())


def is_ahead(result: dict[str, Any]) -> bool:
    """Whether alignment does anything at all: what CI asks."""
    from alignment_report import ArmRuns

    runs = ArmRuns(result["worlds"][0]["runs"]) if result["worlds"] else ArmRuns({})
    return runs.can_compare("b", "a") and runs.difference("b", "a", "truth").mean >= SHORT_MARGIN


def numbers(text: str) -> list[int]:
    """An argument's value: different whole numbers, separated by commas."""
    found = [int(word) for word in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: every seed may occur once only")
    return found


def positive(text: str) -> int:
    """An argument's value: at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def arms(text: str) -> list[str]:
        if unknown := set(text.split(",")) - ARMS.keys():
            raise argparse.ArgumentTypeError(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
        return text.split(",")

    defaults = WorldConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of every arm's config")
    parser.add_argument("--noise", type=float, default=defaults.noise, help="share of statements that are false")
    parser.add_argument("--paraphrases", type=int, default=defaults.paraphrases,
                        choices=range(1, len(QUESTIONS) + 1), help="of questions and of answers")
    parser.add_argument("--statements", type=int, default=defaults.statements, help="per fact and question phrasing")
    parser.add_argument("--entities", type=int, default=defaults.entities, help="with 4 facts each")
    parser.add_argument("--false-majority", type=float, help="share of facts about which the corpus lies; "
                        "default: a world of 0, then one of 0.1 with fewer arms")
    parser.add_argument("--seeds", type=numbers, default=FIRST_SEEDS, metavar="10,11,12",
                        help="of world and run; the settings were chosen on 0 and 1")
    parser.add_argument("--arms", type=arms, metavar="a,b", help=f"of {', '.join(ARMS)}; default: all")
    parser.add_argument("--steps", type=positive,
                        help="of each run (the warm-up stays as it is); default: the config's")
    parser.add_argument("--jobs", type=positive, default=2, help="runs at once; each takes about a core")
    parser.add_argument("--work", type=Path, help="folder for the runs; finished ones in it are not repeated")
    parser.add_argument("--out", type=Path, help="file for the JSON; the picture goes beside it, as .svg")
    parser.add_argument("--ablations", action="store_true", help="instead: (b), (d), and (b) without one part each")
    parser.add_argument("--short", action="store_true", help="arms a and b, first seed: does alignment work at all?")
    options = parser.parse_intermixed_args(arguments)
    if options.short:
        options.seeds = options.seeds[:1]
    try:
        options.world = WorldConfig(options.entities, options.paraphrases, options.statements, options.noise,
                                    options.false_majority or 0.0, min(options.seeds))  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    if options.out is not None and (problem := problem_with_output(options.out)):
        parser.error(f"--out {options.out}: {problem}")
    return options


def problem_with_output(path: Path) -> str:
    """Why JSON and picture could not be written there; empty if they can."""
    if path.is_dir():
        return "is a folder; name a file"
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.parent}; make it"
    if importlib.util.find_spec("matplotlib") is None:
        return "the picture beside it needs matplotlib; install the extra \"dev\""
    return ""


def compare(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: before any run: settings that are none.
    """
    runs = runs_of(options, root)
    if not runs:
        raise ConfigError(f"none of the arms {', '.join(options.arms)} is part of this comparison")
    check_worlds(runs, is_smoke=options.short or options.steps is not None)
    comparison, started = Comparison(runs, options.jobs), time.monotonic()
    comparison.complete()
    measures = {run: comparison.measures[run] for run in runs if run in comparison.measures}
    config = resolved(common_overrides(options))
    return {
        "benchmark": "alignment", "tuning": TUNING, "failed": [run.name for run in comparison.failed],
        "minutes": round((time.monotonic() - started) / 60, 1), "jobs": options.jobs, "config": CONFIG.name,
        "overrides": common_overrides(options),
        "settings": config.model_dump(mode="json"), "differs_from_defaults": differences_from_defaults(config),
        "arms": {key: asdict(arm) for key, arm in ARMS.items()}, "worlds": worlds_of(measures), **when_and_where(),
    }  # fmt: skip


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs end with this process
    with ExitStack() as stack:
        root = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asa-alignment-")))
        try:
            result = compare(options, root.absolute())
        except ConfigError as error:
            sys.exit(f"alignment: {error}")
    from alignment_report import report_text

    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report_text(result), flush=True)
    if options.out is not None and result["worlds"]:
        from alignment_picture import draw

        draw(result, options.out.with_suffix(".svg"))
    return 1 if result["failed"] or (options.short and not is_ahead(result)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What staleness costs in learning: the truth of alignment.py's world by step and by second, at each `max_policy_age`.

Runs of its arm (b), with and without importance weights (`objective.importance`); at age 0 there is nothing to correct.
One run at a time, as overlap.py pins it. Seconds are those of the training steps, without evaluation and checkpoints;
truth is the share of sampled answers, to all questions of the world, that are true, asked of every checkpoint once the
run has ended. Runs are kept, and gone on with, under --work.

`python benchmarks/overlap.py --learning`, with --out a picture beside it. Nothing is promised.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from alignment import problem_with_output
from alignment_runs import CONFIG, Run, RunFailed, resolved
from live_run import Hang, Progress
from overlap_blocks import TRAINER_CORE, WORKER_CORE, pin
from results import Ratio, make_result, write_result
from world import World, WorldConfig

from asa_dist.config import ConfigError

AGES = (0, 1, 2, 4, 8)
SEEDS = (10, 11, 12)  # of world and run: alignment's settings were chosen on 0 and 1
STEPS_PER_POINT = 100
NUM_SIBLINGS = 8


@dataclass(frozen=True)
class Variant:
    age: int
    importance: str

    @property
    def name(self) -> str:
        return f"age {self.age}" + (", no importance weights" if self.importance == "none" else "")

    def run(self, seed: int, overrides: Sequence[str], root: Path) -> Run:
        settings = (f"rollout.max_policy_age={self.age}", f"objective.importance={self.importance}",
                    f"checkpoint.every_steps={STEPS_PER_POINT}", "checkpoint.keep=1000", *overrides)
        return Run("b", WorldConfig(seed=seed), settings, root)


SYNCHRONOUS = Variant(0, "token")
VARIANTS = tuple(Variant(age, importance) for age in AGES for importance in ("token", "none")
                 if age or importance == "token")


@dataclass(frozen=True)
class Curve:
    """One run: truth after so many steps, and so many seconds of training."""

    step: list[int]
    seconds: list[float]
    truth: list[float]


def curve_of(run: Run, progress: Progress) -> Curve:
    """Trains, or goes on, and asks; or what was found before.

    Raises:
        Hang, RunFailed: the run did not end as it should.
        ConfigError: settings that are none.
    """
    from asa_dist.runtime.checkpoint_files import write_atomically

    path = run.folder / "curve.json"
    if not path.exists():
        train(run)
        write_atomically(path, json.dumps(asdict(examine(run, progress))) + "\n")
    return Curve(**json.loads(path.read_text(encoding="utf-8")))


def train(run: Run) -> None:
    """From the beginning, or where it was interrupted.

    Raises:
        Hang, RunFailed: it does not end, or not well.
    """
    with run.start() as live:
        begun = live.last_step
        live.wait_until(lambda: live.last_step > begun, "the first step")
        pin(live)
        for step in range(begun, resolved(run.settings).train.steps, STEPS_PER_POINT):
            live.wait_until(lambda step=step: live.last_step >= step, f"step {step}")
        if (code := live.wait()) != 0:
            raise RunFailed(f"exit code {code}; the last lines of {live.output}:\n{live.last_words()}")


def examine(run: Run, progress: Progress) -> Curve:
    """Of a run that has ended: every checkpoint is asked."""
    from asa_dist.runtime.checkpoint_files import list_checkpoints
    from asa_dist.runtime.run_log import read_rows

    run_dir = run.folder / "run"
    seconds = seconds_by_step(list(read_rows(run_dir / "metrics.jsonl")))
    steps = sorted({checkpoint.step for checkpoint in list_checkpoints(run_dir)})
    truths = []
    for step in steps:
        truths.append(round(truth_of(run, step), 4))
        progress.say(f"  after {step} steps, {seconds[step]:.0f} s: truth {truths[-1]:.3f}")
    return Curve(steps, [round(seconds[step], 2) for step in steps], truths)


def seconds_by_step(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Of training until a step's end, by metrics.jsonl."""
    steps = [row for row in rows if "time/step_seconds" in row]
    return dict(zip((int(row["step"]) for row in steps), accumulate(row["time/step_seconds"] for row in steps),
                    strict=True))


def truth_of(run: Run, step: int) -> float:
    """Share of true answers among those sampled, of the checkpoint after a step."""
    from alignment_measures import probes_of

    from asa_dist.evaluation.checkpoint_model import open_checkpoint
    from asa_dist.evaluation.probes import probe_sampling, sample_probes, score_probes

    checkpoint, world = open_checkpoint(run.folder / "run", step), World(run.world)
    rollout, tokenizer = checkpoint.config.rollout, checkpoint.tokenizer()
    probes = [probe for fact in world.facts for probe in probes_of(world, fact)]
    engine = checkpoint.rollout_engine(probe_sampling(rollout, NUM_SIBLINGS), run.world.seed, "cpu")
    room = checkpoint.config.data.sequence_length - rollout.max_new_tokens
    return score_probes(probes, sample_probes(engine, probes, tokenizer, room), tokenizer).metrics["truth"]


def ratios_of(curves: Mapping[str, Mapping[int, Curve]]) -> list[Ratio]:
    """Of every variant's seeds to the same seeds at age 0: truth at the end, and the seconds until then."""
    found, of_zero = [], curves[SYNCHRONOUS.name]
    for name, of_variant in curves.items():
        if name == SYNCHRONOUS.name:
            continue
        pairs = [(curve, of_zero[seed]) for seed, curve in of_variant.items() if seed in of_zero]
        for what, better, values in (
            ("truth at the end", "higher", [curve.truth[-1] / zero.truth[-1] for curve, zero in pairs]),
            ("seconds of training", "lower", [curve.seconds[-1] / zero.seconds[-1] for curve, zero in pairs]),
        ):
            found.append(Ratio(f"{name}: {what}", round(statistics.median(values), 3), SYNCHRONOUS.name, better,
                               round(min(values), 3), round(max(values), 3)))
    return found


def learn(work: Path | None, num_seeds: int, overrides: Sequence[str], out: Path | None) -> int:
    """Every variant, seed by seed; the exit code."""
    import torch

    if out is not None and (problem := problem_with_output(out)):
        sys.exit(f"overlap: --out {out}: {problem}")
    torch.set_num_threads(1)  # as many as a run's processes have: the same samples on every machine
    progress = Progress()
    curves: dict[str, dict[int, Curve]] = {variant.name: {} for variant in VARIANTS}
    with ExitStack() as stack:
        root = (work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asa-overlap-")))).absolute()
        runs = [(variant, seed, variant.run(seed, overrides, root))
                for seed in SEEDS[:num_seeds] for variant in VARIANTS]
        for done, (variant, seed, run) in enumerate(runs):
            eta = f"; about {progress.seconds / done * (len(runs) - done) / 60:.0f} minutes left" if done else ""
            progress.say(f"{variant.name}, seed {seed}: run {done + 1} of {len(runs)}{eta}")
            try:
                curves[variant.name][seed] = curve_of(run, progress)
            except (ConfigError, Hang, RunFailed) as error:
                sys.exit(f"overlap: {variant.name}, seed {seed}: {error}")
    settings = {"config": CONFIG.name, "overrides": list(overrides), "ages": AGES, "seeds": SEEDS[:num_seeds],
                "world": {name: value for name, value in asdict(WorldConfig()).items() if name != "seed"},
                "trainer_core": TRAINER_CORE, "core_of_the_rest": WORKER_CORE}
    measured = {name: {str(seed): asdict(curve) for seed, curve in of_variant.items()}
                for name, of_variant in curves.items()}
    result = make_result("overlap_learning", "full", ratios_of(curves), settings, measured)
    code = write_result(result, out)
    if out is not None:
        from overlap_picture import draw

        draw(result, out.with_suffix(".svg"))
    return code

"""How much of the time for generating is hidden behind training: step time at max_policy_age 1 against 0.

    python benchmarks/overlap.py --out benchmarks/overlap.json

One trainer rank on one core, one rollout worker on another, as much work for both: corpus rows per step are calibrated
first. Then one run goes through blocks of steps at bound 0, 1, 0, 1, …, each a fresh start of `asa resume`, so that a
machine that gets slower meanwhile slows both alike. No overlap can do better than
max(train, generate) / (train + generate), about 0.5. Learning rates are 0: responses stay as long as they were.

One JSON line on stdout. Exit code 0 if the ratio is at most 0.75.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from live_run import ROOT, Hang, LiveRun, Progress, when_and_where

CONFIG = ROOT / "configs/quickstart.yaml"
SETTINGS = (
    "train.ranks=1", "optimizer.lr_psi=0.0", "optimizer.lr_phi=0.0", "optimizer.lr_xi=0.0", "data.max_documents=2000",
    "data.sequence_length=256", "rollout.max_new_tokens=224",  # few and long: decoding is slow, training on them is not
    "rollout.prompts_per_step=2", "rollout.responses_per_prompt=3", "evaluator.max_warmup_steps=0",
    "train.eval_every_steps=1000000", "checkpoint.every_steps=1000000", "metrics.samples_every_steps=1000000",
)
TARGET_RATIO = 0.75
BALANCE = 0.1  # calibrated when training and generating differ by at most this share
MAX_CALIBRATIONS = 4
WARM_STEPS = 4  # at the start of each block: not counted
TRAINER_CORE, WORKER_CORE = 0, 1


def pin(process: psutil.Process, core: int) -> None:
    """All threads there are; later ones inherit it."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})


def block(run: LiveRun, command: Sequence[str], last_step: int) -> list[dict[str, float]]:
    """Trains until ``last_step``; the metrics of the steps that count.

    Raises:
        Hang: the run does not get there.
    """
    first_step = run.last_step + 1
    run.start(*command, f"train.steps={last_step}")
    run.wait_until(lambda: bool(run.of_kind("rank 0") and run.of_kind("worker")), "rank and worker")
    run.wait_until(lambda: run.last_step >= first_step, "the first step")
    for kind, core in (("rank 0", TRAINER_CORE), ("worker", WORKER_CORE)):
        pin(run.of_kind(kind)[0], core)
    if run.wait() != 0:
        raise Hang(f"the run failed:\n{run.last_words()}")
    return [step for step in run.steps if step["step"] >= first_step + WARM_STEPS]


def median(steps: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(step[key] for step in steps)


def train_and_generate_seconds(synchronous: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Of steps at bound 0, where the trainer waits exactly as long as the worker works."""
    generate = median(synchronous, "time/wait_rollout_seconds")
    return statistics.median(step["time/step_seconds"] - step["time/wait_rollout_seconds"]
                             for step in synchronous), generate


def calibrate(num_steps: int, overrides: Sequence[str], progress: Progress) -> int:
    """Corpus rows per step with which training takes as long as generating."""
    rows = 8
    for _ in range(MAX_CALIBRATIONS):
        with tempfile.TemporaryDirectory(prefix="asa-overlap-") as folder, LiveRun(Path(folder)) as run:
            command = start_command(run, rows, overrides)
            train, generate = train_and_generate_seconds(block(run, command, num_steps + WARM_STEPS))
        progress.say(f"calibrating: {rows} corpus rows: train {train:.3f} s, generate {generate:.3f} s")
        if abs(train - generate) <= BALANCE * max(train, generate):
            break
        rows = max(1, round(rows * generate / train))
    return rows


def start_command(run: LiveRun, rows: int, overrides: Sequence[str]) -> list[str]:
    settings = [*SETTINGS, f"train.corpus_rows_per_step={rows}", "rollout.max_policy_age=0", *overrides]
    return ["train", str(CONFIG), *settings, "--run-dir", str(run.run_dir)]


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All blocks; what to report."""
    rows = options.rows or calibrate(options.steps, options.overrides, progress)
    blocks: dict[int, list[list[dict[str, float]]]] = {0: [], 1: []}
    per_block = options.steps + WARM_STEPS
    with tempfile.TemporaryDirectory(prefix="asa-overlap-") as folder, LiveRun(Path(folder)) as run:
        command = start_command(run, rows, options.overrides)
        for index in range(2 * options.blocks):
            steps = block(run, command, (index + 1) * per_block)
            blocks[index % 2].append(steps)
            left_minutes = progress.seconds / (index + 1) * (2 * options.blocks - index - 1) / 60
            progress.say(f"bound {index % 2}: {median(steps, 'time/step_seconds'):.3f} s per step; "
                         f"at most {left_minutes:.1f} minutes left")
            command = ["resume", str(run.run_dir), f"rollout.max_policy_age={(index + 1) % 2}"]
    return report(rows, blocks, options)


def report(rows: int, blocks: dict[int, list[list[dict[str, float]]]], options: argparse.Namespace) -> dict[str, Any]:
    together = {bound: [step for steps in of_bound for step in steps] for bound, of_bound in blocks.items()}
    train, generate = train_and_generate_seconds(together[0])
    figures = {name: {f"bound {bound}": round(median(steps, key), 4) for bound, steps in together.items()}
               for name, key in (("step_seconds", "time/step_seconds"),
                                 ("wait_rollout_seconds", "time/wait_rollout_seconds"),
                                 ("publish_stall_seconds", "time/publish_seconds"),
                                 ("policy_age_mean", "rollout/policy_age_mean"))}
    ratio = figures["step_seconds"]["bound 1"] / figures["step_seconds"]["bound 0"]
    return {
        "benchmark": "overlap", "ok": ratio <= TARGET_RATIO, "ratio": round(ratio, 3), "target": TARGET_RATIO,
        "limit": round(max(train, generate) / (train + generate), 3), "train_seconds": round(train, 4),
        "generate_seconds": round(generate, 4), **figures,
        "step_seconds_of_blocks": {
            f"bound {bound}": [round(median(steps, "time/step_seconds"), 4) for steps in of_bound]
            for bound, of_bound in blocks.items()},
        "corpus_rows_per_step": rows, "steps_per_block": options.steps, "config": CONFIG.name,
        "settings": [*SETTINGS, *options.overrides], **when_and_where(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of the run's config")
    parser.add_argument("--blocks", type=int, default=3, help="of each bound")
    parser.add_argument("--steps", type=int, default=20, help="counted in each block")
    parser.add_argument("--rows", type=int, help="corpus rows per step; default: calibrated")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    return parser.parse_intermixed_args()


def main() -> int:
    options = parse_arguments()
    if (os.cpu_count() or 1) < 2:
        sys.exit("overlap: needs two cores")
    text = json.dumps(result := measure(options, Progress()))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a run went: each step's parts, stacked, and one sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from asa_dist.report.curves import rounded
from asa_dist.report.planned import planned_section
from asa_dist.report.run_files import RunFiles

MAX_BARS = 100


@dataclass(frozen=True)
class Part:
    """One colour of the chart; without a limit there is nothing to say about it."""

    key: str
    name: str
    limit: float = 1.0  # share of the time above which it is worth a word
    advice: Callable[[RunFiles], str] = lambda run: ""


def _against_waiting(run: RunFiles) -> str:
    if run.setting("rollout.max_policy_age") == 0:
        return "rollout.max_policy_age=1 lets workers generate while ranks train; else more rollout.workers"
    return "more rollout.workers, or shorter responses (rollout.max_new_tokens)"


def _against_collectives(run: RunFiles) -> str:
    return (
        "a larger train.accumulation_steps, fewer hosts for one model, or a faster network between them; if another "
        "rank is slower than rank 0, what rank 0 waits for it is in there, too"
    )


PARTS = (
    Part("time/compute_seconds", "compute"),
    Part("time/collective_seconds", "collective", 0.3, _against_collectives),
    Part("time/wait_rollout_seconds", "rollout wait", 0.2, _against_waiting),
    Part("time/publish_seconds", "publish", 0.1, lambda run: "more ranks, each of which then copies a smaller shard"),
    Part("time/data_seconds", "data", 0.1, lambda run: "a local disk for the run folder and the sources"),
    Part("time/evaluation_seconds", "evaluation", 0.1, lambda run: "evaluate less often, or on less: "
         + ("udasa.curriculum.eval_every_steps" if run.is_round else "train.eval_every_steps, data.max_heldout_rows")),
    Part("time/reference_seconds", "reference", 0.3, lambda run: "udasa.dpo.reference=base computes it once"),
    Part("time/checkpoint_seconds", "checkpoint", 0.1, lambda run: "less often: a larger checkpoint.every_steps"),
)  # fmt: skip
KEYS = {part.key for part in PARTS}


def is_measured(run: RunFiles) -> bool:
    """Runs of older versions have not measured it."""
    return len(run.curve("time/compute_seconds")) > 0


def step_time_section(run: RunFiles) -> str:
    if not is_measured(run):
        return ""
    on_gpus = (
        " On GPUs a collective counts until it is launched; what it takes then is in compute, where the rank waits for "
        "its GPU." if run.setting("train.gpus") else ""
    )
    return (
        f'<section id="step-time"><h2>Where the time goes</h2>\n<p>{escape(advice(run))}</p>\n'
        '<div id="step-time-chart" class="chart wide"></div>\n<p class="note">Of rank 0, per step; evaluation, '
        f"reference and checkpoint lie between steps. Compute is the rest of a step.{on_gpus}</p>\n"
        f"{planned_section(run)}</section>\n"
    )


def advice(run: RunFiles) -> str:
    """About the part that most exceeds what it should take. The first step is left out: workers start meanwhile."""
    steps = run.curve(PARTS[0].key).steps
    first = steps[0] if len(steps) > 1 else 0
    seconds = {part: sum(filter(math.isfinite, run.curve(part.key).between(first, run.last_step))) for part in PARTS}
    total = sum(seconds.values())
    shares = {part: seconds[part] / total if total > 0 else 0.0 for part in PARTS}
    worst = max(PARTS, key=lambda part: shares[part] - part.limit)
    compute, num_steps = shares[PARTS[0]], sum(step > first for step in steps)
    of_what = f"{total / num_steps:.3g} s that a step took on average"
    if shares[worst] <= worst.limit or worst is PARTS[0]:
        return f"Compute is {compute:.0%} of the {of_what}: nothing to gain but by faster kernels or more GPUs."
    found = f"{worst.name.capitalize()} is {shares[worst]:.0%} of the {of_what}, compute {compute:.0%}"
    return f"{found}: {worst.advice(run)}."


def step_time_chart(run: RunFiles) -> dict[str, Any] | None:
    """For page.js: bars of a few steps each, with the mean seconds per step of every part. None: not measured."""
    if not is_measured(run):
        return None
    steps = np.frombuffer(run.curve(PARTS[0].key).steps, dtype=np.int64)
    first, last = int(steps.min()), int(steps.max())
    per_bar = -(-(last - first + 1) // MAX_BARS)
    num_bars = (last - first) // per_bar + 1

    def added_up(steps: Any, values: Any = None) -> Any:
        return np.bincount((steps.clip(first, last) - first) // per_bar, values, num_bars)

    counts = added_up(steps)
    series = []
    for part in PARTS:
        if len(curve := run.curve(part.key)):
            seconds = added_up(np.frombuffer(curve.steps, np.int64), np.nan_to_num(np.frombuffer(curve.values)))
            series.append({"name": part.name, "y": rounded(seconds / np.maximum(counts, 1))})
    return {"x": [first + (bar + 0.5) * per_bar - 0.5 for bar in range(num_bars)], "per_bar": per_bar, "series": series}

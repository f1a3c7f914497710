"""What `asa plan RUN` expected of a step, beside what the run's steps took."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from asa_dist.report.curves import is_number
from asa_dist.report.markup import number, table
from asa_dist.report.run_files import RunFiles

PLAN_FILE = "plan.json"  # in the run folder: the JSON of `asa plan`


@dataclass(frozen=True)
class Planned:
    """One line.

    Attributes:
        of_plan: names in the plan's seconds; they are added up.
        of_run: keys of metrics.jsonl; so are they.
    """

    name: str
    of_plan: tuple[str, ...]
    of_run: tuple[str, ...]


LINES = (
    Planned("step", ("step",), ("time/step_seconds",)),
    Planned("compute", ("compute", "optimizer"), ("time/compute_seconds", "time/data_seconds")),
    Planned("collective", ("exposed_collectives",), ("time/collective_seconds",)),
    Planned("publish", ("publish",), ("time/publish_seconds",)),
    Planned("rollout wait", ("waiting",), ("time/wait_rollout_seconds",)),
)


def planned_section(run: RunFiles) -> str:
    """A table, or nothing: the run was not planned, or has not trained."""
    measured = {line: mean_seconds(run, line.of_run) for line in LINES}
    if not (run.run_dir / PLAN_FILE).exists() or math.isnan(measured[LINES[0]]):
        return ""
    try:
        machine, seconds, changed = _read_plan(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = f"asa plan {run.run_dir} --machine NAME"
        return f'<p class="note">{escape(f"{PLAN_FILE} cannot be used: {error!r}; write it anew: {again}")}</p>\n'
    planned = {line: sum(seconds[name] for name in line.of_plan) for line in LINES}
    where = "as this machine was measured" if machine == "this" else f"on {machine}"
    lines = (f"<tr><td class=key>{escape(line.name)}</td><td class=number>{number(planned[line], 3)}</td>"
             f"<td class=number>{number(measured[line], 3)}</td></tr>" for line in LINES)  # fmt: skip
    said = f"{compared(planned[LINES[0]], measured[LINES[0]])} (asa plan, {where})."
    if changed:
        said += f" The plan is not of this run's batch, but of {', '.join(changed)}."
    return f"<p>{escape(said)}</p>{table(('seconds of a step', 'planned', 'measured'), lines)}\n"


def compared(planned: float, measured: float) -> str:
    if measured <= 0 or planned <= 0:
        return f"A step took {measured:.3g} s; the plan had expected {planned:.3g} s"
    ratio = measured / planned
    if abs(ratio - 1) < 0.005:
        return f"A step took {measured:.3g} s, as the plan had expected"
    return f"A step took {measured:.3g} s, {ratio:.2f} of what the plan had expected"


def mean_seconds(run: RunFiles, keys: Sequence[str]) -> float:
    """Of the steps but the first, during which workers start; NaN: none was measured."""
    curves = [curve for key in keys if len(curve := run.curve(key))]
    if not curves:
        return math.nan
    return sum(_mean(curve.steps, curve.values) for curve in curves)


def _mean(steps: Sequence[int], values: Sequence[float]) -> float:
    kept = [value for value in list(values)[1 if len(steps) > 1 else 0 :] if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def _read_plan(run: RunFiles) -> tuple[str, dict[str, float], list[str]]:
    """(machine, seconds of a step by name, settings that it changed). Raises whatever is wrong with the file."""
    plan: dict[str, Any] = json.loads((run.run_dir / PLAN_FILE).read_text(encoding="utf-8"))
    seconds = {name: plan["chosen"]["seconds"][name] for line in LINES for name in line.of_plan}
    if strange := [name for name, value in seconds.items() if not is_number(value)]:
        raise ValueError(f"no number: {', '.join(strange)}")
    changed = [f"{key}={value}" for key, value in plan["chosen"]["settings"].items()]
    return str(plan["machine"]["name"]), seconds, changed

"""What happened to a run: its events as a table, and the steps at which to mark them on the curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from asa_dist.inspection import in_units
from asa_dist.report.curves import finite_number, step_of
from asa_dist.report.run_files import BEGINNINGS, ENDS, RunFiles

DIED = "died"  # our own: what came before neither finished nor stopped
ROUTINE = {"checkpoint", "worker_started", "worker_ready"}
BAD = {
    DIED, "worker_died", "worker_given_up", "step_skipped", "checkpoint_failed", "checkpoint_damaged",
    "version_corrupt", "rollout_mismatch", "unreadable",
}
GOOD = {"finished"}
UNMARKED = {  # in the table only; the stages of UDASA have bands
    "checkpoint", "worker_started", "worker_ready", "started", "finished", "unreadable", "stage_started",
    "stage_resumed", "stage_finished",
}
SHOWN_ALONE = 3  # more of the same in a row are one line
MAX_LINES = 200
MAX_MARKS = 100


@dataclass(frozen=True)
class Happening:
    """One line of the table, or one mark."""

    event: str
    time: str  # UTC, as written; empty: unknown
    step: int | None  # None: unknown
    details: str
    is_estimated: bool = False  # the step, from the times of neighbouring events
    is_undone: bool = False  # the run went on from before this step
    count: int = 1  # of such events in a row; the last one is shown

    @property
    def kind(self) -> str:
        """bad, good, routine or plain."""
        if self.event in BAD:
            return "bad"
        return "good" if self.event in GOOD else "routine" if self.event in ROUTINE else "plain"

    @property
    def words(self) -> str:
        return self.event.replace("_", " ") if self.event != DIED else "ended without saying so: failed or killed"


def happenings(run: RunFiles) -> list[Happening]:
    """Every event in order, with the ends that nobody wrote down."""
    steps = _estimated_steps(run.events)
    found: list[Happening] = []
    is_going = False
    for event, estimate in zip(run.events, steps, strict=True):
        if event["event"] in BEGINNINGS and is_going:
            found.append(Happening(DIED, "", None, ""))
        is_going = (is_going and event["event"] not in ENDS) or event["event"] in BEGINNINGS
        found.append(_happening(event, estimate))
    if run.state == "crashed":
        found.append(Happening(DIED, "", run.last_step or None, _how_it_ended(run)))
    return _with_undone(found)


def _how_it_ended(run: RunFiles) -> str:
    stacks = sorted(path.name for path in (run.run_dir / "stacks").glob("*.txt"))
    return f"what every thread was doing: {', '.join(f'stacks/{name}' for name in stacks)}" if stacks else ""


def _happening(event: dict[str, Any], estimate: int | None) -> Happening:
    step = step_of(event)
    details = ", ".join(
        f"{key} {in_units(int(value)) if key == 'bytes' and math.isfinite(finite_number(value)) else value}"
        for key, value in event.items()
        if key not in ("time", "event", "step") and value not in ("", [])
    )
    return Happening(
        event["event"], str(event.get("time", "")), estimate if step is None else step, details,
        is_estimated=step is None and estimate is not None,
    )


def _seconds(event: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except (ValueError, OverflowError):  # no time; one before the year 1 here
        return math.nan


def _estimated_steps(events: list[dict[str, Any]]) -> list[int | None]:
    """Which step was under way, by time between events that name their step; None outside of them."""
    times = [_seconds(event) for event in events]
    known = sorted(
        (time, step)
        for time, step in zip(times, map(step_of, events), strict=True)
        if math.isfinite(time) and step is not None
    )
    if not known:
        return [None] * len(events)
    at, steps = zip(*known, strict=True)
    asked = [time if math.isfinite(time) else math.inf for time in times]
    found = np.interp(asked, at, steps, left=np.nan, right=np.nan)
    return [None if math.isnan(step) else round(step) for step in found]


def _with_undone(found: list[Happening]) -> list[Happening]:
    """Marks what came after the step from which the run went on later."""
    went_on = math.inf
    result = []
    for happening in reversed(found):
        is_undone = happening.step is not None and happening.step > went_on
        result.append(replace(happening, is_undone=is_undone))
        if happening.event in BEGINNINGS and happening.step is not None:
            went_on = min(went_on, happening.step)
    return result[::-1]


def table_lines(found: list[Happening]) -> tuple[list[Happening], int]:
    """At most MAX_LINES, many of the same in a row as one; and how many lines, from the middle, are left out."""
    lines = list(_grouped(found))
    left_out = max(0, len(lines) - MAX_LINES)
    head = MAX_LINES // 4
    return (lines[:head] + lines[head + left_out :] if left_out else lines), left_out


def _grouped(found: list[Happening]) -> Iterator[Happening]:
    for _, group in itertools.groupby(found, key=lambda happening: (happening.event, happening.is_undone)):
        same = list(group)
        if len(same) > SHOWN_ALONE:
            yield replace(same[-1], count=len(same))
        else:
            yield from same


def marks(found: list[Happening]) -> list[dict[str, Any]]:
    """Where the curves get a vertical line: step, kind, text. At most the newest MAX_MARKS; none of what was undone."""
    return [
        {
            "step": happening.step,
            "kind": happening.kind,
            "text": f"{'about ' if happening.is_estimated else ''}step {happening.step:,}: {happening.words}",
        }
        for happening in found
        if happening.step is not None and not happening.is_undone and happening.event not in UNMARKED
    ][-MAX_MARKS:]

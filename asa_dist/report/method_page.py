"""What a page shows because of the run's method: page.py has one of these made, and puts it in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from asa_dist.report.markup import number
from asa_dist.report.run_files import RunFiles


@dataclass(frozen=True)
class Figure:
    """One of the large numbers at the top."""

    title: str
    value: str
    explanation: str
    is_bad: bool = False


@dataclass(frozen=True)
class MethodPage:
    """Texts are plain, for page.py to escape; sections are HTML."""

    state: str  # a word or two
    progress: str  # which step of how many
    figures: list[Figure]
    warnings: list[str]  # beside those of every method
    chapters: list[dict[str, Any]]  # charts in the terms of page.js
    before_curves: str = ""  # sections
    after_curves: str = ""  # sections
    shading: str = ""  # what it means in the curves
    data: dict[str, Any] = field(default_factory=dict)  # what else page.js is to draw


def checkpoint_figure(run: RunFiles) -> Figure:
    if run.inspection is None or not run.inspection.checkpoints:
        return Figure("newest checkpoint", "–", "none yet")
    found = run.inspection
    aside = f", {len(found.set_aside)} damaged set aside" if found.set_aside else ""
    value = "none usable" if found.step is None else f"step {found.step:,}"
    more = f"{len(found.checkpoints)} kept{aside}; sizes checked"
    return Figure("newest checkpoint", value, more, found.step is None)


def training_minutes(run: RunFiles) -> str:
    """Of all steps together."""
    seconds = sum(seconds for seconds in run.curve("time/step_seconds").values if math.isfinite(seconds))
    return f"{number(seconds / 60, 1)} minutes"

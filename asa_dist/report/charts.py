"""Charts of the page: what one is, and how it gets its values. Which there are, the method says: <method>_charts.py."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from asa_dist.report.curves import MAX_POINTS, thin
from asa_dist.report.run_files import RunFiles
from asa_dist.report.step_time import KEYS as STEP_TIME_KEYS


@dataclass(frozen=True)
class Chart:
    """Keys of metrics.jsonl against the steps."""

    title: str
    keys: tuple[str, ...]
    unit: str
    note: str  # what a healthy run looks like, and what is a bad sign
    log: bool = False
    from_zero: bool = False  # 0 is always in sight: how far the values are from it is the point
    is_noisy: bool = True  # a moving mean helps the eye
    range: tuple[float, float] | None = None  # of y; None: as the values are


@dataclass(frozen=True)
class Chapter:
    """Charts that answer one question."""

    title: str
    charts: tuple[Chart, ...]


OTHER_NOTE = "A key this report knows nothing about."


def filled(chapters: Sequence[Chapter], not_charted: Set[str], run: RunFiles) -> list[dict[str, Any]]:
    """The charts with values, in the page's terms; keys that are in none of them get a chart each at the end.

    Args:
        not_charted: keys that need no chart.
    """
    known = {key for chapter in chapters for chart in chapter.charts for key in chart.keys}
    known |= not_charted | STEP_TIME_KEYS
    unknown = tuple(Chart(key, (key,), "", OTHER_NOTE) for key in run.curves if key not in known)
    found = []
    for chapter in (*chapters, Chapter("Further metrics", unknown)):
        if charts := [_filled(chart, run) for chart in chapter.charts if any(key in run.curves for key in chart.keys)]:
            found.append({"title": chapter.title, "charts": charts})
    return found


def _filled(chart: Chart, run: RunFiles) -> dict[str, Any]:
    return {
        "title": chart.title,
        "unit": chart.unit,
        "note": chart.note,
        "log": chart.log,
        "from_zero": chart.from_zero,
        "is_noisy": chart.is_noisy,
        "range": chart.range,
        "series": [{"name": key, **thin(run.curves[key])} for key in chart.keys if key in run.curves],
    }


def thinning_note(run: RunFiles) -> str:
    """How curves of a long run were thinned; empty if none was."""
    longest = max(map(len, run.curves.values()), default=0)
    if longest <= MAX_POINTS:
        return ""
    return (
        f"Curves are thinned to at most {MAX_POINTS:,} points: a point is the mean of up to "
        f"{math.ceil(longest / MAX_POINTS):,} neighbouring values, and the band around the line reaches from the "
        "smallest to the largest of them."
    )

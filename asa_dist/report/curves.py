"""A metric against the steps, and the same in few enough points to be drawn. Files may hold any JSON."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

MAX_POINTS = 1000  # more than a chart has pixels for
DIGITS = 6  # significant ones, of what the page holds
MAX_STEP = 2**53  # JavaScript counts no further


@dataclass
class Curve:
    """Values by step, in the order written; NaN where a value was not finite. 16 bytes each: long runs fit."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: Any) -> None:
        self.steps.append(step)
        self.values.append(finite_number(value))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_not_finite(self) -> int:
        return sum(map(math.isnan, self.values))

    def last(self) -> float:
        """The newest finite value; NaN if there is none."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), math.nan)

    def tail_mean(self, num_values: int) -> float:
        """Mean of the last values, as far as they are finite; NaN if none is."""
        return mean(self.values[-num_values:])

    def between(self, first: int, last: int) -> list[float]:
        """Values of the steps after ``first`` up to ``last``."""
        return [value for step, value in zip(self.steps, self.values, strict=True) if first < step <= last]

    def mean_before(self, step: int, num_values: int) -> float:
        """Mean of the last values of steps before ``step``, or of the first ones if there are not so many."""
        end = max(num_values, next((i for i, other in enumerate(self.steps) if other >= step), len(self)))
        return mean(self.values[end - num_values : end])


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def read_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """A curve for every key of the rows that is a number, in the order in which they appear.

    Args:
        rows: of metrics.jsonl; ``null`` is a number that was not finite. Rows without a step are left out.
    """
    curves: dict[str, Curve] = {}
    for row in rows:
        if (step := step_of(row)) is not None:
            for key, value in row.items():
                if key != "step" and (value is None or is_number(value)):
                    curves.setdefault(key, Curve()).add(step, value)
    return curves


def step_of(row: Mapping[str, Any], key: str = "step") -> int | None:
    """A step, policy version or id: whole, 0 … MAX_STEP − 1. None: the row has none that could be one."""
    step = row.get(key)
    return int(step) if is_number(step) and 0 <= step < MAX_STEP and step % 1 == 0 else None


def finite_number(value: Any) -> float:
    """NaN for what is no number, not finite, or larger than every float."""
    try:
        number = float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def thin(curve: Curve, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """At most ``max_points`` points; each stands for the same number of neighbouring values, usually 1.

    Returns:
        x: mean step of a point; y: mean of its finite values, None if it has none; per_point: how many values a point
        stands for. If more than one: low, high: the smallest and the largest of them, so that no peak is lost.
    """
    if not len(curve):
        return {"x": [], "y": [], "per_point": 1}
    per_point = math.ceil(len(curve) / max_points)
    starts = np.arange(0, len(curve), per_point)
    steps = np.frombuffer(curve.steps, dtype=np.int64).astype(np.float64)
    values = np.frombuffer(curve.values, dtype=np.float64)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.int64), starts)
    with np.errstate(over="ignore"):
        total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    sizes = np.diff(np.append(starts, len(curve)))
    points = {
        "x": rounded(np.add.reduceat(steps, starts) / sizes),
        "y": rounded(np.where(count > 0, total / np.maximum(count, 1), np.nan)),
        "per_point": per_point,
    }
    if per_point > 1:
        points["low"] = rounded(np.minimum.reduceat(np.where(finite, values, np.inf), starts))
        points["high"] = rounded(np.maximum.reduceat(np.where(finite, values, -np.inf), starts))
    return points


def rounded(values: Iterable[float]) -> list[float | None]:
    """To what a reader can see; None for what is not finite."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values]

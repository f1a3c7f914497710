"""Curves: what is read, and what thinning keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from asa_dist.report.curves import MAX_POINTS, MAX_STEP, Curve, finite_number, read_curves, rounded, step_of, thin


def curve(*values: float | None, first_step: int = 1) -> Curve:
    result = Curve()
    for step, value in enumerate(values, start=first_step):
        result.add(step, value)
    return result


def test_rows_become_curves() -> None:
    rows = [
        {"step": 0, "eval/perplexity": 9.0},
        {"step": 1, "loss/total": 2, "note": "text", "flag": True},
        {"no step": 1.0},
        {"step": 2, "loss/total": None},
        {"step": 3, "loss/total": math.inf, "eval/perplexity": 7.0},
    ]
    curves = read_curves(rows)
    assert list(curves) == ["eval/perplexity", "loss/total"]
    assert list(curves["eval/perplexity"].steps) == [0, 3] and list(curves["eval/perplexity"].values) == [9.0, 7.0]
    assert list(curves["loss/total"].steps) == [1, 2, 3] and curves["loss/total"].num_not_finite == 2
    assert curves["loss/total"].last() == 2.0


@pytest.mark.parametrize("step", [None, "3", True, -1, 2.5, math.nan, math.inf, 1e300, MAX_STEP, 2**63, 10**400])
def test_what_can_be_no_step(step: Any) -> None:
    assert step_of({"step": step}) is None and read_curves([{"step": step, "loss/total": 1.0}]) == {}


def test_steps_and_numbers() -> None:
    assert step_of({"step": 3.0}) == 3 and step_of({"version": 0}, "version") == 0
    assert step_of({"step": MAX_STEP - 1}) == MAX_STEP - 1
    assert finite_number(3) == 3.0 and finite_number(-0.5) == -0.5
    assert all(math.isnan(finite_number(value)) for value in (None, "1", True, math.nan, -math.inf, 10**400))


def test_the_largest_numbers() -> None:
    points = thin(curve(1e308, 1e308, 10**400, 1.0, first_step=MAX_STEP - 4), max_points=2)
    assert points["y"] == [None, 1.0] and points["x"] == rounded([MAX_STEP, MAX_STEP])


def test_short_curves_stay_as_they_are() -> None:
    assert thin(curve(1.0, None, 3.0)) == {"x": [1, 2, 3], "y": [1.0, None, 3.0], "per_point": 1}
    assert thin(Curve())["y"] == []


@pytest.mark.parametrize("num_values", [MAX_POINTS, MAX_POINTS + 1, 12_345, 400_000])
def test_long_curves_have_a_bounded_number_of_points(num_values: int) -> None:
    points = thin(curve(*([1.0] * num_values)))
    assert len(points["x"]) == len(points["y"]) <= MAX_POINTS
    assert points["per_point"] == -(-num_values // MAX_POINTS) and set(points["y"]) == {1.0}


def test_thinning_keeps_means_and_peaks() -> None:
    points = thin(curve(1.0, 3.0, 100.0, None, None, None, 5.0), max_points=4)
    assert points == {
        "x": [1.5, 3.5, 5.5, 7.0], "y": [2.0, 100.0, None, 5.0], "per_point": 2,
        "low": [1.0, 100.0, None, 5.0], "high": [3.0, 100.0, None, 5.0],
    }  # fmt: skip


def test_means() -> None:
    values = curve(*map(float, range(10)))  # step s has the value s - 1
    assert values.tail_mean(4) == 7.5
    assert values.mean_before(6, 2) == 3.5, "steps 4 and 5"
    assert values.mean_before(2, 4) == 1.5, "too few before: the first ones"
    assert math.isnan(Curve().tail_mean(4))


def test_numbers_of_the_page_are_short() -> None:
    assert rounded([1 / 3, 123_456_789.0, math.nan]) == [0.333333, 123_457_000.0, None]


def test_values_of_a_part_of_the_steps() -> None:
    values = curve(*map(float, range(10)))  # step s has the value s - 1
    assert values.between(3, 6) == [3.0, 4.0, 5.0] and values.between(9, 99) == [9.0] and values.between(0, 0) == []

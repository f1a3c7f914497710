"""Where a run's time went: the bars add up to what was measured, and the advice follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asa_dist.report.run_files import RunFiles, read_run
from asa_dist.report.step_time import MAX_BARS, advice, step_time_chart
from tests.report.report_runs import metrics, write_report_run
from tests.report.test_page import report
from tests.run_folders import write_rows

HEALTHY = {"compute": 8.0, "collective": 1.0, "wait_rollout": 0.5, "publish": 0.25, "data": 0.25}


def timed_run(folder: Path, steps: int = 100, every_tenth: float = 0.0, **seconds: float) -> Path:
    """A run whose steps took so long, with a checkpoint after every tenth."""
    run = write_report_run(folder, steps, num_steps=steps)
    times = {f"time/{part}_seconds": value for part, value in (HEALTHY | seconds).items()}
    rows = [row | times if row["step"] else row for row in metrics(steps)]
    if every_tenth:
        rows += [{"step": step, "time/checkpoint_seconds": every_tenth} for step in range(10, steps + 1, 10)]
    write_rows(run, "metrics", *rows)
    return run


def chart_of(run: Path) -> dict[str, Any]:
    chart = step_time_chart(read_run(run))
    assert chart is not None
    return chart


def test_a_bar_per_step(tmp_path: Path) -> None:
    chart = chart_of(timed_run(tmp_path / "run", 20, every_tenth=5.0))
    assert chart["x"] == list(range(1, 21)) and chart["per_bar"] == 1
    series = {one["name"]: one["y"] for one in chart["series"]}
    assert list(series) == ["compute", "collective", "rollout wait", "publish", "data", "checkpoint"]
    assert series["compute"] == [8.0] * 20
    assert series["checkpoint"] == ([0.0] * 9 + [5.0]) * 2


def test_bars_of_a_long_run_stand_for_several_steps_each(tmp_path: Path) -> None:
    steps = 2 * MAX_BARS + 50
    chart = chart_of(timed_run(tmp_path / "run", steps, every_tenth=5.0))
    assert chart["per_bar"] == 3 and len(chart["x"]) <= MAX_BARS and chart["x"][:2] == [2, 5]
    series = {one["name"]: one["y"] for one in chart["series"]}
    assert set(series["compute"]) == {8.0}, "seconds per step, however many a bar stands for"
    sizes = [3] * (len(chart["x"]) - 1) + [1]
    total = sum(size * y for size, y in zip(sizes, series["checkpoint"], strict=True))
    assert total == pytest.approx(5.0 * (steps // 10), rel=1e-4)


@pytest.mark.parametrize(("seconds", "said"), [
    ({}, "Compute is 80% of the 10 s that a step took on average: nothing to gain but by faster kernels"),
    ({"wait_rollout": 10.5}, "Rollout wait is 52% of the 20 s that a step took on average, compute 40%: "
     "more rollout.workers, or shorter responses"),
    ({"collective": 11.0}, "Collective is 55% of the 20 s that a step took on average, compute 40%: a larger "
     "train.accumulation_steps"),
    ({"publish": 10.25}, "Publish is 51%"),
    ({"data": 10.25}, "Data is 51%"),
    ({"every_tenth": 99.0}, "Checkpoint is 50% of the 20 s that a step took on average, compute 40%: less often"),
])  # fmt: skip
def test_the_advice(tmp_path: Path, seconds: dict[str, Any], said: str) -> None:
    assert advice(read_run(timed_run(tmp_path / "run", **seconds))).startswith(said)


def test_the_first_step_says_nothing_unless_it_is_the_only_one(tmp_path: Path) -> None:
    one, two = (timed_run(tmp_path / str(steps), steps) for steps in (1, 2))
    assert advice(read_run(one)).startswith("Compute is 80% of the 10 s")
    write_rows(two, "metrics", {"step": 1, "time/compute_seconds": 1.0, "time/wait_rollout_seconds": 99.0},
               {"step": 2, "time/compute_seconds": 1.0, "time/wait_rollout_seconds": 0.0})
    assert advice(read_run(two)).startswith("Compute is 100% of the 1 s")


def test_who_is_synchronous_may_look_ahead_first(tmp_path: Path) -> None:
    run = read_run(timed_run(tmp_path / "run", wait_rollout=10.0))
    synchronous = RunFiles(run.run_dir, {"rollout": {"max_policy_age": 0}}, None, curves=run.curves)
    assert "rollout.max_policy_age=1 lets workers generate while ranks train" in advice(synchronous)


def test_the_page_has_it(tmp_path: Path) -> None:
    page = report(timed_run(tmp_path / "run"))
    assert "Where the time goes" in page.text and "Compute is 80% of the 10 s" in page.text
    assert page.data["step_time"] == chart_of(tmp_path / "run")
    assert page.data["chapters"][-1]["title"] != "Further metrics", "no part has a chart of its own"


def test_runs_of_older_versions_have_none(tmp_path: Path) -> None:
    page = report(write_report_run(tmp_path / "run"))
    assert "Where the time goes" not in page.text and page.data["step_time"] is None

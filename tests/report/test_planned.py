"""What a plan expected, beside what the run's steps took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asa_dist.config import load_config
from asa_dist.plan.planning import plan
from asa_dist.plan.report import keep_plan
from asa_dist.report.planned import PLAN_FILE, compared, planned_section
from asa_dist.report.run_files import read_run
from asa_dist.report.step_time import step_time_section
from tests.report.test_page import report
from tests.report.test_step_time import timed_run

SECONDS = {"step": 5.0, "compute": 3.0, "optimizer": 0.5, "exposed_collectives": 1.0, "publish": 0.25, "waiting": 0.25}


def planned_run(folder: Path, machine: str = "this", **seconds: Any) -> Path:
    run = timed_run(folder, time__step_seconds=10.0)
    tree = {"chosen": {"seconds": SECONDS | seconds, "settings": {}}, "machine": {"name": machine}}
    (run / PLAN_FILE).write_text(json.dumps(tree), encoding="utf-8")
    return run


def test_planned_stands_beside_measured(tmp_path: Path) -> None:
    text = planned_section(read_run(planned_run(tmp_path / "run")))
    assert "A step took 0.5 s, 0.10 of what the plan had expected (asa plan, as this machine" in text
    assert "<td class=key>compute</td><td class=number>3.500</td><td class=number>8.250</td>" in text
    assert "<td class=key>rollout wait</td><td class=number>0.250</td><td class=number>0.500</td>" in text


def test_the_report_has_it_where_the_time_goes(tmp_path: Path) -> None:
    run = planned_run(tmp_path / "run", machine="<H100x8>")
    assert "on &lt;H100x8&gt;" in step_time_section(read_run(run))
    assert "(asa plan, on <H100x8>)" in report(run).text


def test_a_run_that_nobody_planned_says_nothing(tmp_path: Path) -> None:
    run = timed_run(tmp_path / "run")
    assert planned_section(read_run(run)) == "" and step_time_section(read_run(run)) != ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"chosen": {"seconds": {"step": "x"}}, "machine": {"name": ""}}'])
def test_a_plan_that_cannot_be_read_says_so(tmp_path: Path, text: str) -> None:
    path = planned_run(tmp_path / "run")
    (path / PLAN_FILE).write_text(text, encoding="utf-8")
    said = planned_section(read_run(path))
    assert "plan.json cannot be used: " in said and "asa plan" in said and "<table" not in said


def test_what_a_plan_keeps_is_what_the_report_reads(tmp_path: Path) -> None:
    path = timed_run(tmp_path / "run")
    keep_plan(plan(load_config("configs/asa-7b.yaml"), "H100x8", 8), path)
    run = read_run(path)
    said = planned_section(run)
    assert "on H100x8" in said and "The plan is not of this run&#x27;s batch, but of " in said
    assert "train.corpus_rows_per_step=168" in said


@pytest.mark.parametrize(("planned", "measured", "said"), [
    (2.0, 1.0, "0.50 of what the plan"), (1.0, 2.0, "2.00 of what the plan"), (1.0, 1.001, "as the plan had")])
def test_the_comparison(planned: float, measured: float, said: str) -> None:
    assert said in compared(planned, measured)

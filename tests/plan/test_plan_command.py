"""`asa plan` as its users meet it: at once, in words, and kept for the report if it is a run's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from asa_dist.cli import main
from tests.observed_command import ROOT, run

SEVEN_B = ROOT / "configs/asa-7b.yaml"


def test_a_plan_is_made_at_once(tmp_path: Path) -> None:
    outcome = run(tmp_path, "plan", SEVEN_B, "--machine", "H100x8", "--nodes", "8", "--json")
    assert outcome.code == 0 and outcome.stderr == "" and outcome.is_light and outcome.started_nothing
    planned = json.loads(outcome.stdout)
    assert planned["fits"] and planned["chosen"]["layout"]["num_nodes"] == 8
    assert planned["parameters"]["psi"] == 6_738_415_616  # as Llama-2-7B


def test_a_plan_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    outcome = run(tmp_path, "plan", SEVEN_B, "train.zero_stage=0", "--machine", "A100x8")
    assert outcome.code == 1 and outcome.is_light
    assert re.match(r"does not fit: [\d.]+ GiB of 74.5 GiB for a rank\ndo this: train.zero_stage=3\n", outcome.stdout)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--machine", "B200x8"], "--machine B200x8: there are A100x8, H100x8, this"),
    (["--machine", "H100x8", "--nodes", "2", "--rollout-nodes", "2"],
     "--rollout-nodes 2 of --nodes 2 only generate: none trains"),
    (["--machine", "this", "--nodes", "2"],
     "--machine this --nodes 2: what is measured here says nothing about a network"),
    (["--machine", "this"], "--machine this measures CPUs; the config asks for GPUs: name a machine that has some, or "
     "plan with train.gpus=0 rollout.gpus_per_worker=0"),
])
def test_plans_that_cannot_be_made(tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = run(tmp_path, "plan", SEVEN_B, *arguments)
    assert outcome.code == 2 and outcome.stderr == f"asa: {message}\n" and outcome.is_light


def test_a_planned_run_keeps_its_plan(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(SEVEN_B.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["plan", str(run_dir), "--machine", "H100x8", "--nodes", "8", "train.steps=7"]) == 0
    assert not (run_dir / "plan.json").exists(), "with overrides it is another run's plan"
    assert main(["plan", str(run_dir), "--machine", "H100x8", "--nodes", "8"]) == 0
    assert json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["fits"] is True

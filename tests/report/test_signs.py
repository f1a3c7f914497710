"""Every known bad sign is said when it is there, and a healthy run has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asa_dist.report.asa_signs import asa_warnings
from asa_dist.report.run_files import read_run
from asa_dist.report.signs import warnings
from tests.report.report_runs import STARTED, end, write_report_run
from tests.run_folders import write_rows


def found(folder: Path, steps: int = 100, *events: Any, **changes: Any) -> list[str]:
    run = read_run(write_report_run(folder / "run", steps, *events, **changes))
    return [*warnings(run), *asa_warnings(run)]


def falls_to(before: float, after: float) -> Callable[[int], float]:
    """Falls once alignment has begun."""
    return lambda step: before if step <= 20 else after


def test_a_healthy_run_has_none(tmp_path: Path) -> None:
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"rollout__distinct_fraction": falls_to(1.0, 0.2)}, "Siblings repeat each other: of 8 responses to a prompt"),
        ({"rollout__length_mean": falls_to(14.0, 2.0)}, "Responses shrink: 2.0 tokens on average, 14.0 before"),
        ({"rollout__entropy": falls_to(3.0, 0.05)}, "Entropy collapses: 0.05 nats per token, 3 before"),
        ({"trust__tau": 0.0}, "τ is 0.00 at the end"),
        ({"trust__beta": 0.0}, "β was 0 in every step"),
        ({"train__skipped_steps": 3.0}, "3 of 100 steps made no update"),
        ({"rollout__entropy": lambda step: None if step == 50 else 3.0},
         "Values that were not finite, gaps in the curves: rollout/entropy (1 times)."),
        ({"eval__perplexity": lambda step: 10.0 if step < 100 else 20.0},
         "Held-out perplexity rose from 10.00 to 20.00"),
        ({"eval__perplexity": 60.0}, "A bigram model counted on the same tokens predicts held-out text better"),
    ],
)  # fmt: skip
def test_each_is_said_alone(tmp_path: Path, changes: dict[str, Any], start: str) -> None:
    texts = found(tmp_path, **changes)
    assert len(texts) == 1 and texts[0].startswith(start), texts


@pytest.mark.parametrize("changes", [
    {"rollout__distinct_fraction": falls_to(1.0, 0.6)}, {"rollout__length_mean": falls_to(14.0, 9.0)},
    {"rollout__entropy": falls_to(5.0, 0.6)}, {"trust__tau": 0.05}, {"rollout__length_mean": 2.0},
])
def test_what_is_no_bad_sign(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert found(tmp_path, **changes) == []


def test_what_fell_before_alignment_is_no_bad_sign(tmp_path: Path) -> None:
    def learns_to_end(step: int) -> float:
        return 16.0 if step <= 30 else 4.0

    assert found(tmp_path, rollout__length_mean=learns_to_end, trust__beta=lambda step: 0.1 if step > 60 else 0.0) == []


def test_a_crash_says_how_to_go_on(tmp_path: Path) -> None:
    (text,) = found(tmp_path, 60, STARTED)
    assert text.startswith("The run ended without saying so after step 60") and f"asa resume {tmp_path / 'run'}" in text


def test_a_stop_is_no_crash(tmp_path: Path) -> None:
    assert found(tmp_path, 60, STARTED, end("stopped", 60)) == []


def test_lost_prompts_and_no_checkpoint(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    write_rows(run, "trained", {"step": 1, "prompt_ids": [0, 1, 1, 3]})
    (run / "checkpoints/step-00000100/manifest.json").write_text("{")
    texts = warnings(read_run(run))
    assert texts == ["Prompts lost: 1; trained on more than once: 1. Neither should ever happen: see `asa inspect`.",
                     "None of the checkpoints can be used: see `asa inspect`."]


def test_the_last_reason_of_a_skip(tmp_path: Path) -> None:
    skip = {"time": "2026-01-01T00:05:00+00:00", "event": "step_skipped", "step": 7, "reason": "loss/mle is nan"}
    (text,) = found(tmp_path, 100, STARTED, skip, end("finished", 100), train__skipped_steps=1.0)
    assert text.endswith("The last reason: loss/mle is nan")


@pytest.mark.parametrize("name", ["metrics", "samples", "trained"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    run = write_report_run(tmp_path / "run")
    path = run / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{torn", *lines[2:]]) + "\n")
    from asa_dist.report.page import build_page

    assert f"{name}.jsonl, line 2: no JSON object" in build_page(read_run(run))

"""Samples: what the table gets of a long file, and how terms change."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from asa_dist.report.samples import ALL_PROMPTS, FIRST_TERMS, MAX_CHARACTERS, MAX_RESPONSES, read_samples
from tests.report.report_runs import sample


def test_every_reward_term_is_there() -> None:
    row = sample(1, "Once", "a", advantage=1.5, future_term=-0.5)
    found = read_samples(lambda: [row])
    assert found["terms"] == ["advantage", "self", "intrinsic", "signal/fluency", "future_term"]
    assert found["groups"] == [{
        "step": 1, "prompt_id": 1, "tau": 0.4, "prompt": "Once", "responses": [
            {"text": "a", "finished": True, "version": 0, "values": [1.5, 0.25, 0.5, 0.125, -0.5]}]}]


def test_phrasings_of_a_prompt() -> None:
    row = sample(1, "Once", "a")
    row["responses"][0]["prompt"] = "At one time"
    assert read_samples(lambda: [row])["groups"][0]["responses"][0]["prompt"] == "At one time"


def test_terms_against_steps() -> None:
    """Over all groups of a step; and of a prompt that recurs."""
    rows = [sample(1, "Once", self=0.0), sample(1, "Other", self=1.0), sample(11, "Once", self=0.5),
            sample(21, "Once", self=None)]
    trends = {trend["prompt"]: trend for trend in read_samples(lambda: rows)["trends"]}
    assert list(trends) == [ALL_PROMPTS, "Once"] and trends["Once"]["times"] == 3
    (every,) = [series for series in trends[ALL_PROMPTS]["series"] if series["name"] == "self"]
    (once,) = [series for series in trends["Once"]["series"] if series["name"] == "self"]
    assert (every["x"], every["y"]) == ([1, 11, 21], [0.5, 0.5, None])
    assert (once["x"], once["y"]) == ([1, 11, 21], [0.0, 0.5, None])


@pytest.mark.parametrize("group_size", [8, 1024])
def test_a_long_file_is_shown_in_part(group_size: int) -> None:
    texts = ["x" * 10] * group_size
    rows = [sample(step, f"prompt {step}", *texts) for step in range(1, 601 if group_size == 8 else 9)]
    found = read_samples(lambda: rows)
    steps = [group["step"] for group in found["groups"]]
    assert found["num_groups"] == len(rows) and steps == sorted(set(steps))
    assert steps[0] == rows[0]["step"] and steps[-1] == rows[-1]["step"] and len(steps) < len(rows)
    assert len(steps) * group_size <= max(MAX_RESPONSES, 2 * group_size)


def test_long_texts_are_cut() -> None:
    found = read_samples(lambda: [sample(1, "Once", "x" * 10_000)])
    text = found["groups"][0]["responses"][0]["text"]
    assert text == "x" * MAX_CHARACTERS + " … (cut here: 10,000 characters)"


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "x", [1], None])
def test_values_that_no_run_writes_are_missing(value: Any) -> None:
    row = sample(1, "Once", "a", self=value) | {"tau": value, "prompt_id": value}
    row["responses"][0]["version"] = value
    found = read_samples(lambda: [row, sample(2, "Once", "a")])
    group = found["groups"][0]
    response = group["responses"][0]
    assert [group["tau"], group["prompt_id"], response["version"]] == [None] * 3
    assert response["values"][found["terms"].index("self")] is None
    json.dumps(found, allow_nan=False)


def test_all_terms_of_the_rewards_have_their_place() -> None:
    """As training names them; a term that is not named in FIRST_TERMS stands behind all that are."""
    names = "logic fact behav self fact_score uncertainty self_consistency coherence quality certainty intrinsic used"
    found = read_samples(lambda: [sample(1, "Once", "a", **dict.fromkeys([*names.split(), "advantage"], 0.5))])
    assert found["terms"] == [*FIRST_TERMS, "signal/fluency"]


@pytest.mark.parametrize("row", [
    {}, {"step": 1}, {"step": 1, "prompt": "a", "responses": ["text"]}, {"step": 1e300, "prompt": "a", "responses": []},
])  # fmt: skip
def test_rows_that_no_run_writes_are_left_out(row: dict[str, Any]) -> None:
    assert read_samples(lambda: [row])["groups"] == []

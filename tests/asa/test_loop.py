"""The loop, in one process: what it asks for and in which order, when β opens, what it reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from asa_dist.config import Config
from tests.asa.local_run import local_run
from tests.distributed import tiny


def config(**evaluator: Any) -> Config:
    return tiny.config(
        0, 1, 2, evaluator={"embedding_size": 16, **evaluator}, train__eval_every_steps=2,
        metrics={"samples_every_steps": 2}, rollout__max_new_tokens=9,
    )


def test_order_of_work(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.loop.run(0, 3)
    assert run.rollouts.calls == [
        ("publish", 0), ("request", 0), ("take", 0), ("publish", 1), ("request", 1), ("take", 1), ("publish", 2),
        ("request", 2), ("take", 2), ("publish", 3),
    ]
    assert run.saved == [3]
    assert run.recorder.prompt_ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert run.recorder.sampled_steps == [1, 3]


def test_lookahead_asks_for_as_many_steps_as_rollouts_may_be_old(tmp_path: Path) -> None:
    settings = config()
    settings = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"max_policy_age": 2})})
    run = local_run(settings, tmp_path)
    run.loop.run(0, 4)
    asked_before = [("request", step) for step in (0, 1, 2)]
    assert run.rollouts.calls[:5] == [("publish", 0), *asked_before, ("take", 0)]
    assert [call for call in run.rollouts.calls if call[0] == "request"] == [("request", step) for step in range(4)]


def test_metrics(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.loop.run(0, 3)
    first, *steps = run.recorder.rows
    assert first["step"] == 0 and set(first) == {"step", "eval/perplexity", "eval/bigram_perplexity"}
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [("eval/perplexity" in row) for row in steps] == [False, True, True]
    assert all(math.isfinite(value) for row in steps for value in row.values())
    for row in steps:
        assert row["rollout/max_abs_dlogp"] < 1e-4 and row["rollout/policy_age_max"] == 0
        assert sum(row[f"omega/{term}"] for term in ("logic", "fact", "behav")) == pytest.approx(1, abs=1e-5)
        assert 0 < row["rollout/length_mean"] <= 9
        assert row["rollout/importance_mean"] == pytest.approx(1, abs=1e-4)
    assert steps[2]["tokens/corpus"] == 3 * steps[0]["tokens/corpus"]
    assert steps[0]["loss/mle"] == pytest.approx(math.log(97), rel=0.05)


def test_beta_is_closed_until_the_warm_up_ends_and_then_stays_open(tmp_path: Path) -> None:
    run = local_run(config(max_warmup_steps=3), tmp_path)
    run.loop.run(0, 6)
    assert [row["trust/beta"] for row in run.recorder.rows[1:]] == [0, 0, 0, 0.4, 0.4, 0.4]


def test_beta_opens_early_when_trust_is_held(tmp_path: Path) -> None:
    run = local_run(config(warmup_rho=-1.0, warmup_hold_steps=2), tmp_path)
    run.loop.run(0, 4)
    assert [row["trust/beta"] for row in run.recorder.rows[1:]] == [0, 0, 0.4, 0.4]


def test_trust_always_means_tau_one(tmp_path: Path) -> None:
    run = local_run(config(trust="always", max_warmup_steps=0), tmp_path)
    run.loop.run(0, 1)
    assert run.recorder.rows[1]["trust/tau"] == 1.0 and run.recorder.rows[1]["trust/beta"] == 0.4

"""The loop, in one process: what it asks for and in which order, when β opens, what it reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asa_dist.asa.errors import RolloutsUnavailable, TrainingError
from asa_dist.asa.packing import content_of
from asa_dist.config import Config
from asa_dist.records import RolloutGroup
from tests.asa import worlds
from tests.asa.local_run import LocalRun, local_run
from tests.asa.reference_parts import token_weights as reference_weights
from tests.distributed import tiny


def config(*, every_steps: int = 1000, **evaluator: Any) -> Config:
    return tiny.config(
        0, 1, 2, evaluator={"embedding_size": 16, **evaluator}, train__eval_every_steps=2,
        metrics={"samples_every_steps": 2}, rollout__max_new_tokens=9,
        checkpoint={"every_steps": every_steps}, train__max_skipped_steps=2,
    )


def test_order_of_work(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.loop.run(3)
    assert run.rollouts.calls == [
        ("publish", 0), ("request", 0), ("take", 0), ("publish", 1), ("request", 1), ("take", 1), ("publish", 2),
        ("request", 2), ("take", 2),
    ], "nobody needs the last version"
    assert list(run.checkpoints.kept) == [3]
    assert run.recorder.prompt_ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert run.recorder.sampled_steps == [1, 3]


def test_lookahead_asks_for_as_many_steps_as_rollouts_may_be_old(tmp_path: Path) -> None:
    settings = config()
    settings = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"max_policy_age": 2})})
    run = local_run(settings, tmp_path)
    run.loop.run(4)
    asked_before = [("request", step) for step in (0, 1, 2)]
    assert run.rollouts.calls[:5] == [("publish", 0), *asked_before, ("take", 0)]
    assert [call for call in run.rollouts.calls if call[0] == "request"] == [("request", step) for step in range(4)]


def test_metrics(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.loop.run(3)
    first, *steps, last = run.recorder.rows
    assert set(last) == {"step", "time/checkpoint_seconds"}
    assert first["step"] == 0
    assert set(first) == {"step", "eval/perplexity", "eval/bigram_perplexity", "time/evaluation_seconds"}
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
    run.loop.run(6)
    assert [row["trust/beta"] for row in run.recorder.rows[1:-1]] == [0, 0, 0, 0.4, 0.4, 0.4]


def test_beta_opens_early_when_trust_is_held(tmp_path: Path) -> None:
    run = local_run(config(warmup_rho=-1.0, warmup_hold_steps=2), tmp_path)
    run.loop.run(4)
    assert [row["trust/beta"] for row in run.recorder.rows[1:-1]] == [0, 0, 0.4, 0.4]


@pytest.mark.parametrize(("trust", "tau"), [("always", 1.0), ("never", 0.0)])
def test_trust_that_is_not_earned(tmp_path: Path, trust: str, tau: float) -> None:
    run = local_run(config(trust=trust, max_warmup_steps=0), tmp_path)
    run.loop.run(1)
    assert run.recorder.rows[1]["trust/tau"] == tau and run.recorder.rows[1]["trust/beta"] == 0.4


@pytest.mark.parametrize("token_weights", ["informative", "uniform"])
def test_tokens_weigh_what_the_steps_before_say(tmp_path: Path, token_weights: str) -> None:
    run = local_run(config(token_weights=token_weights, token_share_decay=0.5), tmp_path)
    weights, shares = [], []
    train_step, take = run.engine.train_step, run.rollouts.take

    def watched_step(batches: Any, inputs: Any, learning_rates: Any) -> Any:
        weights.append(inputs.token_weight_V.numpy())
        return train_step(batches, inputs, learning_rates)

    def watched_take(step: int) -> list[RolloutGroup]:
        groups = take(step)
        contents = [set(content_of(response).tolist()) for group in groups for response in group.responses]
        shares.append(np.array([np.mean([token in content for content in contents]) for token in range(worlds.VOCAB)]))
        return groups

    run.engine.train_step, run.rollouts.take = watched_step, watched_take  # type: ignore[method-assign]
    run.loop.run(3)
    for step, weight_V in enumerate(weights):
        past = shares[:step] if token_weights == "informative" else []
        np.testing.assert_allclose(weight_V, reference_weights(past, 0.5, worlds.VOCAB), rtol=1e-4)
    assert (weights[0] == 1).all() and len(weights) == 3


def test_the_state_of_another_version_is_named(tmp_path: Path) -> None:
    state = local_run(config(), tmp_path / "a").loop.state_dict()
    del state["alignment.token_share_V"]
    with pytest.raises(TrainingError, match=r"after 2 steps is of another version .*token_share_V"):
        local_run(config(), tmp_path / "b").loop.load_state_dict(2, state)


def losses(run: LocalRun) -> list[float]:
    return [row["loss/total"] for row in run.recorder.rows if "loss/total" in row]


# --- between two steps --------------------------------------------------------------------------------------------
def test_a_checkpoint_holds_everything_the_next_step_needs(tmp_path: Path) -> None:
    """All but the optimizer's state, which is the engine's: here it is taken along."""
    straight = local_run(config(every_steps=2, max_warmup_steps=3), tmp_path / "a")
    straight.loop.run(5)
    assert list(straight.checkpoints.kept) == [2, 4, 5]
    first = local_run(config(max_warmup_steps=3), tmp_path / "b")
    first.loop.run(2)
    state, weights = first.checkpoints.kept[2]
    second = local_run(config(max_warmup_steps=3), tmp_path / "c")
    second.engine.model.load_state_dict(weights)
    second.engine.optimizer.load_state_dict(first.engine.optimizer.state_dict())
    second.loop.load_state_dict(2, state)
    second.loop.run(5)
    assert second.rollouts.calls[0] == ("publish", 2)
    assert losses(first) + losses(second) == losses(straight)
    assert [row["tokens/corpus"] for row in second.recorder.rows if "tokens/corpus" in row] == [
        row["tokens/corpus"] for row in straight.recorder.rows if row["step"] > 2 and "tokens/corpus" in row]
    assert second.checkpoints.kept[5][0].keys() == straight.checkpoints.kept[5][0].keys()
    for name, value in second.checkpoints.kept[5][0].items():
        assert torch.equal(value, straight.checkpoints.kept[5][0][name]), name


def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.loop.stop_code = lambda: 2 if run.loop.finished == 2 else 0
    assert run.loop.run(5) == 2
    assert list(run.checkpoints.kept) == [2] and run.loop.finished == 2
    assert ("publish", 2) not in run.rollouts.calls, "what ends a run may have ended Ray already"


def test_without_rollouts_what_was_trained_is_saved(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.rollouts.unavailable_from = 2
    with pytest.raises(RolloutsUnavailable, match="the workers are gone"):
        run.loop.run(5)
    assert list(run.checkpoints.kept) == [2]
    assert len(run.recorder.prompt_ids) == 2
    assert int(run.checkpoints.kept[2][0]["corpus.rows"]) == 2, "the rows of the step that was not made do not count"


def test_without_rollouts_because_the_run_is_being_stopped(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.rollouts.unavailable_from = 2
    run.loop.stop_code = lambda: 2 if ("take", 2) in run.rollouts.calls else 0
    assert run.loop.run(5) == 2
    assert list(run.checkpoints.kept) == [2]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run_unless_it_is_the_last(tmp_path: Path) -> None:
    run = local_run(config(every_steps=1), tmp_path)
    run.checkpoints.disk_is_full = True
    with pytest.raises(TrainingError, match="last checkpoint, after 3 steps"):
        run.loop.run(3)
    assert len(losses(run)) == 3


def test_a_skipped_step_counts_and_changes_no_state(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.engine.bad_steps = {2}
    run.loop.run(3)
    assert run.recorder.skipped_steps == [2]
    assert [row["step"] for row in run.recorder.rows if "loss/total" in row] == [1, 3]
    assert int(run.loop.state.steps) == 2, "trust and running means have not seen it"
    assert run.recorder.rows[-2]["train/skipped_steps"] == 1
    assert len(run.recorder.prompt_ids) == 3, "its prompts are used up"


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = local_run(config(), tmp_path)
    run.engine.bad_steps = {1, 3, 4}
    with pytest.raises(TrainingError, match=r"2 steps in a row, the last one step 4.*the loss; .*\[12, 13, 14, 15\]"):
        run.loop.run(9)
    assert list(run.checkpoints.kept) == [4]


# --- rollouts of another policy -----------------------------------------------------------------------------------
def mismatched(folder: Path, **rollout: Any) -> LocalRun:
    """The engine's weights are not the published ones."""
    settings = config()
    update = {"mismatch_patience_steps": 2, **rollout}
    run = local_run(settings.model_copy(update={"rollout": settings.rollout.model_copy(update=update)}), folder)
    run.rollouts.noise = 0.3
    return run


def kl_by_step(run: LocalRun) -> dict[int, float]:
    return {int(row["step"]): row["rollout/mismatch_kl"] for row in run.recorder.rows if "rollout/mismatch_kl" in row}


def told(run: LocalRun) -> list[tuple[int, str]]:
    """(step, action) of every event, each said, too."""
    assert [name for name, _ in run.recorder.events] == ["rollout_mismatch"] * len(run.recorder.messages)
    return [(details["step"], details["action"]) for _, details in run.recorder.events]


def test_a_mismatch_is_said_and_training_goes_on(tmp_path: Path) -> None:
    run = mismatched(tmp_path)
    run.loop.run(5)
    assert min(kl_by_step(run).values()) > 0.1 and list(kl_by_step(run)) == [1, 2, 3, 4, 5]
    assert told(run) == [(1, "warn"), (2, "warn")], "one large difference on policy; then that it lasts"
    assert "weights that are not the published ones" not in run.recorder.messages[1], "hf has no other way to be wrong"
    assert "Likely causes" in run.recorder.messages[1]


def test_a_mismatch_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = mismatched(tmp_path, on_mismatch="stop")
    with pytest.raises(TrainingError, match=r"^step 2: .* 2 step\(s\) in a row above .* = 0.1; .*: the run stops$"):
        run.loop.run(5)
    assert told(run)[-1] == (2, "stop")
    assert list(run.checkpoints.kept) == [2] and run.loop.finished == 2


def test_falling_back_mends_a_mismatch(tmp_path: Path) -> None:
    run = mismatched(tmp_path, on_mismatch="fall_back", engine="auto")
    run.loop.run(9)
    assert told(run) == [(1, "warn"), (2, "fall_back")]
    assert run.rollouts.calls.count(("fall_back", 2)) == 1
    assert kl_by_step(run)[3] > 0.1, "it was under way"
    assert max(kl for step, kl in kl_by_step(run).items() if step > 3) < 1e-9
    assert run.loop.finished == 9


def test_a_fall_back_that_does_not_help_ends_the_run(tmp_path: Path) -> None:
    run = mismatched(tmp_path, on_mismatch="fall_back", engine="auto")
    run.rollouts.fall_back = lambda reason: None  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="fall_back: the run stops, as the engine is hf already"):
        run.loop.run(9)
    assert told(run) == [(1, "warn"), (2, "fall_back"), (5, "stop")]


def test_who_ends_anyway_ends_as_asked(tmp_path: Path) -> None:
    run = mismatched(tmp_path, on_mismatch="stop")
    run.loop.stop_code = lambda: 2 if run.loop.finished == 2 else 0
    assert run.loop.run(5) == 2

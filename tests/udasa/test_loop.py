"""A round's training in one process: stages, references, rates, evaluations, and going on from any checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asa_dist.asa.errors import TrainingError
from tests.asa import worlds
from tests.udasa.local_run import NUM_PAIRS, RATES, LocalRun, Ranks, local_run, pair, run_together


def plain_figures(prompt_ids: Sequence[int], logit_V: Tensor, reference_V: Tensor, kl_weight: float) -> dict[str, Any]:
    """Loss, margin and accuracy per pair, KL per token: a loop over tokens in float64."""
    ratio_V = (logit_V.double().log_softmax(0) - reference_V.double().log_softmax(0)).tolist()
    losses, margins, ratios = [], [], []
    for chosen, rejected in ((pair(i).chosen.token_ids, pair(i).rejected.token_ids) for i in prompt_ids):
        margins.append(0.1 * (sum(ratio_V[t] for t in chosen) - sum(ratio_V[t] for t in rejected)))
        losses.append(math.log1p(math.exp(-margins[-1])))
        ratios += [-ratio_V[t] for t in (*chosen, *rejected)]
    kl = np.mean(ratios)
    accuracy = np.mean(np.array(margins) > 0)
    return {"loss": np.mean(losses) + kl_weight * kl, "margin": np.mean(margins), "accuracy": accuracy, "kl": kl}


# --- stages -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["clear_first", "random"])
def test_stages_come_in_order_with_their_pairs_and_rates_and_the_penalty_last(tmp_path: Path, order: str) -> None:
    run = local_run(tmp_path, order=order)
    assert run.loop.run() == 0 and run.loop.is_finished
    stages = run.loop.stages
    expected = [(plan, step, ids) for plan in stages for step, ids in enumerate(plan.pairs_by_step())]
    assert len(stages) == 3 and len(expected) == 9 == run.loop.finished
    assert [step.prompt_ids for step in run.engine.steps] == [ids for _, _, ids in expected]
    assert [step.rate for step in run.engine.steps] == [plan.learning_rate(step) for plan, step, _ in expected]
    assert [step.kl_weight for step in run.engine.steps] == 6 * [0.0] + 3 * [0.25]
    assert run.recorder.prompt_ids == [ids for _, _, ids in expected]
    rows = run.train_rows()
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["udasa/stage"] for row in rows] == [plan.stage + 1 for plan, _, _ in expected]
    assert [row["udasa/pairs"] for row in rows] == [len(ids) for _, _, ids in expected]
    assert [row["lr/psi"] for row in rows] == [step.rate for step in run.engine.steps]
    assert max(step.rate for step in run.engine.steps[:3]) == RATES[0]
    assert max(step.rate for step in run.engine.steps[3:]) == RATES[1]
    assert rows[-1]["tokens/rollout"] == sum(
        len(r.token_ids) for ids in run.recorder.prompt_ids for i in ids for r in (pair(i).chosen, pair(i).rejected))


def test_the_reference_is_the_model_before_the_stage_and_computed_once(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.loop.run()
    assert run.pairs.calls == [("compute", "stage-1", 0), ("compute", "stage-2", 3), ("compute", "stage-3", 6)]
    assert len([row for row in run.recorder.rows if "time/reference_seconds" in row]) == 3
    for row in run.train_rows()[::3]:
        assert row["udasa/margin"] == row["udasa/kl"] == row["udasa/accuracy"] == 0
        assert row["udasa/loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_the_base_is_the_model_before_the_first_stage(tmp_path: Path) -> None:
    run = local_run(tmp_path, reference="base")
    run.loop.run()
    assert run.pairs.calls == [("compute", "base", 0)]
    base_V = torch.zeros(worlds.VOCAB)
    for step, row in zip(run.engine.steps, run.train_rows(), strict=True):
        figures = plain_figures(step.prompt_ids, step.logit_V, base_V, step.kl_weight)
        assert {name: row[f"udasa/{name}"] for name in figures} == pytest.approx(figures, abs=1e-6)
    assert abs(run.train_rows()[3]["udasa/margin"]) > 5e-3, "the second stage does not begin anew"


# --- evaluations ------------------------------------------------------------------------------------------------
def test_held_out_pairs_are_evaluated_from_time_to_time_and_at_the_end_of_a_stage(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.loop.run()
    assert [row["step"] for row in run.train_rows() if "eval/loss" in row] == [2, 3, 5, 6, 8, 9]
    after = [step.logit_V for step in run.engine.steps[1:]] + [run.engine.logit_V.detach()]
    for number, row in enumerate(run.train_rows()):
        if "eval/loss" in row:
            plan, reference_V = run.loop.stages[number // 3], run.engine.steps[number // 3 * 3].logit_V
            figures = plain_figures(plan.heldout_ids, after[number], reference_V, 0.25 * plan.is_last)
            assert {name: row[f"eval/{name}"] for name in figures} == pytest.approx(figures, abs=1e-6)


def test_a_stage_whose_held_out_loss_does_not_fall_ends_early_and_the_next_one_begins_anew(tmp_path: Path) -> None:
    """At a rate of 0 the second evaluation is no better than the first."""
    run = local_run(tmp_path, learning_rates=[0.0], pairs_per_step=1, patience=1)
    run.loop.run()
    assert [plan.num_steps for plan in run.loop.stages] == [8, 8, 8]
    assert [row["udasa/stage"] for row in run.train_rows()] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    ends = run.events("stage_finished")
    assert [(end["step"], end["stage"], end["steps"]) for end in ends] == [(4, 1, 4), (8, 2, 4), (12, 3, 4)]
    assert "held-out loss has not fallen" in ends[0]["reason"]
    assert run.recorder.said[0].startswith("step 4: stage 1 ends after 4 of 8 steps: the held-out loss")


def test_without_held_out_pairs_a_stage_has_all_its_steps(tmp_path: Path) -> None:
    run = local_run(tmp_path, learning_rates=[0.0], heldout_fraction=0.0, pairs_per_step=1, patience=1)
    run.loop.run()
    assert run.loop.finished == NUM_PAIRS
    assert not any(name.startswith("eval/") for row in run.recorder.rows for name in row)
    assert {end["reason"] for end in run.events("stage_finished")} == {"all planned steps are done"}


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.engine.breaks_at = 2
    with pytest.raises(TrainingError, match="held-out loss is nan"):
        run.loop.run()


# --- between two steps ------------------------------------------------------------------------------------------
def assert_ends_like(resumed: LocalRun, straight: LocalRun, first_step: int) -> None:
    """The steps from ``first_step`` on, what was said of them, and what is left at the end."""
    expected = straight.engine.steps[first_step:]
    for step, other in zip(resumed.engine.steps, expected, strict=True):
        assert torch.equal(step.logit_V, other.logit_V)
        assert replace(step, logit_V=0) == replace(other, logit_V=0)
    assert torch.equal(resumed.engine.logit_V, straight.engine.logit_V)
    assert resumed.recorder.prompt_ids == straight.recorder.prompt_ids[first_step:]
    state, other_state = resumed.loop.state_dict(), straight.loop.state_dict()
    assert state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)
    seen, wanted = (
        [{name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}
         for row in run.train_rows() if row["step"] > first_step]
        for run in (resumed, straight)
    )
    assert seen == wanted


@pytest.mark.parametrize("reference", ["stage_start", "base"])
def test_a_run_goes_on_from_any_checkpoint_as_if_it_had_not_ended(tmp_path: Path, reference: str) -> None:
    """Also between two stages, and within the second and third one, which end early."""
    settings = {"reference": reference, "every_steps": 1, "learning_rates": [3.0, 0.0], "pairs_per_step": 1,
                "patience": 2, "eval_every_steps": 1}
    straight = local_run(tmp_path, **settings)
    straight.loop.run()
    ends = straight.events("stage_finished")
    assert ends[0]["steps"] > ends[1]["steps"] == ends[2]["steps"] == 3
    assert list(straight.checkpoints.kept) == list(range(1, straight.loop.finished + 1))
    for step in straight.checkpoints.kept:
        resumed = local_run(tmp_path, **settings)
        resumed.go_on_from(straight, step)
        resumed.loop.run()
        assert_ends_like(resumed, straight, step)
        begun = reference == "base" or step not in {end["step"] for end in ends}
        first_call = resumed.pairs.calls[0][0] if resumed.pairs.calls else None
        assert first_call == (None if step == straight.loop.finished else "load" if begun else "compute")


def test_every_stage_ends_with_a_checkpoint(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.loop.run()
    assert list(run.checkpoints.kept) == [3, 6, 9]
    assert [row["step"] for row in run.recorder.rows if "time/checkpoint_seconds" in row] == [3, 6, 9]


@pytest.mark.parametrize("stop_after", [0, 2, 3, 9])
def test_a_request_to_stop_ends_after_the_step_with_a_checkpoint(tmp_path: Path, stop_after: int) -> None:
    straight = local_run(tmp_path / "straight")
    straight.loop.run()
    stopped = local_run(tmp_path)
    stopped.loop.stop_code = lambda: 2 if stopped.loop.finished == stop_after else 0
    assert stopped.loop.run() == 2 and stopped.loop.finished == stop_after
    assert stopped.loop.is_finished == (stop_after == 9)
    assert len(stopped.pairs.calls) == math.ceil(stop_after / 3), "whoever leaves needs no reference"
    resumed = local_run(tmp_path)
    resumed.go_on_from(stopped, stop_after)
    assert resumed.loop.run() == 0
    assert_ends_like(resumed, straight, stop_after)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run_unless_it_is_the_last(tmp_path: Path) -> None:
    run = local_run(tmp_path, every_steps=1)
    run.checkpoints.disk_is_full = True
    with pytest.raises(TrainingError, match="last checkpoint, after 9 steps"):
        run.loop.run()
    assert len(run.train_rows()) == 9


def test_the_state_of_another_version_is_named(tmp_path: Path) -> None:
    state = local_run(tmp_path).loop.state_dict()
    del state["stopping.loss_to_beat"]
    with pytest.raises(TrainingError, match=r"after 2 steps is of another version .*loss_to_beat"):
        local_run(tmp_path).loop.load_state_dict(2, state)


def test_a_skipped_step_uses_up_its_pairs_and_its_place(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.engine.bad_steps = {2, 6}
    run.loop.run()
    assert run.recorder.skipped_steps == [2, 6]
    assert [row["step"] for row in run.train_rows()] == [1, 3, 4, 5, 7, 8, 9]
    assert run.recorder.prompt_ids == [ids for plan in run.loop.stages for ids in plan.pairs_by_step()]
    assert [row["step"] for row in run.recorder.rows if row.get("train/skipped_steps") == 2] == [6, 7, 8, 9]
    assert torch.equal(run.engine.steps[1].logit_V, run.engine.steps[2].logit_V)


def test_too_many_skipped_steps_in_a_row_end_the_run_which_can_go_on(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    run.engine.bad_steps = {5, 6}  # the last ones of the second stage
    with pytest.raises(TrainingError, match=r"2 steps in a row, the last one step 6, were skipped .*the loss"):
        run.loop.run()
    assert list(run.checkpoints.kept) == [3, 6]
    resumed = local_run(tmp_path)
    resumed.go_on_from(run, 6)
    resumed.loop.run()
    assert [step.prompt_ids for step in resumed.engine.steps] == list(run.loop.stages[2].pairs_by_step())


# --- ranks ------------------------------------------------------------------------------------------------------
def test_more_ranks_than_pairs_train_the_same(tmp_path: Path) -> None:
    """Three ranks of two micro-batches each; two pairs in every stage, of which one is held out."""
    settings = {"num_pairs": 6, "heldout_fraction": 0.5}
    alone = local_run(tmp_path / "alone", **settings)
    alone.loop.run()
    ranks = Ranks(3)
    runs = [local_run(tmp_path / "ranks", ranks=ranks, rank=r, num_ranks=3, **settings) for r in range(3)]
    assert run_together(runs) == [0, 0, 0]
    assert sorted(len(run.engine.steps[0].prompt_ids) for run in runs) == [0, 0, 1]
    for run in runs:
        torch.testing.assert_close(run.engine.logit_V, alone.engine.logit_V, rtol=1e-6, atol=1e-7)
        assert run.recorder.prompt_ids == alone.recorder.prompt_ids
        for row, other in zip(run.train_rows(), alone.train_rows(), strict=True):
            same = [name for name in row if name.startswith(("udasa/", "eval/", "tokens/"))]
            assert len(same) == 11 and [row[n] for n in same] == pytest.approx([other[n] for n in same], abs=1e-6)


@pytest.mark.parametrize("stop_after", [0, 5])
def test_a_request_to_one_rank_stops_all(tmp_path: Path, stop_after: int) -> None:
    ranks = Ranks(2)
    runs = [local_run(tmp_path, ranks=ranks, rank=r, num_ranks=2) for r in range(2)]
    runs[1].loop.stop_code = lambda: 1 if runs[1].loop.finished == stop_after else 0
    assert run_together(runs) == [1, 1]
    assert [list(run.checkpoints.kept) for run in runs] == 2 * [[3, 5] if stop_after else [0]]

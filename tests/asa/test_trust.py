"""What a step hands to the next: running means without start-up bias, trust that stays without evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asa_dist.asa.trust import AlignmentState, StepSummary, average_ranks, spearman
from asa_dist.config import EvaluatorConfig

HIDDEN, DECAY = 5, 0.9


def summary(rng: np.random.Generator, num_pooled: int = 8, valid: int = 2) -> StepSummary:
    return StepSummary(
        rho_sum=0.4 * valid, num_valid_groups=valid, reward_mean_3=torch.from_numpy(rng.normal(size=3)),
        meta_loss=float(rng.random()), pooled_sum_H=torch.from_numpy(rng.normal(size=HIDDEN) * num_pooled),
        pooled_square_sum=float(rng.random()) * num_pooled, num_pooled=num_pooled,
    )


def test_running_means_weigh_recent_steps_and_have_no_start_up_bias() -> None:
    rng = np.random.default_rng(0)
    state = AlignmentState(EvaluatorConfig(running_mean_decay=DECAY), HIDDEN)
    assert state.scale() == 1.0 and state.center().eq(0).all()
    steps = [summary(rng) for _ in range(7)]
    for step in steps:
        state.update(step)
    weights = DECAY ** np.arange(len(steps))[::-1]

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return np.average(np.stack(values), axis=0, weights=weights)

    center = mean([step.pooled_sum_H.numpy() / step.num_pooled for step in steps])
    np.testing.assert_allclose(state.center().numpy(), center, rtol=1e-5)
    square = mean([np.array(step.pooled_square_sum / step.num_pooled) for step in steps])
    assert state.scale() == pytest.approx(float(square) ** -0.5)
    wanted = [np.log(1 + len(steps)), *mean([step.reward_mean_3.numpy() for step in steps])]
    wanted.append(mean([np.array(step.meta_loss) for step in steps]))
    np.testing.assert_allclose(state.progress().numpy(), wanted, rtol=1e-5)


def test_a_step_without_evidence_changes_neither_trust_nor_centre() -> None:
    rng = np.random.default_rng(1)
    state = AlignmentState(EvaluatorConfig(), HIDDEN)
    state.update(summary(rng))
    rho, center, scale = float(state.rho), state.center(), state.scale()
    assert rho == pytest.approx(0.05 * 0.4)
    state.update(summary(rng, num_pooled=0, valid=0))
    assert float(state.rho) == rho and torch.equal(state.center(), center) and state.scale() == scale


def test_state_survives_a_round_trip() -> None:
    rng = np.random.default_rng(2)
    state, copy = (AlignmentState(EvaluatorConfig(), HIDDEN) for _ in range(2))
    state.update(summary(rng))
    copy.load_state_dict(state.state_dict())
    assert copy.tau == state.tau and torch.equal(copy.progress(), state.progress()) and copy.scale() == state.scale()


def test_rounding_does_not_break_ties() -> None:
    values = torch.tensor([[0.3, 0.3 + 3e-8, 0.1, 0.7]])
    assert average_ranks(values).tolist() == [[2.5, 2.5, 1.0, 4.0]]
    other = torch.tensor([[0.2, 0.2, 0.1, 0.9]])
    correlation, valid = spearman(values, other)
    assert valid.tolist() == [True] and float(correlation) == pytest.approx(1.0)

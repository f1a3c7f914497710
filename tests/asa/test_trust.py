"""What a step hands to the next: running means without start-up bias, trust that stays without evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from asa_dist.asa.trust import AlignmentState, StepSummary, average_ranks, spearman
from asa_dist.config import EvaluatorConfig
from asa_kernels import token_f1
from tests.asa.reference_parts import token_weights

HIDDEN, VOCAB, DECAY = 5, 9, 0.9
SMALLEST, LARGEST = 1e-6, 1.0  # weight of a token


def summary(rng: np.random.Generator, num_pooled: int = 8, valid: int = 2) -> StepSummary:
    return StepSummary(
        rho_sum=0.4 * valid, num_valid_groups=valid, reward_mean_3=torch.from_numpy(rng.normal(size=3)),
        meta_loss=float(rng.random()), pooled_sum_H=torch.from_numpy(rng.normal(size=HIDDEN) * num_pooled),
        pooled_square_sum=float(rng.random()) * num_pooled, num_pooled=num_pooled,
        responses_with_V=torch.from_numpy(rng.integers(0, 13, VOCAB).astype(float)), num_responses=12.0,
    )


def test_running_means_weigh_recent_steps_and_have_no_start_up_bias() -> None:
    rng = np.random.default_rng(0)
    state = AlignmentState(EvaluatorConfig(running_mean_decay=DECAY), HIDDEN, VOCAB)
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
    state = AlignmentState(EvaluatorConfig(), HIDDEN, VOCAB)
    state.update(summary(rng))
    rho, center, scale = float(state.rho), state.center(), state.scale()
    assert rho == pytest.approx(0.05 * 0.4)
    state.update(summary(rng, num_pooled=0, valid=0))
    assert float(state.rho) == rho and torch.equal(state.center(), center) and state.scale() == scale


def test_state_survives_a_round_trip() -> None:
    rng = np.random.default_rng(2)
    state, copy = (AlignmentState(EvaluatorConfig(), HIDDEN, VOCAB) for _ in range(2))
    state.update(summary(rng))
    copy.load_state_dict(state.state_dict())
    assert not torch.equal(state.token_weights(), torch.ones(VOCAB))
    for _ in range(2):  # also what the next step makes of it
        assert copy.tau == state.tau and torch.equal(copy.progress(), state.progress())
        assert copy.scale() == state.scale() and torch.equal(copy.token_weights(), state.token_weights())
        step = summary(rng)
        state.update(step)
        copy.update(step)


def test_trust_that_is_not_earned() -> None:
    rng = np.random.default_rng(3)
    always, never = (AlignmentState(EvaluatorConfig(trust=trust), HIDDEN, VOCAB) for trust in ("always", "never"))
    for state, tau in ((always, 1.0), (never, 0.0)):
        state.update(summary(rng))
        assert float(state.rho) > 0 and state.tau == tau


# --- what tokens weigh ----------------------------------------------------------------------------------------------
def after(*responses_with_V: list[float], config: EvaluatorConfig | None = None) -> AlignmentState:
    """The state after steps of 12 responses each, in which each token occurred that often."""
    state = AlignmentState(config or EvaluatorConfig(), HIDDEN, VOCAB)
    for counts in responses_with_V:
        step = summary(np.random.default_rng(4))
        state.update(replace(step, responses_with_V=torch.tensor(counts, dtype=torch.float64)))
    return state


def test_shares_weigh_recent_steps_and_have_no_start_up_bias() -> None:
    counts = np.random.default_rng(5).integers(0, 13, (6, VOCAB)).astype(float)
    state = after(*counts.tolist(), config=EvaluatorConfig(token_share_decay=0.7))
    wanted = token_weights(list(counts / 12), 0.7, VOCAB)
    np.testing.assert_allclose(state.token_weights().numpy(), wanted, rtol=1e-4)


def test_what_everybody_says_weighs_little() -> None:
    state = after(*[[12, 12, 12, 6, 3, 1, 0, 0, 0]] * 30)
    weight_V = state.token_weights()
    assert weight_V.dtype == torch.float32
    assert weight_V[:3].tolist() == pytest.approx([SMALLEST] * 3)
    assert weight_V[3:6].tolist() == pytest.approx(
        [(math.log(odds) / math.log(1000)) ** 2 for odds in (2, 4, 12)], rel=1e-4
    )
    assert weight_V[6:].tolist() == pytest.approx([LARGEST] * 3)
    # three tokens of wording in common and another answer, against one answer in other words
    tokens_PGT = torch.tensor([[[0, 1, 2, 5], [0, 1, 2, 6], [3, 4, 5, 3]]])
    (_, wording, answer), *_ = token_f1(tokens_PGT, torch.full((1, 3), 4), weight_V)[0].tolist()
    assert wording < 1e-5 < 0.7 < answer
    (_, wording, answer), *_ = token_f1(tokens_PGT, torch.full((1, 3), 4), torch.ones(VOCAB))[0].tolist()
    assert (wording, answer) == (0.75, 0.25)


def test_wording_loses_weight_as_it_spreads() -> None:
    weights = [float(after(*([[0.0] * VOCAB] * 20 + [[12.0] * VOCAB] * n)).token_weights()[0]) for n in range(5)]
    assert weights[0] == pytest.approx(LARGEST)
    assert weights == sorted(weights, reverse=True) and weights[1] > 2 * weights[4]


def test_texts_of_nothing_but_the_smallest_weights_still_overlap() -> None:
    weight_V = after([12.0] * VOCAB).token_weights()
    assert weight_V.tolist() == pytest.approx([SMALLEST] * VOCAB)
    tokens_PGT = torch.tensor([[[1, 2, 3, 1], [3, 1, 1, 2], [1, 2, 4, 4]]])
    f1_GG = token_f1(tokens_PGT, torch.full((1, 3), 4), weight_V)[0]
    torch.testing.assert_close(f1_GG, torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]]))


def test_tokens_weigh_alike_before_the_first_step_and_if_uniform() -> None:
    assert after().token_weights().tolist() == [1.0] * VOCAB
    uniform = EvaluatorConfig(token_weights="uniform")
    assert after([3.0] * VOCAB, config=uniform).token_weights().tolist() == [1.0] * VOCAB


def test_rounding_does_not_break_ties() -> None:
    values = torch.tensor([[0.3, 0.3 + 3e-8, 0.1, 0.7]])
    assert average_ranks(values).tolist() == [[2.5, 2.5, 1.0, 4.0]]
    other = torch.tensor([[0.2, 0.2, 0.1, 0.9]])
    correlation, valid = spearman(values, other)
    assert valid.tolist() == [True] and float(correlation) == pytest.approx(1.0)

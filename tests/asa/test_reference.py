"""The slow reference itself, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.asa.reference import (
    RefConfig,
    RefGroup,
    RefParams,
    RefResponse,
    RefResult,
    RefState,
    RefTables,
    is_warming_up,
    reference_step,
)

LN2 = math.log(2)
END, FULL_STOP, SPACE, VOCAB = 0, 12, 1, 100
TABLES = RefTables(claim_end={FULL_STOP, 14}, sentence_end={FULL_STOP}, blank={SPACE}, eos_id=END, vocab_size=VOCAB)
STATE = RefState(step=0, center_H=np.zeros(2), mean_reward_3=np.zeros(3), mean_meta=0.0, tau=0.25, rho=0.2)
# Heads of weight 0: the indicator, every FactScore and every BehaviorScore are ½, and ω = ⅓ each.
PARAMS = RefParams(
    projection_DH=np.eye(2),
    w_left_D=np.zeros(2),
    w_right_D=np.zeros(2),
    bias=0.0,
    verify_H=np.zeros(2),
    verify_bias=0.0,
    principle_MD=np.zeros((4, 2)),
    principle_bias_M=np.zeros(4),
    principle_logit_M=np.zeros(4),
    meta_weight_3x5=np.zeros((3, 5)),
    meta_bias_3=np.zeros(3),
)


def _response(token_ids: list[int], state: Any, probability: float = 0.5, uncertainty: float = 0.2) -> RefResponse:
    """``state``: one vector for all tokens, or one per token. Behaviour policy = today's."""
    num_tokens = len(token_ids)
    middle = np.broadcast_to(np.array(state, dtype=np.float64), (num_tokens, 2)).copy()
    logprob = np.full(num_tokens, math.log(probability))
    return RefResponse(
        token_ids=token_ids,
        finished=token_ids[-1:] == [END],
        middle=middle,
        final=middle + 1,
        logprob=logprob,
        tempered_logprob=logprob.copy(),
        behaviour_logprob=logprob.copy(),
        entropy=np.full(num_tokens, uncertainty * math.log(VOCAB)),
    )


def _pair_of_responses() -> RefGroup:
    """Worked by hand below: cosine 0.6, F1 ⅔, no response with two claims."""
    first = _response([10, 11, FULL_STOP, END], [(1.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, -1.0)])
    second = _response([10, 11, 13], (0.6, 0.8), probability=0.25, uncertainty=0.4)
    # Only with the end-of-text do the means come out as (1, 0), −ln 2 and 0.2.
    first.logprob[:] = [0, -LN2, -LN2, -2 * LN2]
    first.entropy[:] = np.array([0, 0.1, 0.2, 0.5]) * math.log(VOCAB)
    first.behaviour_logprob[-1] -= math.log(4)  # w = 4, capped at 2
    second.behaviour_logprob += LN2  # w = ½
    return RefGroup(prompt_middle=np.array([[2.0, 0.0], [0.0, 0.0]]), responses=[first, second])


def _step(groups: list[RefGroup], params: RefParams = PARAMS, state: RefState = STATE, **knobs: Any) -> RefResult:
    """Without ``substance``, which would be a factor in every figure, unless it is asked for."""
    config = RefConfig(**{"substance": 0.0} | knobs)
    return reference_step(groups, params, state, config, TABLES, corpus_logprobs=[-1.0, -3.0])


# --- a group of two, worked by hand ----------------------------------------------------------------------------
def test_rewards_of_two_responses() -> None:
    result = _step([_pair_of_responses()])
    first, second = result.terms[0]
    assert result.omega == pytest.approx([1 / 3] * 3)
    assert (first.logic, second.logic) == pytest.approx((0.6 * 0.5, 0.6 * 0.5))
    assert (first.fact_score, second.fact_score) == pytest.approx((0.5, 0.5))
    assert (first.uncertainty, second.uncertainty) == pytest.approx((0.2, 0.4))
    assert (first.fact, second.fact) == pytest.approx((0.4, 0.3))
    assert (first.behav, second.behav) == pytest.approx((0.5, 0.5))
    assert (first.self_reward, second.self_reward) == pytest.approx((1.2 / 3, 1.1 / 3))
    assert (first.self_consistency, second.self_consistency) == pytest.approx((2 / 3, 2 / 3))
    assert (first.coherence, second.coherence) == (0.5, 0.5)
    assert first.signals == pytest.approx({"relevance": 1, "non_repetition": 1, "completeness": 1, "fluency": 0.5})
    assert second.signals == pytest.approx({"relevance": 0.6, "non_repetition": 1, "completeness": 0, "fluency": 0.25})
    assert (first.intrinsic, second.intrinsic) == pytest.approx((49 / 72, 391 / 720))


def test_advantages_and_losses_of_two_responses() -> None:
    result = _step([_pair_of_responses()])
    first, second = result.terms[0]
    # std of R_self is 1/60, floored at 1/20: z = ±⅓; of R_intrinsic above the floor: z = ±1; τ = ¼
    assert (first.used, second.used) == pytest.approx((0.25 / 3 + 0.75, -0.25 / 3 - 0.75))
    assert (first.advantage, second.advantage) == pytest.approx((1, -1))
    assert first.importance == pytest.approx([1, 1, 1, 2])
    assert second.importance == pytest.approx([0.5] * 3)

    losses = result.losses
    assert losses.mle == pytest.approx(2)
    # advantages ±1 times Σ w·log-prob: −(0 + 1 + 1 + 2·2)·ln 2 and −½·(2 + 2 + 2)·ln 2, over 7 tokens
    assert losses.self_align_psi == pytest.approx((6 * LN2 - 3 * LN2) / 7)
    # mean log-probs −ln 2 and −2 ln 2 lie ½ ln 2 from their mean
    assert losses.self_align_phi == pytest.approx(-(1.2 / 3 - 1.1 / 3) * 0.5 * LN2 / 2)
    # R_self − R_intrinsic of the one and of the other, each half their difference from the mean
    meta = ((1.2 / 3 - 49 / 72) / 2 - (1.1 / 3 - 391 / 720) / 2) ** 2
    assert losses.meta == pytest.approx(meta)
    assert losses.embedding == pytest.approx((0.6 - 2 / 3) ** 2)
    assert losses.indicator == pytest.approx(LN2)  # of ½, whatever the target
    principles = (0.25 + 0.01) / 2 + 0.25 + (0.25 + 0.25) / 2 + (0 + 0.0625) / 2
    assert losses.principles == pytest.approx(principles)
    self_align = 3 * LN2 / 7 - LN2 / 120
    assert losses.total == pytest.approx(0.5 * 2 + 0.4 * self_align + 0.1 * meta + 1 / 225 + LN2 + principles)


def test_trust_after_two_responses() -> None:
    result = _step([_pair_of_responses()])
    assert result.correlations == {0: pytest.approx(1)}
    assert result.rho == pytest.approx(0.95 * 0.2 + 0.05)
    assert result.tau == result.rho


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"advantage": "group_mean"}, (5 / 6, -5 / 6)),
        ({"advantage": "leave_one_out"}, (5 / 3, -5 / 3)),
        ({"advantage": "none"}, (0.25 * 0.4 + 0.75 * 49 / 72, 0.25 * 1.1 / 3 + 0.75 * 391 / 720)),
        ({"advantage": "none", "trust": "always"}, (0.4, 1.1 / 3)),
        ({"advantage": "group_mean", "trust": "always"}, (1 / 3, -1 / 3)),
        ({"advantage": "none", "trust": "never"}, (49 / 72, 391 / 720)),
    ],
)
def test_other_advantages(knobs: dict[str, str], expected: tuple[float, float]) -> None:
    terms = _step([_pair_of_responses()], **knobs).terms[0]
    assert [term.advantage for term in terms] == pytest.approx(expected)


def test_other_corrections() -> None:
    assert _step([_pair_of_responses()], importance="none").terms[0][0].importance == pytest.approx([1] * 4)
    first, second = _step([_pair_of_responses()], importance="sequence").terms[0]
    assert first.importance == pytest.approx([2] * 4)
    assert second.importance == pytest.approx([1 / 8] * 3)


def test_other_phi_losses() -> None:
    assert _step([_pair_of_responses()], phi_self_align="off").losses.self_align_phi == 0
    # sums of log-probs: −4·ln 2 and −6·ln 2
    expected = (0.4 * 4 * LN2 + 1.1 / 3 * 6 * LN2) / 2
    assert _step([_pair_of_responses()], phi_self_align="paper").losses.self_align_phi == pytest.approx(expected)


def test_meta_loss_of_the_paper() -> None:
    expected = ((1.2 / 3 - 49 / 72) ** 2 + (1.1 / 3 - 391 / 720) ** 2) / 2
    assert _step([_pair_of_responses()], meta_loss="paper").losses.meta == pytest.approx(expected)


def test_intrinsic_reward_with_weights() -> None:
    """Mean log-probabilities −ln 2 and, made very unlikely, −3, which counts as −2."""
    group = _pair_of_responses()
    group.responses[1].logprob[:] = [-3.0, -2.0, -4.0]
    weights = {"self_consistency": 3.0, "coherence": 0.0, "quality": 1.0, "certainty": 4.0}
    first, second = _step([group], intrinsic=weights).terms[0]
    assert first.intrinsic == pytest.approx((3 * 2 / 3 + 3.5 / 4 + 4 * (1 - LN2)) / 8)
    assert second.intrinsic == pytest.approx((3 * 2 / 3 + (1.6 + math.exp(-3)) / 4 + 4 * -1) / 8)


def test_votes_and_token_weights() -> None:
    """Token 10 weighs 1, 11 weighs 4, the full stop 9, the rarest ones ln² 1000; the end-of-text has no part in it."""
    share_V = np.full(VOCAB, 1.0)
    share_V[[10, 11, FULL_STOP, END]] = np.exp([-1.0, -2.0, -3.0, -4.0])
    state = replace(STATE, share_history=[share_V])
    group = _pair_of_responses()
    group.responses[1] = _response([10, 10, FULL_STOP], (0.6, 0.8))
    group.responses += [_response([11, 11], (1.0, 1.0)), _response([], (0.0, 0.0))]
    group.responses[1].logprob[:] = [-1.0, -1.0, -0.5]
    group.responses[2].logprob[:] = [-0.5, -1.5]
    terms = _step([group], state=state, vote_sharpness=2.0).terms[0]
    # log-probabilities 0, −ln 2, −ln 2 of the first; to all of them one sure token of the rarest kind is added
    rarest = math.log(1000) ** 2
    sureties = (-LN2 * (4 + 9) / (rarest + 14), -6.5 / (rarest + 11), -8 / (rarest + 8))
    votes = [math.exp(2 * surety) for surety in sureties]
    # first and second share 10 and the full stop, first and third 11
    f1_12, f1_13 = 2 * 10 / (14 + 11), 2 * 4 / (14 + 8)
    assert terms[0].self_consistency == pytest.approx((f1_12 * votes[1] + f1_13 * votes[2]) / (votes[1] + votes[2]))
    assert terms[1].self_consistency == pytest.approx(f1_12 * votes[0] / (votes[0] + votes[2]))
    assert terms[2].self_consistency == pytest.approx(f1_13 * votes[0] / (votes[0] + votes[1]))
    assert terms[3].self_consistency == 0
    uniform = _step([group], state=state, token_weights="uniform", vote_sharpness=0.0).terms[0]
    assert uniform[0].self_consistency == pytest.approx((2 / 3 + 2 / 5) / 2)


def test_who_says_little_earns_little() -> None:
    """Token 10 weighs 1, the full stop nothing to speak of."""
    share_V = np.full(VOCAB, 1e-3)
    share_V[FULL_STOP] = 1.0
    responses = [_response(tokens, (1.0, 0.0)) for tokens in ([10, 10, END], [FULL_STOP, END])]
    group = RefGroup(np.array([[1.0, 0.0]]), responses)
    state = replace(STATE, share_history=[share_V])
    plain, graded = (_step([group], state=state, substance=half).terms[0] for half in (0.0, 0.5))
    for before, after, factor in zip(plain, graded, (2 / 2.5, 1e-6 / (1e-6 + 0.5)), strict=True):
        assert after.substance == pytest.approx(factor)
        assert after.intrinsic == pytest.approx(factor * before.intrinsic) and before.intrinsic > 0.1
        assert after.self_reward == pytest.approx(factor * before.self_reward) and before.self_reward > 0.1


def test_siblings_are_relevant_to_the_phrasing_they_answer() -> None:
    responses = [_response([10, 11, 13], (1.0, 0.0)) for _ in range(4)]
    group = RefGroup(np.array([[1.0, 0.0]]), responses, [np.array([[0.0, 2.0], [2.0, 0.0]])])
    relevances = [term.signals["relevance"] for term in _step([group]).terms[0]]
    assert relevances == pytest.approx([1, math.sqrt(0.5)] * 2)


def test_token_shares_are_of_the_contents() -> None:
    """Of the two responses one has the end-of-text, which is no content."""
    share_V = _step([_pair_of_responses()]).token_share
    assert [share_V[token] for token in (10, 11, FULL_STOP, 13, END)] == [1, 1, 0.5, 0.5, 0]
    assert share_V.sum() == 3


def test_warm_up_removes_both_self_align_losses_from_the_total() -> None:
    losses = _step([_pair_of_responses()], state=replace(STATE, warming_up=True)).losses
    assert losses.self_align_psi != 0
    assert losses.total == pytest.approx(
        1 + 0.1 * losses.meta + losses.embedding + losses.indicator + losses.principles
    )


# --- heads, one at a time --------------------------------------------------------------------------------------
def test_heads_with_weights() -> None:
    params = replace(
        PARAMS,
        projection_DH=np.diag([1.0, -1.0]),
        w_left_D=np.array([1.0, 0.0]),
        w_right_D=np.array([0.0, 2.0]),
        bias=0.5,
        verify_H=np.array([0.0, 1.0]),
        verify_bias=-1.0,
        principle_MD=np.array([[1.0, 0.0]] + [[0.0, 0.0]] * 3),
        principle_bias_M=np.array([0.0, 1.0, 0.0, 0.0]),
        principle_logit_M=np.array([math.log(3), 0.0, 0.0, 0.0]),
    )
    result = _step([_pair_of_responses()], params=params)
    first, second = result.terms[0]

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    # embeddings (1, 0) and (0.6, −0.8); claims (1, ⅓), without the end-of-text, and (0.6, 0.8)
    assert first.logic == pytest.approx(0.6 * sigma(1 - 1.6 + 0.5))
    assert second.logic == pytest.approx(0.6 * sigma(0.6 + 0 + 0.5))
    assert (first.fact_score, second.fact_score) == pytest.approx((sigma(1 / 3 - 1), sigma(0.8 - 1)))
    assert first.behav == pytest.approx(sigma(1) / 2 + sigma(1) / 6 + 0.5 / 3)
    assert second.behaviour_scores["relevance"] == pytest.approx(sigma(0.6))
    logits = (1 - 1.6 + 0.5, 0.6 + 0.5)
    expected = [-2 / 3 * math.log(sigma(x)) - 1 / 3 * math.log(1 - sigma(x)) for x in logits]
    assert result.losses.indicator == pytest.approx(sum(expected) / 2)


def test_omega_follows_progress() -> None:
    weight = np.zeros((3, 5))
    weight[0, 0], weight[1, 2], weight[2, 4] = 1.0, 2.0, -1.0
    params = replace(PARAMS, meta_weight_3x5=weight, meta_bias_3=np.array([0.0, 0.0, 0.5]))
    state = replace(STATE, step=1, mean_reward_3=np.array([9.0, 0.25, 9.0]), mean_meta=0.5)
    # logits ln 2, ½ and 0
    exponentials = np.array([2.0, math.exp(0.5), 1.0])
    expected = 0.05 + 0.85 * exponentials / exponentials.sum()
    assert _step([_pair_of_responses()], params, state).omega == pytest.approx(expected)


def test_centre_is_subtracted_from_prompt_response_and_claims() -> None:
    state = replace(STATE, center_H=np.array([1.0, 1.0]))
    first, second = (_response([10, 11, 13], vector) for vector in ((2.0, 1.0), (1.0, 3.0)))
    params = replace(PARAMS, verify_H=np.array([1.0, 0.0]))
    group = RefGroup(np.array([[2.0, 2.0]]), [first, second])
    terms = _step([group], params, state).terms[0]
    assert terms[0].logic == pytest.approx(0)  # (1, 0) and (0, 2)
    assert terms[0].signals["relevance"] == pytest.approx(math.sqrt(0.5))
    assert terms[0].fact_score == pytest.approx(1 / (1 + math.exp(-1)))


def test_raw_embedding_pools_final_states_without_centre_or_projection() -> None:
    state = replace(STATE, center_H=np.array([7.0, 7.0]))
    params = replace(PARAMS, projection_DH=np.full((2, 2), np.nan), verify_H=np.array([1.0, 0.0]))
    first, second = _response([10, 11, 13], (0.0, -1.0)), _response([10, 11, 13], (2.0, 3.0))
    terms = _step([RefGroup(np.ones((1, 2)), [first, second])], params, state, embedding="raw").terms[0]
    assert terms[0].logic == pytest.approx(0.5 * 0.6)  # final states (1, 0) and (3, 4)
    assert terms[1].fact_score == pytest.approx(1 / (1 + math.exp(-3)))


# --- coherence, empty responses --------------------------------------------------------------------------------
def test_coherence_of_claims_and_of_the_responses_without() -> None:
    """Claims pool to (1, 0), (1, 1), (0, 1): neighbouring cosines √½ and √½."""
    claim = [10, 11, FULL_STOP]
    three_claims = _response(claim * 3, [(1.0, 0.0)] * 3 + [(1.0, 1.0)] * 3 + [(0.0, 1.0)] * 3)
    two_claims = _response(claim * 2, [(1.0, 0.0)] * 3 + [(-1.0, 0.0)] * 3)
    one_claim = _response([10, 11, 13], (1.0, 0.0))
    group = RefGroup(np.ones((1, 2)), [three_claims, two_claims, one_claim, _response([END], (1.0, 0.0))])
    coherences = [term.coherence for term in _step([group]).terms[0]]
    assert coherences == pytest.approx([math.sqrt(0.5), -1, (math.sqrt(0.5) - 1) / 2, 0])


def test_empty_responses_have_zero_rewards_and_no_pairs() -> None:
    group = _pair_of_responses()
    full = _step([group])
    group.responses += [_response([], (0.0, 0.0)), _response([END], (5.0, 5.0))]
    result = _step([group])
    for term in result.terms[0][2:]:
        numbers = (term.logic, term.fact, term.behav, term.self_reward, term.self_consistency, term.coherence)
        assert (*numbers, term.quality, term.intrinsic, *term.signals.values()) == (0,) * 12
    assert result.terms[0][0].logic == pytest.approx(full.terms[0][0].logic / 3)  # divisor G − 1
    # who says nothing has no vote: neither no tokens, nor the end-of-text alone, however sure the model is of that
    assert [term.self_consistency for term in result.terms[0][:2]] == pytest.approx([2 / 3, 2 / 3])
    for name in ("embedding", "indicator", "principles"):
        assert getattr(result.losses, name) == pytest.approx(getattr(full.losses, name))
    # φ: the end-of-text alone has a log-probability, but reward 0; the group mean is over −1, −2, −1 times ln 2
    rewards = [term.self_reward for term in result.terms[0]]
    expected = -(rewards[0] * LN2 / 3 - rewards[1] * 2 * LN2 / 3) / 4
    assert result.losses.self_align_phi == pytest.approx(expected)
    assert [len(term.importance) for term in result.terms[0]] == [4, 3, 0, 1]


def test_a_batch_without_any_token_costs_only_the_corpus_loss() -> None:
    result = _step([RefGroup(np.ones((1, 2)), [_response([], (0.0, 0.0)), _response([], (0.0, 0.0))])])
    assert result.losses.total == pytest.approx(0.5 * 2)
    assert result.correlations == {}
    assert result.rho == STATE.rho


def test_normalisers_are_of_the_global_batch() -> None:
    """The second group: more tokens, no pairs, no self-consistency."""
    small, large = (
        _pair_of_responses(),
        RefGroup(np.ones((1, 2)), [_response([10] * 9, (1.0, 0.0)), _response([], 0.0)]),
    )
    alone, beside, both = _step([small]).losses, _step([large]).losses, _step([small, large]).losses
    assert both.self_align_psi == pytest.approx((7 * alone.self_align_psi + 9 * beside.self_align_psi) / 16)
    assert both.meta == pytest.approx((alone.meta + beside.meta) / 2)
    assert both.embedding == pytest.approx(alone.embedding)


def test_signals_read_the_visible_content() -> None:
    full_stop_then_space = _response([10, 10, 10, 10, 10, FULL_STOP, SPACE, END], (1.0, 0.0))
    cut_off = _response([10, 11, FULL_STOP], (-1.0, 0.0))
    first, second = _step([RefGroup(np.array([[1.0, 0.0]]), [full_stop_then_space, cut_off])]).terms[0]
    assert first.signals["completeness"] == 1
    assert first.signals["non_repetition"] == pytest.approx(3 / 5)
    assert (second.signals["completeness"], second.signals["relevance"]) == (0, 0)


def test_finished_contradicting_the_tokens_is_an_error() -> None:
    group = _pair_of_responses()
    group.responses[1].finished = True
    with pytest.raises(ValueError, match="finished is True"):
        _step([group])


# --- trust -----------------------------------------------------------------------------------------------------
def test_trust_averages_the_valid_groups() -> None:
    """The second group's better response is the less certain one; the third group is flat in R_self."""
    agree, flat = _pair_of_responses(), _pair_of_responses()
    flat.responses[1].entropy = np.full(3, 0.2 * math.log(VOCAB))
    disagree = _pair_of_responses()
    disagree.responses[0].entropy *= 4
    result = _step([agree, disagree, flat], state=replace(STATE, rho=-0.4))
    assert result.correlations == {0: pytest.approx(1), 1: pytest.approx(-1)}
    assert result.rho == pytest.approx(-0.38)
    assert result.tau == 0


def test_warm_up_ends_by_agreement_or_by_time() -> None:
    config = RefConfig(warmup_rho=0.3, warmup_hold_steps=3, max_warmup_steps=8)
    assert is_warming_up([], config)
    assert is_warming_up([0.3, 0.4, 0.29, 0.5, 0.5], config)
    assert not is_warming_up([0.3, 0.4, 0.3], config)
    assert not is_warming_up([0.3, 0.4, 0.3, 0.0], config)  # it stays over
    assert not is_warming_up([0.0] * 8, config)
    assert not is_warming_up([], replace(config, max_warmup_steps=0))

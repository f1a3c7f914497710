"""Every reward term, ω, τ and each loss against the slow float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from asa_dist.asa.heads import Evaluator, MetaOptimizer
from asa_dist.asa.objective import FusedOutput, GlobalCounts, StepCoefficients, TokenScores, fused_loss
from asa_dist.asa.packing import MicroBatch, corpus_batch, join, pack_groups
from asa_dist.asa.states import pool_states
from asa_dist.asa.trust import AlignmentState, StepSummary
from asa_dist.config import EvaluatorConfig, ObjectiveConfig
from asa_dist.records import RolloutGroup
from tests.asa import worlds
from tests.asa.reference import (
    RefConfig,
    RefGroup,
    RefParams,
    RefResponse,
    RefResult,
    RefState,
    RefTables,
    reference_step,
)

HIDDEN, EMBEDDING, ROW = 12, 7, 48
TAU, RHO, STEP, SCALE = 0.35, 0.35, 41, 0.6
TERMS = {
    "logic": "logic",
    "fact": "fact",
    "fact_score": "fact_score",
    "uncertainty": "uncertainty",
    "behav": "behav",
    "self": "self_reward",
    "self_consistency": "self_consistency",
    "coherence": "coherence",
    "quality": "quality",
    "intrinsic": "intrinsic",
    "used": "used",
    "advantage": "advantage",
}
REF_TABLES = RefTables(
    claim_end={3, 5, 7, 11}, sentence_end={3, 5}, blank={worlds.EOS, 7}, eos_id=worlds.EOS, vocab_size=worlds.VOCAB
)


@dataclass
class World:
    """One global batch with random trunk outputs, heads and state."""

    groups: list[RolloutGroup]
    batch: MicroBatch
    middle_NH: torch.Tensor
    final_NH: torch.Tensor
    scores: TokenScores
    evaluator: Evaluator
    meta: MetaOptimizer
    state: AlignmentState
    evaluator_config: EvaluatorConfig
    objective_config: ObjectiveConfig


def make_world(seed: int, group_size: int, evaluator: dict[str, Any], objective: dict[str, Any]) -> World:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    groups = worlds.groups(rng, group_size)
    ids = torch.from_numpy(rng.integers(1, worlds.VOCAB, (3, ROW)))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    corpus = corpus_batch(ids, torch.arange(ROW).expand(3, ROW), torch.zeros_like(ids), targets)
    batch = join(corpus, pack_groups(groups, ROW, worlds.TABLES, version=0))
    num_tokens = batch.input_ids_RT.numel()
    predicts = (batch.target_RT != -100).flatten()
    logprob_N = -torch.empty(num_tokens).exponential_(0.5) * predicts
    tempered_N = (logprob_N + 0.3 * torch.randn(num_tokens)) * predicts
    entropy_N = torch.rand(num_tokens) * np.log(worlds.VOCAB) * predicts
    evaluator_config, objective_config = (
        EvaluatorConfig(embedding_size=EMBEDDING, **evaluator),
        ObjectiveConfig(**objective),
    )
    learned = evaluator_config.embedding == "learned"
    heads = Evaluator(HIDDEN, EMBEDDING if learned else None, len(evaluator_config.principles))
    meta = MetaOptimizer(evaluator_config.omega_floor)
    with torch.no_grad():
        for parameter in (*heads.parameters(), *meta.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    state = AlignmentState(evaluator_config, HIDDEN)
    state.rho.fill_(RHO)
    state.steps.fill_(STEP)
    state.reward_mean_3.copy_(torch.tensor([0.2, -0.1, 0.4]) * 0.5)
    state.meta_mean.fill_(0.03 * 0.5)
    state.mean_weight.fill_(0.5)
    state.center_sum_H.copy_(torch.randn(HIDDEN) * 0.3 * 0.5)
    state.center_weight.fill_(0.5)
    state.square_sum.fill_(0.5 / SCALE**2)
    middle_NH = torch.randn(num_tokens, HIDDEN) + 0.5
    for index in range(len(groups) * group_size):  # the copies of a prompt have equal states
        own, first = ((batch.groups.prompt_N == i).nonzero().flatten() for i in (index, index - index % group_size))
        middle_NH[own] = middle_NH[first]
    return World(
        groups,
        batch,
        middle_NH,
        torch.randn(num_tokens, HIDDEN) - 0.2,
        TokenScores(logprob_N.requires_grad_(), tempered_N, entropy_N),
        heads,
        meta,
        state,
        evaluator_config,
        objective_config,
    )


def ours(world: World) -> tuple[FusedOutput, GlobalCounts]:
    counts = GlobalCounts(*GlobalCounts.of(world.batch).tolist())
    groups = world.batch.groups
    states = pool_states(
        world.middle_NH,
        world.final_NH,
        world.state.center(),
        world.state.scale(),
        groups,
        world.evaluator_config.embedding,
    )
    heads = world.evaluator(states.evaluator_response_PGH, states.evaluator_claim_CH, groups.content_length_PG > 0)
    coefficients = StepCoefficients(
        world.objective_config.alpha, world.objective_config.beta, world.objective_config.gamma, world.state.tau
    )
    output = fused_loss(
        world.batch,
        world.scores,
        states,
        heads,
        world.meta(world.state.progress()),
        coefficients,
        counts,
        worlds.VOCAB,
        world.evaluator_config,
        world.objective_config,
    )
    return output, counts


def reference(world: World) -> RefResult:
    groups, config = world.batch.groups, world.evaluator_config
    per_position = {
        name: value.detach().double().numpy()
        for name, value in (
            ("middle", world.middle_NH),
            ("final", world.final_NH),
            ("logprob", world.scores.logprob_N),
            ("tempered_logprob", world.scores.tempered_logprob_N),
            ("entropy", world.scores.entropy_N),
        )
    }
    ref_groups = []
    for g, group in enumerate(world.groups):
        responses = []
        for i, response in enumerate(group.responses):
            index = g * len(group.responses) + i
            at = (groups.response_N == index).nonzero().flatten().numpy()
            before = (groups.predicts_N == index).nonzero().flatten().numpy()
            assert len(at) == len(before) == len(response.token_ids)
            responses.append(
                RefResponse(
                    response.token_ids.tolist(),
                    response.finished,
                    per_position["middle"][at],
                    per_position["final"][at],
                    per_position["logprob"][before],
                    per_position["tempered_logprob"][before],
                    response.behaviour_logprob_T.astype(np.float64),
                    per_position["entropy"][before],
                )
            )
        prompt_at = (groups.prompt_N == g * len(group.responses)).nonzero().flatten().numpy()
        ref_groups.append(RefGroup(per_position["middle"][prompt_at], responses))
    p = {name: value.detach().double().numpy() for name, value in world.evaluator.named_parameters()}
    m = {name: value.detach().double().numpy() for name, value in world.meta.named_parameters()}
    params = RefParams(
        p["projection_DH"] * SCALE if "projection_DH" in p else np.eye(HIDDEN),  # weights absorb the scale
        p["consistency_left_D"],
        p["consistency_right_D"],
        float(p["consistency_bias"][0]),
        p["verify_H"] * (SCALE if "projection_DH" in p else 1),
        float(p["verify_bias"][0]),
        p["principle_MD"],
        p["principle_bias_M"],
        p["principle_logit_M"],
        m["weight_3F"],
        m["bias_3"],
    )
    state = RefState(STEP, world.state.center().double().numpy(), np.array([0.2, -0.1, 0.4]), 0.03, TAU, RHO)
    names = set(RefConfig.__dataclass_fields__)
    knobs = {**config.model_dump(), **world.objective_config.model_dump()}
    ref_config = RefConfig(**{name: value for name, value in knobs.items() if name in names})
    corpus = per_position["logprob"][(world.batch.is_corpus_RT & (world.batch.target_RT != -100)).flatten().numpy()]
    return reference_step(ref_groups, params, state, ref_config, REF_TABLES, corpus.tolist())


CASES = [
    pytest.param({}, {}, id="defaults"),
    pytest.param(
        {"embedding": "raw", "trust": "always", "omega_floor": 0.0},
        {
            "advantage": "none",
            "phi_self_align": "paper",
            "importance": "none",
            "embedding_loss_weight": 0.0,
            "indicator_loss_weight": 0.0,
            "principle_loss_weight": 0.0,
        },
        id="paper-letter",
    ),
    pytest.param(
        {"uncertainty_weight": 0.1, "principles": ["non_repetition", "fluency"]},
        {"advantage": "group_mean", "importance": "sequence", "importance_cap": 1.5},
        id="sequence",
    ),
    pytest.param(
        {"omega_floor": 0.2}, {"advantage": "leave_one_out", "phi_self_align": "off", "beta": 0.7}, id="leave-one-out"
    ),
]


@pytest.mark.parametrize("group_size", [2, 5])
@pytest.mark.parametrize(("evaluator", "objective"), CASES)
def test_terms_and_losses(group_size: int, evaluator: dict[str, Any], objective: dict[str, Any]) -> None:
    world = make_world(group_size, group_size, evaluator, objective)
    output, _ = ours(world)
    expected = reference(world)
    for name, attribute in TERMS.items():
        actual = output.terms[name].double().numpy()
        wanted = np.array([[getattr(term, attribute) for term in group] for group in expected.terms])
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-6, err_msg=name)
    for name in world.evaluator_config.principles:
        wanted = np.array([[term.signals[name] for term in group] for group in expected.terms])
        np.testing.assert_allclose(
            output.terms[f"signal/{name}"].double().numpy(), wanted, rtol=2e-5, atol=2e-6, err_msg=name
        )
    losses, config = expected.losses, world.objective_config
    wanted_losses = {
        "loss/mle": losses.mle,
        "loss/self_align": losses.self_align_psi + losses.self_align_phi,
        "loss/meta": losses.meta,
        "loss/heads": (
            config.embedding_loss_weight * losses.embedding
            + config.indicator_loss_weight * losses.indicator
            + config.principle_loss_weight * losses.principles
        ),
        "loss/total": losses.total,
    }
    for name, value in wanted_losses.items():
        assert float(output.sums[name]) == pytest.approx(value, rel=2e-5, abs=2e-6), name
    omega = [float(output.sums[f"omega/{name}"]) for name in ("logic", "fact", "behav")]
    np.testing.assert_allclose(omega, expected.omega, rtol=1e-5)
    assert int(output.sums["trust/valid_groups"]) == len(expected.correlations)
    assert float(output.sums["trust/rho_sum"]) == pytest.approx(sum(expected.correlations.values()), abs=1e-5)


def test_trust_after_the_step() -> None:
    world = make_world(3, 5, {}, {})
    output, counts = ours(world)
    expected = reference(world)
    world.state.update(
        StepSummary(
            float(output.sums["trust/rho_sum"]),
            float(output.sums["trust/valid_groups"]),
            torch.stack([output.sums[f"reward/{name}"] for name in ("logic", "fact", "behav")]) / counts.responses,
            float(output.sums["loss/meta"]),
            output.sums["pooled_sum"],
            float(output.sums["pooled_square_sum"]),
            counts.contentful,
        )
    )
    assert float(world.state.rho) == pytest.approx(expected.rho, rel=1e-6)
    assert world.state.tau == pytest.approx(expected.tau, rel=1e-6)
    assert 0 < len(expected.correlations) < len(world.groups), "the world should hold valid and invalid groups"


def test_empty_response_earns_nothing() -> None:
    output, _ = ours(make_world(4, 3, {}, {}))
    for name in TERMS:
        if name not in ("used", "advantage"):
            assert output.terms[name][1, :2].eq(0).all(), name
            assert output.terms[name][4].eq(0).all(), name


def test_gradients_reach_only_their_part() -> None:
    """ψ through log-probabilities only; φ and ξ from detached states."""
    world = make_world(5, 4, {}, {})
    output, _ = ours(world)
    output.loss.backward()
    assert world.scores.logprob_N.grad is not None
    assert world.scores.logprob_N.grad.abs().sum() > 0
    for name, parameter in (*world.evaluator.named_parameters(), *world.meta.named_parameters()):
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name

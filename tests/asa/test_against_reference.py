"""Every reward term, ω, τ and each loss against the slow float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from asa_dist.asa.heads import Evaluator, MetaOptimizer
from asa_dist.asa.objective import (
    FusedOutput,
    GlobalCounts,
    StepCoefficients,
    StepInputs,
    TokenScores,
    fused_loss,
)
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
from tests.asa.reference_parts import token_weights

HIDDEN, EMBEDDING, ROW = 12, 7, 48
TAU, RHO, STEP, SCALE = 0.35, 0.35, 41, 0.6
NUM_SHARES = 3  # steps whose token shares the state has seen
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
    "certainty": "certainty",
    "substance": "substance",
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
    share_history: list[np.ndarray]
    evaluator_config: EvaluatorConfig
    objective_config: ObjectiveConfig


def share_history(rng: np.random.Generator) -> list[np.ndarray]:
    """[V] per step: most tokens in some responses, one in all of them, one in none."""
    history = [rng.random(worlds.VOCAB) ** 3 for _ in range(NUM_SHARES)]
    for share_V in history:
        share_V[[20, 21]] = (1.0, 0.0)
    return history


def make_state(config: EvaluatorConfig, history: list[np.ndarray]) -> AlignmentState:
    """As after STEP steps, the last of which had the shares of ``history``."""
    state = AlignmentState(config, HIDDEN, worlds.VOCAB)
    for share_V in history:
        shares = {"responses_with_V": torch.from_numpy(share_V * 40), "num_responses": 40.0}
        state.update(StepSummary(0.0, 0.0, torch.zeros(3), 0.0, torch.zeros(HIDDEN), 0.0, 0.0, **shares))
    state.rho.fill_(RHO)
    state.steps.fill_(STEP)
    state.reward_mean_3.copy_(torch.tensor([0.2, -0.1, 0.4]) * 0.5)
    state.meta_mean.fill_(0.03 * 0.5)
    state.mean_weight.fill_(0.5)
    state.center_sum_H.copy_(torch.randn(HIDDEN) * 0.3 * 0.5)
    state.center_weight.fill_(0.5)
    state.square_sum.fill_(0.5 / SCALE**2)
    return state


def make_world(
    seed: int, group_size: int, evaluator: dict[str, Any], objective: dict[str, Any], num_variants: int = 0
) -> World:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    groups = worlds.groups(rng, group_size, num_variants=num_variants)
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
    history = share_history(rng)
    state = make_state(evaluator_config, history)
    middle_NH = torch.randn(num_tokens, HIDDEN) + 0.5
    for index in range(len(groups) * group_size):  # the copies of a phrasing have equal states
        sibling = index % group_size
        same = index - sibling + sibling % (1 + num_variants)
        own, first = ((batch.groups.prompt_N == i).nonzero().flatten() for i in (index, same))
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
        history,
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
    inputs = StepInputs(
        coefficients,
        counts,
        world.state.center(),
        world.state.scale(),
        world.state.progress(),
        world.state.token_weights(),
    )
    output = fused_loss(
        world.batch,
        world.scores,
        states,
        heads,
        world.meta(inputs.progress_F),
        inputs,
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
        phrasings = [
            per_position["middle"][(groups.prompt_N == g * len(group.responses) + k).nonzero().flatten().numpy()]
            for k in range(len(group.prompt.phrasings))
        ]
        ref_groups.append(RefGroup(phrasings[0], responses, phrasings[1:]))
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
    state = RefState(
        STEP,
        world.state.center().double().numpy(),
        np.array([0.2, -0.1, 0.4]),
        0.03,
        TAU,
        RHO,
        share_history=world.share_history,
    )
    names = set(RefConfig.__dataclass_fields__)
    knobs = {**config.model_dump(), **world.objective_config.model_dump()}
    ref_config = RefConfig(**{name: value for name, value in knobs.items() if name in names})
    corpus = per_position["logprob"][(world.batch.is_corpus_RT & (world.batch.target_RT != -100)).flatten().numpy()]
    return reference_step(ref_groups, params, state, ref_config, REF_TABLES, corpus.tolist())


CASES = [
    pytest.param({}, {}, 0, id="defaults"),
    pytest.param(
        {
            "embedding": "raw",
            "trust": "always",
            "omega_floor": 0.0,
            "token_weights": "uniform",
            "vote_sharpness": 0.0,
        },
        {
            "meta_loss": "paper",
            "advantage": "none",
            "phi_self_align": "paper",
            "importance": "none",
            "embedding_loss_weight": 0.0,
            "indicator_loss_weight": 0.0,
            "principle_loss_weight": 0.0,
        },
        0,
        id="paper-letter",
    ),
    pytest.param(
        {
            "uncertainty_weight": 0.1,
            "principles": ["non_repetition", "fluency"],
            "vote_sharpness": 0.0,
            "substance": 0.0,
            "token_share_decay": 0.5,
            "intrinsic": {"self_consistency": 2.0, "coherence": 0.5, "quality": 0.0, "certainty": 0.7},
        },
        {"advantage": "group_mean", "importance": "sequence", "importance_cap": 1.5},
        0,
        id="sequence",
    ),
    pytest.param(
        {"omega_floor": 0.2, "token_weights": "uniform"},
        {"advantage": "leave_one_out", "phi_self_align": "off", "beta": 0.7, "meta_loss": "paper"},
        0,
        id="leave-one-out",
    ),
    pytest.param(
        {
            "trust": "never",
            "vote_sharpness": 10.0,
            "substance": 1.5,
            "intrinsic": {"self_consistency": 1.0, "coherence": 0.0, "quality": 0.3, "certainty": 1.0},
        },
        {},
        1,
        id="phrasings",
    ),
]


@pytest.mark.parametrize("group_size", [2, 5])
@pytest.mark.parametrize(("evaluator", "objective", "num_variants"), CASES)
def test_terms_and_losses(
    group_size: int, evaluator: dict[str, Any], objective: dict[str, Any], num_variants: int
) -> None:
    world = make_world(group_size, group_size, evaluator, objective, num_variants)
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
    num_responses = len(world.groups) * group_size
    np.testing.assert_allclose(output.sums["responses_with_token"].numpy() / num_responses, expected.token_share)


@pytest.mark.parametrize("trust", ["earned", "always", "never"])
def test_state_after_the_step(trust: str) -> None:
    world = make_world(3, 5, {"trust": trust}, {})
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
            output.sums["responses_with_token"],
            counts.responses,
        )
    )
    assert float(world.state.rho) == pytest.approx(expected.rho, rel=1e-6)
    assert world.state.tau == pytest.approx(expected.tau, rel=1e-6)
    weight_V = token_weights([*world.share_history, expected.token_share], 0.98, worlds.VOCAB)
    np.testing.assert_allclose(world.state.token_weights().numpy(), weight_V, rtol=1e-4)
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

"""The fused step's mathematics: one scalar whose single backward yields every update (equation 2).

    ψ ← α·L_MLE + β·L_self-align      φ ← β·L_self-align + γ·L_meta + heads      ξ ← γ·L_meta

Every term is a local sum over a *global* count, so that summing over micro-batches and ranks gives the loss of the
whole batch, however it was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_dist.asa.heads import EvaluatorOutput
from asa_dist.asa.intrinsic import IntrinsicReward, intrinsic_reward, sibling_votes
from asa_dist.asa.packing import IGNORED, GroupTensors, MicroBatch
from asa_dist.asa.rewards import SelfReward, self_reward
from asa_dist.asa.states import PooledStates
from asa_dist.asa.trust import STD_FLOOR, AlignmentState, spearman, used_reward
from asa_dist.config import EvaluatorConfig, ObjectiveConfig
from asa_kernels import token_f1


@dataclass(frozen=True)
class GlobalCounts:
    """The normalisers of a step: over all ranks and micro-batches."""

    corpus_tokens: float  # target tokens of the corpus rows
    response_tokens: float  # N, end-of-text included
    responses: float  # B
    contentful: float  # responses with content
    sibling_pairs: float  # ordered pairs of siblings that both have content

    @staticmethod
    def of(batch: MicroBatch) -> Tensor:
        """This micro-batch's own counts, float64 [5], in field order: sum them, then ``GlobalCounts(*sums)``."""
        corpus = ((batch.target_RT != IGNORED) & batch.is_corpus_RT).sum()
        if batch.groups is None:
            return torch.tensor([float(corpus), 0, 0, 0, 0], dtype=torch.float64)
        has_content_PG = batch.groups.content_length_PG > 0
        per_group_P = has_content_PG.sum(1)
        return torch.tensor(
            [
                float(value)
                for value in (
                    corpus,
                    batch.groups.length_PG.sum(),
                    has_content_PG.numel(),
                    per_group_P.sum(),
                    (per_group_P * (per_group_P - 1)).sum(),
                )
            ],
            dtype=torch.float64,
        )


@dataclass(frozen=True)
class StepCoefficients:
    """What a step is told: loss weights after warm-up rules, and the trust of the step before."""

    alpha: float
    beta: float  # 0 during the evaluator's warm-up
    gamma: float
    tau: float


@dataclass(frozen=True)
class StepInputs:
    """What the loop knows and the forward needs beside the tokens."""

    coefficients: StepCoefficients
    counts: GlobalCounts
    center_H: Tensor  # of pooled states
    scale: float  # of pooled states, see pool_states
    progress_F: Tensor
    token_weight_V: Tensor  # what each token counts when siblings are compared


def step_inputs(
    state: AlignmentState, objective: ObjectiveConfig, counts: GlobalCounts, device: torch.device | str
) -> StepInputs:
    """What the step after ``state`` computes with."""
    beta = objective.beta if state.aligning else 0.0
    return StepInputs(
        StepCoefficients(objective.alpha, beta, objective.gamma, state.tau),
        counts,
        state.center().to(device),
        state.scale(),
        state.progress().to(device),
        state.token_weights().to(device),
    )


@dataclass(frozen=True)
class TokenScores:
    """Of the model being trained, per position of the micro-batch; 0 where nothing is predicted. float32 [N]."""

    logprob_N: Tensor  # temperature 1, with the graph to ψ
    tempered_logprob_N: Tensor  # at the sampling temperature, detached
    entropy_N: Tensor  # nats, temperature 1, detached


@dataclass(frozen=True)
class ScoredGroups:
    """Every reward term of the micro-batch's responses: what samples.jsonl shows and the losses use."""

    own: SelfReward
    intrinsic: IntrinsicReward
    omega_3: Tensor
    self_PG: Tensor  # R_self with the graph to φ and ξ
    used_PG: Tensor
    advantage_PG: Tensor
    f1_PGG: Tensor
    length_mean_logprob_PG: Tensor  # mean token log-probability, with the graph to ψ


def sum_per_response(values_N: Tensor, groups: GroupTensors, index_N: Tensor | None = None) -> Tensor:
    """Sums a per-position quantity over the positions that predict each response's tokens, [P, G] float32.

    Args:
        index_N: which positions, and of which response; None: ``predicts_N``.
    """
    num_responses = groups.num_groups * groups.group_size
    index_N = groups.predicts_N if index_N is None else index_N
    slot_N = torch.where(index_N < 0, num_responses, index_N)
    sums_S = torch.zeros(num_responses + 1, device=values_N.device).index_add(0, slot_N, values_N.float())
    return sums_S[:-1].view(groups.num_groups, groups.group_size)


def content_logprob(logprob_N: Tensor, batch: MicroBatch, weight_V: Tensor) -> Tensor:
    """How sure the model was of what each response says, ≤ 0, [P, G] float32.

    The mean log-probability of its tokens without end-of-text, each weighing as it does in the overlap, and of one sure
    token more: so of little it is the sum, and of much the mean, which does not favour what is short.
    """
    says_N = batch.responses.says_N
    weight_N = weight_V[batch.target_RT.flatten().clamp(min=0)]
    total_PG = sum_per_response(weight_N, batch.responses, says_N)
    return sum_per_response(weight_N * logprob_N, batch.responses, says_N) / (1 + total_PG)


def substance(groups: GroupTensors, weight_V: Tensor, half: float) -> Tensor:
    """How much each response says, in [0, 1], float32 [P, G]; 0 without content.

    Without it a full stop followed by end-of-text is the best answer to everything: complete, fluent, free of
    repetition, and what all siblings say.

    Args:
        half: total weight of its tokens at which a response gets 1/2; 0: 1 whatever it says.
    """
    position_T = torch.arange(groups.content_PGT.shape[-1], device=weight_V.device)
    inside_PGT = position_T < groups.content_length_PG.unsqueeze(-1)
    total_PG = (weight_V[groups.content_PGT] * inside_PGT).sum(-1)
    return torch.where(total_PG > 0, total_PG / (total_PG + half), 0.0)


def group_advantage(used_PG: Tensor, kind: Literal["group_mean", "group_norm", "leave_one_out"]) -> Tensor:
    """Rewards relative to their group, [P, G]."""
    centred_PG = used_PG - used_PG.mean(1, keepdim=True)
    if kind == "group_mean":
        return centred_PG
    if kind == "group_norm":
        return centred_PG / used_PG.std(1, correction=0, keepdim=True).clamp(min=STD_FLOOR)
    group_size = used_PG.shape[1]
    return centred_PG * group_size / (group_size - 1)  # R_i minus the mean of the others


def importance_weights(
    scores: TokenScores,
    groups: GroupTensors,
    kind: Literal["token", "sequence", "none"],
    cap: float,
) -> tuple[Tensor, Tensor]:
    """Truncated off-policy correction w = min(π/π_behaviour, cap), both at the sampling temperature; detached.

    Returns:
        (weight_N, clipped_N): 1 and False where no response token is predicted.
    """
    if kind == "none":
        return torch.ones_like(scores.entropy_N), torch.zeros_like(scores.entropy_N, dtype=torch.bool)
    is_response_N = groups.predicts_N >= 0
    log_ratio_N = (scores.tempered_logprob_N - groups.behaviour_logprob_N) * is_response_N
    if kind == "sequence":
        log_ratio_N = sum_per_response(log_ratio_N, groups).flatten()[groups.predicts_N.clamp(min=0)] * is_response_N
    ratio_N = log_ratio_N.exp()
    return ratio_N.clamp(max=cap).detach(), (ratio_N > cap) & is_response_N


def score_groups(
    scores: TokenScores,
    states: PooledStates,
    heads: EvaluatorOutput,
    omega_3: Tensor,
    batch: MicroBatch,
    inputs: StepInputs,
    evaluator: EvaluatorConfig,
    objective: ObjectiveConfig,
) -> ScoredGroups:
    """All rewards of the step, with today's φ."""
    groups, weight_V, coefficients = batch.responses, inputs.token_weight_V, inputs.coefficients
    length_PG = groups.length_PG.clamp(min=1)
    mean_logprob_PG = sum_per_response(scores.logprob_N, groups) / length_PG
    mean_entropy_PG = sum_per_response(scores.entropy_N, groups) / length_PG
    f1_PGG = token_f1(groups.content_PGT, groups.content_length_PG, weight_V)
    substance_PG = substance(groups, weight_V, evaluator.substance)
    own = self_reward(heads, groups, mean_entropy_PG, len(weight_V), evaluator.uncertainty_weight, substance_PG)
    said_PG = content_logprob(scores.logprob_N.detach(), batch, weight_V)
    vote_PGG = sibling_votes(said_PG, groups.content_length_PG, evaluator.vote_sharpness)
    intrinsic = intrinsic_reward(groups, states, mean_logprob_PG.detach(), f1_PGG, vote_PGG, substance_PG, evaluator)
    self_PG = own.total(omega_3)
    used_PG = used_reward(self_PG.detach(), intrinsic.total_PG, coefficients.tau)
    if objective.advantage == "none":  # the paper's A = R has no z-score
        advantage_PG = coefficients.tau * self_PG.detach() + (1 - coefficients.tau) * intrinsic.total_PG
    else:
        advantage_PG = group_advantage(used_PG, objective.advantage)
    return ScoredGroups(own, intrinsic, omega_3, self_PG, used_PG, advantage_PG, f1_PGG, mean_logprob_PG)


def generator_loss(
    scored: ScoredGroups, scores: TokenScores, weight_N: Tensor, groups: GroupTensors, counts: GlobalCounts
) -> Tensor:
    """ψ's part of equation 3: −(1/N) Σ_i A_i Σ_t w_it log π(y_it)."""
    advantage_N = scored.advantage_PG.flatten()[groups.predicts_N.clamp(min=0)] * (groups.predicts_N >= 0)
    return -(advantage_N * weight_N * scores.logprob_N).sum() / max(counts.response_tokens, 1.0)


def evaluator_loss(
    scored: ScoredGroups,
    groups: GroupTensors,
    kind: Literal["centred", "paper", "off"],
    counts: GlobalCounts,
) -> Tensor:
    """φ's part of equation 3: −(1/B) Σ_i R_self,i · ℓ̃_i with ω and the log-probabilities detached.

    As printed (``paper``: ℓ̃ = log p(y|x) < 0) it drives every reward to its minimum; ``centred`` takes the mean token
    log-probability minus its mean over the group.
    """
    if kind == "off":
        return torch.zeros((), device=scored.self_PG.device)
    mean_PG = scored.length_mean_logprob_PG.detach()
    if kind == "paper":
        likelihood_PG = mean_PG * groups.length_PG
    else:
        has_tokens_PG = (groups.length_PG > 0).float()
        group_mean_P1 = mean_PG.sum(1, keepdim=True) / has_tokens_PG.sum(1, keepdim=True).clamp(min=1)
        likelihood_PG = (mean_PG - group_mean_P1) * has_tokens_PG
    return -(scored.own.total(scored.omega_3.detach()) * likelihood_PG).sum() / counts.responses


def head_losses(
    heads: EvaluatorOutput,
    scored: ScoredGroups,
    groups: GroupTensors,
    config: ObjectiveConfig,
    counts: GlobalCounts,
) -> Tensor:
    """Supervision of φ by measured signals: embeddings and indicator by token F1, each principle by its signal."""
    has_content_PG = (groups.content_length_PG > 0).float()
    pair_PGG = has_content_PG.unsqueeze(1) * has_content_PG.unsqueeze(2)
    pair_PGG = pair_PGG * ~torch.eye(groups.group_size, dtype=torch.bool, device=pair_PGG.device)
    num_pairs, num_contentful = max(counts.sibling_pairs, 1.0), max(counts.contentful, 1.0)
    embedding = ((heads.cosine_PGG - scored.f1_PGG).square() * pair_PGG).sum() / num_pairs
    # F1 of real token sets can exceed 1 by a rounding error
    target_PGG = scored.f1_PGG.clamp(0, 1)
    # it raises on NaN, on one rank alone; here NaN must become a NaN loss, on which all ranks skip the step together
    indicator_PGG = F.binary_cross_entropy(heads.indicator_PGG.nan_to_num(0.5), target_PGG, reduction="none")
    indicator_PGG = indicator_PGG + (heads.indicator_PGG * 0).detach()
    indicator = (indicator_PGG * pair_PGG).sum() / num_pairs
    error_PGM = (heads.behaviour_PGM - scored.intrinsic.signal_PGM).square() * has_content_PG.unsqueeze(-1)
    return (
        config.embedding_loss_weight * embedding
        + config.indicator_loss_weight * indicator
        + config.principle_loss_weight * error_PGM.sum() / num_contentful
    )


def meta_loss(scored: ScoredGroups, kind: Literal["centred", "paper"], counts: GlobalCounts) -> Tensor:
    """Equations 4 and 11: how far R_self is from R_intrinsic.

    Only differences within a group reach an advantage. As printed, though, most of the distance is the level, which any
    term can match: then ω goes to the terms that are easiest to predict, not to those that tell siblings apart.
    """
    distance_PG = scored.self_PG - scored.intrinsic.total_PG
    if kind == "centred":
        distance_PG = distance_PG - distance_PG.mean(1, keepdim=True)
    return distance_PG.square().sum() / counts.responses


def corpus_loss(logprob_N: Tensor, batch: MicroBatch, counts: GlobalCounts) -> Tensor:
    """Equation 1 per token."""
    return -(logprob_N * batch.is_corpus_RT.flatten()).sum() / max(counts.corpus_tokens, 1.0)


class FusedOutput(NamedTuple):
    """One micro-batch. All but ``loss`` is detached. A tuple, so that ZeRO-3 finds the tensors in it."""

    loss: Tensor  # the scalar to differentiate
    sums: dict[str, Tensor]  # to be added over micro-batches and ranks; losses are divided by global counts already
    maxima: dict[str, Tensor]  # to be maximised over micro-batches and ranks
    terms: dict[str, Tensor]  # every reward term of every response, [P, G]


@dataclass(frozen=True)
class StepResult:
    """Of one rank's micro-batches of a step."""

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]
    terms: list[dict[str, Tensor]]  # per micro-batch
    gradient_norms: dict[str, float]  # by part, before clipping, of the whole model
    skipped_because: str = ""  # no update was made: the reason, the same on all ranks; "" = updated
    skipped_prompt_ids: list[int] = field(default_factory=list)  # whose rewards or losses were not finite, all ranks'


def fused_loss(
    batch: MicroBatch,
    scores: TokenScores,
    states: PooledStates,
    heads: EvaluatorOutput,
    omega_3: Tensor,
    inputs: StepInputs,
    evaluator: EvaluatorConfig,
    objective: ObjectiveConfig,
) -> FusedOutput:
    """Equation 2 plus head losses for one micro-batch with groups."""
    groups, coefficients, counts = batch.responses, inputs.coefficients, inputs.counts
    scored = score_groups(scores, states, heads, omega_3, batch, inputs, evaluator, objective)
    weight_N, clipped_N = importance_weights(scores, groups, objective.importance, objective.importance_cap)
    mle = corpus_loss(scores.logprob_N, batch, counts)
    align_psi = generator_loss(scored, scores, weight_N, groups, counts)
    align_phi = evaluator_loss(scored, groups, objective.phi_self_align, counts)
    meta = meta_loss(scored, objective.meta_loss, counts)
    heads_loss = head_losses(heads, scored, groups, objective, counts)
    loss = (
        coefficients.alpha * mle + coefficients.beta * (align_psi + align_phi) + coefficients.gamma * meta + heads_loss
    )
    sums = {
        "loss/total": loss,
        "loss/mle": mle,
        "loss/self_align": align_psi + align_phi,
        "loss/meta": meta,
        "loss/heads": heads_loss,
        **_reward_sums(scored, states),
        "responses_with_token": responses_with_token(groups, len(inputs.token_weight_V)),
        **_rollout_sums(scores, groups, weight_N, clipped_N),
    }
    difference_N = (scores.logprob_N.detach() - groups.sampled_logprob_N) * (groups.predicts_N >= 0)
    maxima = {"rollout/max_abs_dlogp": difference_N.abs().max(), "rollout/policy_age_max": groups.age_P.max()}
    return FusedOutput(
        loss, {name: value.detach() for name, value in sums.items()}, maxima, reward_terms(scored, evaluator.principles)
    )


def responses_with_token(groups: GroupTensors, vocab_size: int) -> Tensor:
    """In how many of the micro-batch's responses each token occurs, float32 [V]."""
    position_T = torch.arange(groups.content_PGT.shape[-1], device=groups.content_PGT.device)
    beyond_PGT = position_T >= groups.content_length_PG.unsqueeze(-1)
    token_PGT = groups.content_PGT.masked_fill(beyond_PGT, vocab_size).sort(-1).values  # repetitions side by side
    is_first_PGT = torch.ones_like(token_PGT, dtype=torch.float32)
    is_first_PGT[..., 1:] = (token_PGT[..., 1:] != token_PGT[..., :-1]).float()
    counts_V = torch.zeros(vocab_size + 1, device=token_PGT.device)
    return counts_V.index_add_(0, token_PGT.flatten(), is_first_PGT.flatten())[:-1]


def reward_terms(scored: ScoredGroups, principles: Sequence[str]) -> dict[str, Tensor]:
    """Every reward term by name, [P, G] detached."""
    own, intrinsic = scored.own, scored.intrinsic
    terms = {
        "logic": own.logic_PG,
        "fact": own.fact_PG,
        "behav": own.behav_PG,
        "self": scored.self_PG,
        "fact_score": own.fact_score_PG,
        "uncertainty": own.uncertainty_PG,
        "substance": own.substance_PG,
        "self_consistency": intrinsic.self_consistency_PG,
        "coherence": intrinsic.coherence_PG,
        "quality": intrinsic.quality_PG,
        "certainty": intrinsic.certainty_PG,
        "intrinsic": intrinsic.total_PG,
        "used": scored.used_PG,
        "advantage": scored.advantage_PG,
        **{f"signal/{name}": intrinsic.signal_PGM[..., m] for m, name in enumerate(principles)},
    }
    return {name: value_PG.detach() for name, value_PG in terms.items()}


def _reward_sums(scored: ScoredGroups, states: PooledStates) -> dict[str, Tensor]:
    """Sums over responses (or groups); divided by their counts when logged."""
    correlation_P, valid_P = spearman(scored.self_PG.detach(), scored.intrinsic.total_PG)
    return {
        "reward/self": scored.self_PG.sum(),
        "reward/intrinsic": scored.intrinsic.total_PG.sum(),
        "reward/logic": scored.own.logic_PG.sum(),
        "reward/fact": scored.own.fact_PG.sum(),
        "reward/behav": scored.own.behav_PG.sum(),
        "reward/used": scored.used_PG.abs().sum(),  # its mean is 0 by construction: log its size
        "trust/rho_sum": correlation_P.sum(),
        "trust/valid_groups": valid_P.sum(),
        "pooled_sum": states.uncentred_sum_H,
        "pooled_square_sum": states.square_sum,
        **{f"omega/{name}": weight for name, weight in zip(("logic", "fact", "behav"), scored.omega_3, strict=True)},
    }


def _rollout_sums(scores: TokenScores, groups: GroupTensors, weight_N: Tensor, clipped_N: Tensor) -> dict[str, Tensor]:
    """Sums over response tokens or responses."""
    is_response_N = groups.predicts_N >= 0
    log_ratio_N = (scores.tempered_logprob_N - groups.behaviour_logprob_N) * is_response_N
    same_PGG = (groups.content_PGT.unsqueeze(1) == groups.content_PGT.unsqueeze(2)).all(-1) & (
        groups.content_length_PG.unsqueeze(1) == groups.content_length_PG.unsqueeze(2)
    )
    is_first_PG = same_PGG.float().argmax(-1) == torch.arange(groups.group_size, device=same_PGG.device)
    return {
        "rollout/mismatch_kl": (torch.expm1(log_ratio_N.double()) - log_ratio_N).sum(),  # ≥ 0: KL(behaviour ‖ π)
        "rollout/entropy": (scores.entropy_N * is_response_N).sum(),
        "rollout/importance_mean": (weight_N * is_response_N).sum(),
        "rollout/clipped_fraction": clipped_N.sum(),
        "rollout/length_mean": groups.length_PG.sum(),
        "rollout/distinct_fraction": is_first_PG.sum(),
        "rollout/truncated_fraction": (~groups.finished_PG).sum(),
        "rollout/empty_fraction": (groups.content_length_PG == 0).sum(),
        "rollout/policy_age_mean": groups.age_P.sum(),
    }

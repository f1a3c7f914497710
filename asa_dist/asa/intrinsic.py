"""R_intrinsic (equation 12): three signals measured on the model's own behaviour, no gradient, no learned parameter.

A principle is one function in ``PRINCIPLE_SIGNALS``: add yours there and name it in the config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_dist.asa.packing import GroupTensors
from asa_dist.asa.states import PooledStates
from asa_dist.config import EvaluatorConfig

COHERENCE_WITHOUT_CLAIMS = 0.5  # when no response of the group has two claims
MIN_CERTAINTY = -1.0
TOKEN_BITS = 21  # three token ids fit one int64: vocabularies up to 2 M


@dataclass(frozen=True)
class SignalInputs:
    """What a principle may look at."""

    groups: GroupTensors
    states: PooledStates
    mean_logprob_PG: Tensor  # mean token log-probability at temperature 1


@dataclass(frozen=True)
class IntrinsicReward:
    """All [P, G] in [−1, 1], zero for responses without content, but ``signal_PGM``: one column per principle."""

    total_PG: Tensor
    self_consistency_PG: Tensor
    coherence_PG: Tensor
    quality_PG: Tensor
    certainty_PG: Tensor
    signal_PGM: Tensor


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine over the last dimension; 0 where a side is zero."""
    return (F.normalize(left, dim=-1) * F.normalize(right, dim=-1)).sum(-1)


def relevance(inputs: SignalInputs) -> Tensor:
    """Cosine of centred prompt and response means, negative ones cut at 0."""
    return cosine(inputs.states.prompt_PGH, inputs.states.response_PGH).clamp(min=0)


def non_repetition(inputs: SignalInputs) -> Tensor:
    """Distinct / all token 3-grams of the content; 1 below three tokens."""
    tokens_PGT, length_PG = inputs.groups.content_PGT, inputs.groups.content_length_PG
    if tokens_PGT.shape[-1] < 3:
        return torch.ones_like(inputs.mean_logprob_PG)
    first, second, third = tokens_PGT[..., :-2], tokens_PGT[..., 1:-1], tokens_PGT[..., 2:]
    key_PGW = (first << 2 * TOKEN_BITS) | (second << TOKEN_BITS) | third  # exact: one integer per 3-gram
    position_W = torch.arange(key_PGW.shape[-1], device=key_PGW.device)
    total_PG = (length_PG - 2).clamp(min=0)
    key_PGW = torch.where(position_W < total_PG.unsqueeze(-1), key_PGW, -1).sort(-1).values
    is_new_PGW = torch.ones_like(key_PGW, dtype=torch.bool)
    is_new_PGW[..., 1:] = key_PGW[..., 1:] != key_PGW[..., :-1]
    distinct_PG = (is_new_PGW & (key_PGW >= 0)).sum(-1)
    return torch.where(total_PG > 0, distinct_PG / total_PG.clamp(min=1), 1.0)


def completeness(inputs: SignalInputs) -> Tensor:
    """1 if end-of-text was sampled after a sentence's end."""
    return inputs.groups.ends_sentence_PG.float()


def fluency(inputs: SignalInputs) -> Tensor:
    """exp of the mean token log-probability."""
    return inputs.mean_logprob_PG.exp()


PRINCIPLE_SIGNALS: dict[str, Callable[[SignalInputs], Tensor]] = {
    "relevance": relevance,
    "non_repetition": non_repetition,
    "completeness": completeness,
    "fluency": fluency,
}


def internal_coherence(groups: GroupTensors, states: PooledStates) -> Tensor:
    """Mean cosine of neighbouring claims [P, G].

    With fewer than two claims the group's mean, so that shortness earns nothing.
    """
    num_responses = groups.num_groups * groups.group_size
    response_C = groups.claim_response_C
    neighbours_C = (response_C[1:] == response_C[:-1]).float()  # claims of one response are consecutive
    cosine_C = cosine(states.claim_CH[1:], states.claim_CH[:-1]) * neighbours_C
    zeros_S = torch.zeros(num_responses, device=cosine_C.device)
    sum_S = zeros_S.index_add(0, response_C[1:], cosine_C)
    count_S = zeros_S.index_add(0, response_C[1:], neighbours_C)
    shape = (groups.num_groups, groups.group_size)
    measured_PG = (count_S > 0).view(shape)
    mean_PG = (sum_S / count_S.clamp(min=1)).view(shape)
    num_measured_P1 = measured_PG.sum(1, keepdim=True)
    group_mean_P1 = torch.where(
        num_measured_P1 > 0, mean_PG.sum(1, keepdim=True) / num_measured_P1.clamp(min=1), COHERENCE_WITHOUT_CLAIMS
    )
    return torch.where(measured_PG, mean_PG, group_mean_P1)


def self_consistency(f1_PGG: Tensor, vote_PGG: Tensor) -> Tensor:
    """Mean overlap with the siblings, each of which counts as its vote [P, G].

    Args:
        vote_PGG: ≥ 0, of each sibling's (last) word on each response; its own is 0. Where no sibling has a vote, the
            consistency is 0.
    """
    total_PG = vote_PGG.sum(-1)
    return (f1_PGG * vote_PGG).sum(-1) / total_PG.masked_fill(total_PG == 0, 1.0)


def sibling_votes(said_logprob_PG: Tensor, content_length_PG: Tensor, sharpness: float) -> Tensor:
    """How much each sibling's (last) word on each response counts, [P, G, G]: the surest one's 1, 0 without content.

    Relative to the surest of the *siblings*: beside a much surer response, their votes would all round to 0.

    Args:
        said_logprob_PG: how sure the model was of each response (``objective.content_logprob``).
        sharpness: exponent of its probability; 0 gives every sibling with content the same vote.
    """
    itself_GG = torch.eye(content_length_PG.shape[1], dtype=torch.bool, device=content_length_PG.device)
    silent_PGG = (content_length_PG == 0).unsqueeze(1) | itself_GG
    logit_PGG = (sharpness * said_logprob_PG).unsqueeze(1).masked_fill(silent_PGG, -torch.inf)
    surest_PG1 = logit_PGG.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    return (logit_PGG - surest_PG1).exp()


@torch.no_grad()
def intrinsic_reward(
    groups: GroupTensors,
    states: PooledStates,
    mean_logprob_PG: Tensor,
    f1_PGG: Tensor,
    vote_PGG: Tensor,
    substance_PG: Tensor,
    config: EvaluatorConfig,
) -> IntrinsicReward:
    """Equation 12, with weights, of what has substance.

    Args:
        f1_PGG: token F1 of siblings.
        vote_PGG: what each counts.
        substance_PG: how much each response says, in [0, 1].
    """
    has_content_PG = (groups.content_length_PG > 0).float()
    inputs = SignalInputs(groups, states, mean_logprob_PG)
    signal_PGM = torch.stack(
        [PRINCIPLE_SIGNALS[name](inputs) for name in config.principles], dim=-1
    ) * has_content_PG.unsqueeze(-1)
    self_consistency_PG = self_consistency(f1_PGG, vote_PGG) * has_content_PG
    coherence_PG = internal_coherence(groups, states) * has_content_PG
    quality_PG = signal_PGM.mean(-1)
    certainty_PG = (1 + mean_logprob_PG).clamp(min=MIN_CERTAINTY) * has_content_PG
    weights = config.intrinsic
    total_PG = substance_PG * (
        weights.self_consistency * self_consistency_PG
        + weights.coherence * coherence_PG
        + weights.quality * quality_PG
        + weights.certainty * certainty_PG
    ) / (weights.self_consistency + weights.coherence + weights.quality + weights.certainty)
    return IntrinsicReward(
        total_PG, self_consistency_PG, coherence_PG, quality_PG, certainty_PG, signal_PGM
    )

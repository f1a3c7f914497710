"""Pooled trunk states: what the evaluator and the intrinsic signals look at (detached, float32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from asa_dist.asa.packing import GroupTensors
from asa_kernels import segment_mean, segment_means


@dataclass(frozen=True)
class PooledStates:
    response_PGH: Tensor  # mean middle state of each response minus its running mean; 0 without tokens
    prompt_PGH: Tensor  # the same of the prompt
    claim_CH: Tensor  # the same of each claim
    square_sum: Tensor  # sum over responses with content of the squared norms of their centred means
    uncentred_sum_H: Tensor  # sum over responses with content of their uncentred means: feeds the running mean
    evaluator_response_PGH: Tensor  # what the evaluator embeds
    evaluator_claim_CH: Tensor  # what the evaluator verifies


def pool_states(
    middle_NH: Tensor,
    final_NH: Tensor,
    center_H: Tensor,
    scale: float,
    groups: GroupTensors,
    embedding: Literal["learned", "raw"],
) -> PooledStates:
    """Means over responses, prompts and claims.

    Args:
        center_H: running mean of the responses' means.
        scale: brings centred means to norm 1 on average, whatever the trunk's states are like, so that one learning
            rate suits the evaluator's weights and biases; its learned weights absorb it, cosines do not see it.
        embedding: ``raw`` lets the evaluator read final states as they are (the paper).
    """
    shape = (groups.num_groups, groups.group_size, -1)
    num_responses = groups.num_groups * groups.group_size
    segmentations = ((groups.response_N, num_responses), (groups.claim_N, groups.num_claims))
    response_SH, claim_CH, prompt_SH = segment_means(
        middle_NH.detach(), (*segmentations, (groups.prompt_N, num_responses))
    )
    has_tokens_S1 = (groups.length_PG > 0).view(-1, 1)
    has_content_S1 = (groups.content_length_PG > 0).view(-1, 1)
    centred_PGH = ((response_SH - center_H) * has_tokens_S1).view(shape)
    claim_centred_CH = claim_CH - center_H
    evaluator_response_PGH, evaluator_claim_CH = centred_PGH * scale, claim_centred_CH * scale
    if embedding == "raw":
        raw_SH, evaluator_claim_CH = (segment_mean(final_NH.detach(), ids, count) for ids, count in segmentations)
        evaluator_response_PGH = raw_SH.view(shape)
    return PooledStates(
        response_PGH=centred_PGH,
        prompt_PGH=(prompt_SH - center_H).view(shape),
        claim_CH=claim_centred_CH,
        square_sum=(centred_PGH.flatten(0, 1) * has_content_S1).square().sum(),
        uncentred_sum_H=(response_SH * has_content_S1).sum(0),
        evaluator_response_PGH=evaluator_response_PGH,
        evaluator_claim_CH=evaluator_claim_CH,
    )

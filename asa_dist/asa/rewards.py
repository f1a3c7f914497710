"""R_self (equations 5–10): logical consistency, factual self-verification, behavioural coherence, with today's φ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asa_dist.asa.heads import EvaluatorOutput
from asa_dist.asa.packing import GroupTensors


@dataclass(frozen=True)
class SelfReward:
    """All [P, G], with the graph to φ; zero for responses without content."""

    logic_PG: Tensor
    fact_PG: Tensor
    behav_PG: Tensor
    fact_score_PG: Tensor
    uncertainty_PG: Tensor
    substance_PG: Tensor

    def total(self, omega_3: Tensor) -> Tensor:
        """Equation 10, of what has substance."""
        return self.substance_PG * (
            omega_3[0] * self.logic_PG + omega_3[1] * self.fact_PG + omega_3[2] * self.behav_PG
        )


def fact_score(verified_C: Tensor, groups: GroupTensors) -> Tensor:
    """Mean verification over each response's claims [P, G] (equation 8); 0 without claims."""
    zeros_S = torch.zeros(groups.num_groups * groups.group_size, device=verified_C.device)
    sum_S = zeros_S.index_add(0, groups.claim_response_C, verified_C)
    count_S = zeros_S.index_add(0, groups.claim_response_C, torch.ones_like(verified_C))
    return (sum_S / count_S.clamp(min=1)).view(groups.num_groups, groups.group_size)


def self_reward(
    heads: EvaluatorOutput,
    groups: GroupTensors,
    mean_entropy_PG: Tensor,
    vocab_size: int,
    uncertainty_weight: float,
    substance_PG: Tensor,
) -> SelfReward:
    """The three terms of R_self.

    Args:
        mean_entropy_PG: mean token entropy of each response, nats, detached.
        uncertainty_weight: λ of equation 7.
        substance_PG: how much each response says, in [0, 1].
    """
    has_content_PG = (groups.content_length_PG > 0).float()
    fact_score_PG = fact_score(heads.verified_C, groups) * has_content_PG
    uncertainty_PG = mean_entropy_PG / math.log(vocab_size) * has_content_PG
    return SelfReward(
        logic_PG=heads.consistency_PG * has_content_PG,
        fact_PG=fact_score_PG - uncertainty_weight * uncertainty_PG,
        behav_PG=(heads.behaviour_PGM @ heads.behaviour_weight_M) * has_content_PG,
        fact_score_PG=fact_score_PG,
        uncertainty_PG=uncertainty_PG,
        substance_PG=substance_PG,
    )

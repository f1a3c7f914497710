"""The learned evaluator (φ) and the meta-optimizer (ξ).

Both read detached, float32 inputs, so no gradient of theirs reaches the generator. Each is one module with one forward,
run exactly once per micro-batch on every rank: ZeRO-3 hangs on anything else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asa_kernels import group_consistency

NUM_TERMS = 3  # logic, fact, behav
NUM_FEATURES = 1 + NUM_TERMS + 1  # log step, running means of the three rewards, running mean of the meta loss


class EvaluatorOutput(NamedTuple):  # a tuple: ZeRO-3 finds the tensors in it and fetches φ again before their backward
    consistency_PG: Tensor  # R_logic (equation 5)
    cosine_PGG: Tensor
    indicator_PGG: Tensor  # c_ij (equation 6)
    verified_C: Tensor  # VerifyFact of each claim (equation 8)
    behaviour_PGM: Tensor  # BehaviorScore of each principle (equation 9)
    behaviour_weight_M: Tensor


class Evaluator(nn.Module):
    """Evaluator heads on pooled states (equations 5, 6, 8, 9).

    Args:
        hidden_size: H of the trunk.
        embedding_size: D; None uses the pooled states themselves as embeddings (the paper's letter, D = H).
        num_principles: M.
    """

    def __init__(self, hidden_size: int, embedding_size: int | None, num_principles: int):
        super().__init__()
        size = embedding_size or hidden_size
        self.projection_DH = (
            nn.Parameter(torch.randn(size, hidden_size) * hidden_size**-0.5) if embedding_size is not None else None
        )
        self.consistency_left_D = nn.Parameter(torch.zeros(size))
        self.consistency_right_D = nn.Parameter(torch.zeros(size))
        self.consistency_bias = nn.Parameter(torch.zeros(1))
        self.verify_H = nn.Parameter(torch.zeros(hidden_size))
        self.verify_bias = nn.Parameter(torch.zeros(1))
        self.principle_MD = nn.Parameter(torch.zeros(num_principles, size))
        self.principle_bias_M = nn.Parameter(torch.zeros(num_principles))
        self.principle_logit_M = nn.Parameter(torch.zeros(num_principles))

    def forward(self, pooled_PGH: Tensor, claim_CH: Tensor, has_content_PG: Tensor) -> EvaluatorOutput:
        """Scores pooled, float32, detached states; responses without content get consistency 0."""
        embedding_PGD = pooled_PGH
        if self.projection_DH is not None:
            embedding_PGD = pooled_PGH @ self.projection_DH.float().T
        consistency_PG, cosine_PGG, indicator_PGG = group_consistency(
            embedding_PGD,
            self.consistency_left_D.float(),
            self.consistency_right_D.float(),
            self.consistency_bias.float(),
            has_content_PG,
            return_indicator=True,
        )
        return EvaluatorOutput(
            consistency_PG,
            cosine_PGG,
            indicator_PGG,
            verified_C=torch.sigmoid(claim_CH @ self.verify_H.float() + self.verify_bias.float()),
            behaviour_PGM=torch.sigmoid(embedding_PGD @ self.principle_MD.float().T + self.principle_bias_M.float()),
            behaviour_weight_M=self.principle_logit_M.float().softmax(0),
        )


class MetaOptimizer(nn.Module):
    """Weights ω of the three self-reward terms (equation 10): floor + (1 − 3·floor)·softmax(affine(progress))."""

    def __init__(self, floor: float):
        super().__init__()
        self.floor = floor
        self.weight_3F = nn.Parameter(torch.zeros(NUM_TERMS, NUM_FEATURES))
        self.bias_3 = nn.Parameter(torch.zeros(NUM_TERMS))

    def forward(self, progress_F: Tensor) -> Tensor:
        logits_3 = self.weight_3F.float() @ progress_F + self.bias_3.float()
        return self.floor + (1 - NUM_TERMS * self.floor) * logits_3.softmax(0)

"""How far the responses of a group agree with each other: equations (5) and (6) of the ASA-LLM paper.

    cos_ij        = e_i · e_j / (|e_i| |e_j|), 0 if either vector is zero
    indicator_ij  = σ(W · [e_i; e_j] + b) = σ(w_left · e_i + w_right · e_j + b)
    consistency_i = 1/(G − 1) · Σ_{j≠i} cos_ij · indicator_ij

The indicator's weight on a concatenation splits into two dot products per response, so its [P, G, G, 2D] input
never exists. An invalid response counts as a zero vector: whatever its row holds (NaN too), its cosines are 0, it
adds nothing to its siblings' sums, and no gradient reaches it.

Shapes: P prompts, G responses per prompt, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_consistency_reference(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, pair by pair, in the dtype of its inputs."""
    num_prompts, num_responses, _ = embedding_PGD.shape
    consistency_PG = embedding_PGD.new_zeros(num_prompts, num_responses)
    cosine_PGG = embedding_PGD.new_zeros(num_prompts, num_responses, num_responses)
    indicator_PGG = torch.zeros_like(cosine_PGG)
    for p in range(num_prompts):
        for i in range(num_responses):
            for j in range(num_responses):
                left_D, right_D = (
                    embedding_PGD[p, k] if valid_PG is None or valid_PG[p, k] else torch.zeros_like(w_left_D)
                    for k in (i, j)
                )
                indicator = torch.sigmoid(
                    torch.cat([w_left_D, w_right_D]) @ torch.cat([left_D, right_D]) + bias.reshape(())
                )
                indicator_PGG[p, i, j] = indicator
                if left_D.any() and right_D.any():
                    cosine = left_D @ right_D / (left_D.norm() * right_D.norm())
                    cosine_PGG[p, i, j] = cosine
                    if i != j:
                        consistency_PG[p, i] += cosine * indicator / (num_responses - 1)
    return consistency_PG, cosine_PGG, indicator_PGG


def _unit_vectors(embedding_PGD: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero, with zero gradient."""
    # A cosine does not depend on length, so a constant scale is free; without it squares overflow or vanish.
    largest_PG1 = embedding_PGD.detach().abs().amax(dim=-1, keepdim=True)
    is_zero_PG1 = largest_PG1 == 0
    scaled_PGD = embedding_PGD / largest_PG1.masked_fill(is_zero_PG1, 1)
    norm_PG1 = torch.linalg.vector_norm(scaled_PGD, dim=-1, keepdim=True)
    return scaled_PGD / norm_PG1.masked_fill(is_zero_PG1, torch.inf)  # 0/∞: value and gradient are 0


def group_consistency(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Agreement of every response with its siblings; equations (5) and (6).

    Args:
        embedding_PGD: any float dtype.
        w_left_D, w_right_D: the two halves of the indicator's weight, any float dtype.
        bias: of the indicator, one element, 0-dimensional or not.
        valid_PG: bool; a False response counts as a zero vector. None: all are valid.

    Returns:
        ``(consistency_PG, cosine_PGG, indicator_PGG)``, float32, each differentiable in every float input.
        ``consistency_PG`` is 0 for an invalid response. The divisor is always G − 1. The diagonals of the other two
        hold a response's value with itself. ``indicator_PGG`` of an invalid response is σ of what is left of the
        logit (finite, in [0, 1]): mask such pairs where it is used.

    Raises:
        ValueError: fewer than two responses per prompt.
    """
    num_responses = embedding_PGD.shape[1]
    if num_responses < 2:
        raise ValueError(f"group_consistency compares siblings: needs G ≥ 2, embedding_PGD has G = {num_responses}")
    embedding_PGD = embedding_PGD.float()
    if valid_PG is not None:
        embedding_PGD = embedding_PGD.masked_fill(~valid_PG.unsqueeze(-1), 0)
    unit_PGD = _unit_vectors(embedding_PGD)
    cosine_PGG = unit_PGD @ unit_PGD.mT
    logit_PG2 = embedding_PGD @ torch.stack([w_left_D, w_right_D], dim=-1).float()
    indicator_PGG = torch.sigmoid(logit_PG2[..., :1] + logit_PG2[..., 1:].mT + bias.float().reshape(()))
    itself_GG = torch.eye(num_responses, dtype=torch.bool, device=embedding_PGD.device)
    agreement_PGG = (cosine_PGG * indicator_PGG).masked_fill(itself_GG, 0)
    return agreement_PGG.sum(dim=-1) / (num_responses - 1), cosine_PGG, indicator_PGG

"""Weighted token F1 between all responses of a group: how much two texts share, counted as multisets.

    overlap_ij = Σ_v w_v · min(count_i(v), count_j(v))
    total_i    = Σ_v w_v · count_i(v)
    f1_ij      = 2 · overlap_ij / (total_i + total_j),   0 if either side is empty

Numbering the repetitions of a token (its first occurrence in a response is 0, the next 1, …) turns each multiset
into a set of (token, repetition), and the overlap of multisets into the size of an intersection of sets: one
matrix product of 0/1 membership rows.

Shapes: P prompts, G responses per prompt, T tokens of the longest response, U distinct (token, repetition) of a group,
V vocabulary.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def token_f1_reference(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor) -> Tensor:
    """The formula, pair by pair; float64 on the CPU."""

    def weigh(counts: Counter[int]) -> float:
        return sum(count * float(weight_V[token]) for token, count in counts.items())

    f1_PGG = torch.zeros(*lengths_PG.shape, lengths_PG.shape[1], dtype=torch.float64)
    for p, (tokens_GT, lengths_G) in enumerate(zip(tokens_PGT.tolist(), lengths_PG.tolist(), strict=True)):
        counts = [Counter(tokens_T[:length]) for tokens_T, length in zip(tokens_GT, lengths_G, strict=True)]
        for i, left in enumerate(counts):
            for j, right in enumerate(counts):
                if left and right:
                    f1_PGG[p, i, j] = 2 * weigh(left & right) / (weigh(left) + weigh(right))
    return f1_PGG


def _number_repetitions(tokens_PGT: Tensor, inside_PGT: Tensor) -> Tensor:
    """A key for each (token, repetition), sorted within the response; padding comes last, with the largest int64."""
    num_tokens = tokens_PGT.shape[-1]
    padding = torch.iinfo(torch.int64).max
    sorted_PGT = tokens_PGT.long().masked_fill(~inside_PGT, padding).sort(dim=-1).values
    first_of_run_PGT = torch.searchsorted(sorted_PGT, sorted_PGT)
    repetition_PGT = torch.arange(num_tokens, device=tokens_PGT.device) - first_of_run_PGT
    return (sorted_PGT * num_tokens + repetition_PGT).masked_fill(~inside_PGT, padding)


def token_f1(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor) -> Tensor:
    """Weighted multiset token F1 of every pair of siblings.

    Takes 8·P·G·U bytes for the membership rows, plain and weighted (U ≤ G·T; about the group's vocabulary, as few
    tokens repeat), and some int64 tensors of size P·G·T.

    Args:
        tokens_PGT: integer token ids; what stands beyond a response's length is never looked at.
        lengths_PG: integer number of tokens of each response, 0 … T.
        weight_V: float, > 0: what one occurrence of each token counts; all ones: the plain F1.

    Returns:
        ``f1_PGG``, float32, symmetric, without gradient; the diagonal is 1 for a non-empty response, else 0.

    Raises:
        ValueError: a length outside 0 … T.
    """
    num_prompts, num_responses, num_tokens = tokens_PGT.shape
    if ((lengths_PG < 0) | (lengths_PG > num_tokens)).any():
        raise ValueError(f"token_f1: lengths_PG must lie in 0 … T = {num_tokens}, got {lengths_PG.tolist()}")
    if tokens_PGT.numel() == 0:
        return torch.zeros(num_prompts, num_responses, num_responses, device=tokens_PGT.device)

    # Also right for sorted rows: padding sorts last.
    inside_PGT = torch.arange(num_tokens, device=tokens_PGT.device) < lengths_PG.unsqueeze(-1)
    key_PGT = _number_repetitions(tokens_PGT, inside_PGT)
    key_PN, order_PN = key_PGT.flatten(1).sort(dim=-1)
    is_new_PN = torch.zeros_like(key_PN)
    is_new_PN[:, 1:] = key_PN[:, 1:] != key_PN[:, :-1]
    dense_PN = is_new_PN.cumsum(dim=-1)  # numbers the distinct keys of a group 0, 1, …
    index_PGT = torch.empty_like(dense_PN).scatter_(1, order_PN, dense_PN).view_as(tokens_PGT)
    num_distinct = int(index_PGT.max()) + 1

    sorted_PGT = (key_PGT // num_tokens).masked_fill(~inside_PGT, 0)
    weight_PGT = weight_V.float()[sorted_PGT] * inside_PGT
    member_PGU = torch.zeros(num_prompts, num_responses, num_distinct, device=tokens_PGT.device)
    weighted_PGU = torch.zeros_like(member_PGU).scatter_(2, index_PGT, weight_PGT)
    member_PGU.scatter_(2, index_PGT, inside_PGT.float())
    overlap_PGG = weighted_PGU @ member_PGU.mT
    total_PG = weighted_PGU.sum(-1)
    total_PGG = total_PG.unsqueeze(-1) + total_PG.unsqueeze(-2)
    return 2 * overlap_PGG / total_PGG.masked_fill(total_PGG == 0, 1)

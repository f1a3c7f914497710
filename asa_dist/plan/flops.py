"""Floating-point operations, by formula.

L layers, H hidden, I of the gated MLP, Q and K widths of all query and key heads, V vocabulary. Only matrix products
count, a multiplication and an addition as two; attention costs its whole square, masked or not.

    blocks(N, m)    = N·(2·W + 4·L·Q·m)         N tokens that each see m;  W = L·(2·H·Q + 2·H·K + 3·H·I)
    head(N)         = 2·N·H·V                   logits of N tokens
    train(s, n, N)  = c·blocks(s·n, n) + 4·head(N)
                      c = 3, as a backward is two forwards, 4 with activation checkpointing; logits are computed again
    prefill(q, p)   = blocks(q·p, p) + head(q)
    decode(c, n)    = blocks(c, n) + head(c)    one token for each of c sequences, with a cache of n tokens
"""

from __future__ import annotations

from asa_dist.plan.shape import Trunk


def blocks(trunk: Trunk, num_tokens: float, num_keys: float) -> float:
    return num_tokens * (2 * trunk.block_weights + 4 * trunk.num_layers * trunk.query_size * num_keys)


def head(trunk: Trunk, num_tokens: float) -> float:
    return 2 * num_tokens * trunk.hidden_size * trunk.vocab_size


def train(
    trunk: Trunk, num_rows: float, row_tokens: float, num_scored: float, is_recomputed: bool = False,
    head_passes: int = 4,
) -> float:  # fmt: skip
    """``head_passes``: 3 for who keeps all logits."""
    passes = 4 if is_recomputed else 3
    return passes * blocks(trunk, num_rows * row_tokens, row_tokens) + head_passes * head(trunk, num_scored)


def prefill(trunk: Trunk, num_prompts: float, prompt_tokens: float) -> float:
    return blocks(trunk, num_prompts * prompt_tokens, prompt_tokens) + head(trunk, num_prompts)


def decode(trunk: Trunk, num_sequences: float, num_cached: float) -> float:
    return blocks(trunk, num_sequences, num_cached) + head(trunk, num_sequences)

"""The pieces of the slow reference: scalar mathematics, and what is read off a response's tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

STD_FLOOR = 0.05  # of z-scores and of group-normalised advantages
MIN_SPEARMAN_STD = 1e-3
MIN_CLAIM_TOKENS = 3
MIN_TOKEN_SHARE, MAX_TOKEN_SHARE, MIN_TOKEN_WEIGHT = 1e-3, 1.0, 1e-6
TIE = 1e-9  # rewards this close are equal: sums of the same numbers in another order differ in their last bits


# --- small mathematics -----------------------------------------------------------------------------------------
def mean(values: Sequence[float]) -> float:
    return sum(float(value) for value in values) / len(values) if len(values) else 0.0


def population_std(values: Sequence[float]) -> float:
    return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = [math.exp(value - max(x)) for value in x]
    return np.array([value / sum(exponentials) for value in exponentials])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norms if norms > 0 else 0.0


def binary_cross_entropy(logit: float, target: float) -> float:
    """−target·log σ(logit) − (1 − target)·log(1 − σ(logit)), without ever forming log 0."""
    return max(logit, 0.0) - logit * target + math.log1p(math.exp(-abs(logit)))


def average_ranks(values: Sequence[float]) -> list[float]:
    """1 is the smallest; equal values share the mean of their places."""
    ranks = []
    for value in values:
        below = sum(other < value - TIE for other in values)
        equal = sum(abs(other - value) <= TIE for other in values)
        ranks.append(below + (equal + 1) / 2)
    return ranks


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """None where either side hardly varies."""
    if population_std(a) < MIN_SPEARMAN_STD or population_std(b) < MIN_SPEARMAN_STD:
        return None
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    covariance = mean([(x - mean(ranks_a)) * (y - mean(ranks_b)) for x, y in zip(ranks_a, ranks_b, strict=True)])
    return covariance / (population_std(ranks_a) * population_std(ranks_b))


def z_scores(values: Sequence[float]) -> list[float]:
    return [(value - mean(values)) / max(population_std(values), STD_FLOOR) for value in values]


# --- text ------------------------------------------------------------------------------------------------------
def token_weights(share_history: Sequence[np.ndarray], decay: float, vocab_size: int) -> np.ndarray:
    """[V]: how informative each token is, from the share of responses that contained it in every step so far.

    A step n steps before the last counts decayⁿ.
    """
    if not share_history:
        return np.ones(vocab_size)
    weights = []
    for token in range(vocab_size):
        share, total = 0.0, 0.0
        for age, share_V in enumerate(reversed(share_history)):
            share += decay**age * float(share_V[token])
            total += decay**age
        bounded = min(max(share / total, MIN_TOKEN_SHARE), MAX_TOKEN_SHARE)
        weights.append(max((math.log(bounded) / math.log(MIN_TOKEN_SHARE)) ** 2, MIN_TOKEN_WEIGHT))
    return np.array(weights)


def token_f1(a: list[int], b: list[int], weight_V: np.ndarray) -> float:
    left, right = Counter(a), Counter(b)
    overlap = sum(float(weight_V[token]) * min(left[token], right[token]) for token in left)
    if overlap == 0:
        return 0.0
    precision = overlap / sum(float(weight_V[token]) for token in a)
    recall = overlap / sum(float(weight_V[token]) for token in b)
    return 2 * precision * recall / (precision + recall)


def claims_of(content: list[int], claim_end: set[int]) -> list[tuple[int, int]]:
    """Claims as (first token, one past the last)."""
    spans: list[tuple[int, int]] = []
    start = 0
    for position, token in enumerate(content):
        if token in claim_end:
            spans.append((start, position + 1))
            start = position + 1
    claims: list[tuple[int, int]] = []
    for first, end in spans:
        too_short = end - first < MIN_CLAIM_TOKENS
        first_claim_is_short = len(claims) == 1 and claims[0][1] - claims[0][0] < MIN_CLAIM_TOKENS
        if claims and (too_short or first_claim_is_short):
            claims[-1] = (claims[-1][0], end)
        else:
            claims.append((first, end))
    if not any(end - first >= MIN_CLAIM_TOKENS for first, end in claims):
        return [(0, len(content))]
    return claims


def non_repetition(content: list[int]) -> float:
    trigrams = [tuple(content[i : i + 3]) for i in range(len(content) - 2)]
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def completeness(content: list[int], finished: bool, sentence_end: set[int], blank: set[int]) -> float:
    visible = [token for token in content if token not in blank]
    return float(finished and bool(visible) and visible[-1] in sentence_end)

from __future__ import annotations

import math

import numpy as np
import pytest

from asa_dist.runtime.data.bigram import SMOOTHING_GRID, BigramBaseline
from asa_dist.runtime.data.rows import PackedRows, cut_into_rows, pack

V = 13


def random_rows(seed: int, num_documents: int) -> PackedRows:
    rng = np.random.default_rng(seed)
    # Few distinct successors per token, so that counting pays.
    texts = []
    for _ in range(num_documents):
        tokens = [int(rng.integers(V))]
        for _ in range(int(rng.integers(0, 20))):
            tokens.append((3 * tokens[-1] + int(rng.integers(3))) % V)
        texts.append(np.array(tokens, np.int32))
    return pack(list(cut_into_rows(texts, 8)), 8)


def dense_reference(heldout: PackedRows, training: list[PackedRows]) -> float:
    counts = np.zeros((V, V))
    for rows in training:
        for i, t in zip(rows.input_ids_RT.ravel(), rows.target_RT.ravel(), strict=True):
            if t != -100:
                counts[i, t] += 1
    best = math.inf
    for k in SMOOTHING_GRID:
        probability = (counts + k) / (counts + k).sum(axis=1, keepdims=True)
        logs = [math.log(probability[i, t])
                for i, t in zip(heldout.input_ids_RT.ravel(), heldout.target_RT.ravel(), strict=True) if t != -100]
        best = min(best, math.exp(-sum(logs) / len(logs)))
    return best


@pytest.mark.parametrize("num_updates", [0, 1, 4])
def test_equals_the_dense_reference(num_updates: int) -> None:
    heldout, training = random_rows(0, 6), [random_rows(seed, 10) for seed in range(1, num_updates + 1)]
    baseline = BigramBaseline(heldout, V)
    for rows in training:
        baseline.update(rows)
    assert baseline.perplexity() == pytest.approx(dense_reference(heldout, training), rel=1e-12)


def test_starts_at_the_vocabulary_and_learns() -> None:
    baseline = BigramBaseline(random_rows(0, 20), V)
    assert baseline.perplexity() == pytest.approx(V)
    baseline.update(random_rows(1, 200))
    assert baseline.perplexity() < 4.0  # three equally likely successors: 3 at best


def test_counts_of_ranks_add_up() -> None:
    heldout = random_rows(0, 6)
    whole, parts = BigramBaseline(heldout, V), [BigramBaseline(heldout, V) for _ in range(2)]
    for seed in range(1, 5):
        whole.update(random_rows(seed, 10))
        parts[seed % 2].update(random_rows(seed, 10))
    counts: list[np.ndarray] = []
    parts[0].perplexity(lambda own: counts.append(own) or own)
    assert parts[1].perplexity(lambda own: own + counts[0]) == whole.perplexity()
    assert parts[1].perplexity() != whole.perplexity()


def test_large_vocabularies_stay_small() -> None:
    heldout = random_rows(0, 6)
    num_targets = int((heldout.target_RT != -100).sum())
    baseline = BigramBaseline(heldout, 1_000_000)
    baseline.update(random_rows(1, 6))
    sizes: list[int] = []
    assert 1 < baseline.perplexity(lambda counts: sizes.append(len(counts)) or counts) < 1_000_000
    assert sizes[0] <= num_targets + 1_000_000

"""The count baseline a language model has to beat: next token from the current one only.

Array suffixes: K distinct (input, target) pairs of the held-out rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asa_dist.runtime.data.rows import NO_TARGET, PackedRows

SMOOTHING_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


class BigramBaseline:
    """Counts pairs of the training rows it is shown and predicts the held-out targets.

    ``p(target | input) = (count(input, target) + k) / (count(input) + k·V)``. Only pairs that occur in the held-out
    rows are counted: memory O(K + V). Counts of several ranks add up.
    """

    def __init__(self, heldout: PackedRows, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pair_K, self._heldout_count_K = np.unique(self._pairs(heldout), return_counts=True)
        self._pair_count_K = np.zeros(len(self._pair_K), np.int64)
        self._input_count_V = np.zeros(vocab_size, np.int64)

    def update(self, rows: PackedRows) -> None:
        """Adds the (input, target) pairs of training rows."""
        pairs = self._pairs(rows)
        self._input_count_V += np.bincount(pairs // self._vocab_size, minlength=self._vocab_size)
        known = pairs[np.isin(pairs, self._pair_K)]
        self._pair_count_K += np.bincount(np.searchsorted(self._pair_K, known), minlength=len(self._pair_K))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The counts, int64 [K] and [V]."""
        return {"pair_count": self._pair_count_K, "input_count": self._input_count_V}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._pair_count_K, self._input_count_V = state["pair_count"].copy(), state["input_count"].copy()

    def perplexity(self, sum_over_ranks: Callable[[np.ndarray], np.ndarray] = lambda counts: counts) -> float:
        """Per held-out target token, with the k of ``SMOOTHING_GRID`` that is best *on the held-out rows themselves*.

        So the baseline gets its best number, a little better than an honest choice of k would give.
        """
        counts = sum_over_ranks(np.concatenate([self._pair_count_K, self._input_count_V]))
        pair_count_K, input_count_V = np.split(counts, [len(self._pair_K)])
        context_K = input_count_V[self._pair_K // self._vocab_size]
        return min(self._perplexity(pair_count_K, context_K, k) for k in SMOOTHING_GRID)

    def _perplexity(self, pair_count_K: np.ndarray, context_K: np.ndarray, k: float) -> float:
        logprob_K = np.log(pair_count_K + k) - np.log(context_K + k * self._vocab_size)
        return float(np.exp(-np.average(logprob_K, weights=self._heldout_count_K)))

    def _pairs(self, rows: PackedRows) -> np.ndarray:
        """int64, one number per pair: input · V + target."""
        has_target = rows.target_RT != NO_TARGET
        return rows.input_ids_RT[has_target] * self._vocab_size + rows.target_RT[has_target]

"""Every order and every draw of this package: functions of explicit keys, so that nothing needs to be remembered.

A key is (run seed, purpose, …). Purposes keep streams apart that would otherwise share their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROW_ORDER, PROMPT_ORDER, PROMPT_LENGTH, HELDOUT_ORDER, PROMPT_PHRASINGS = range(5)


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def derived_seed(*key: int) -> int:
    """A 31-bit seed for libraries that take a single integer."""
    return int(generator(*key).integers(2**31))


class Mixture:
    """Which source gives item n: proportional to weights, without randomness, in closed form at any n.

    Of the first n items source 0 has ⌊n·w₀/Σw + ½⌋; the others share what remains in the same way. So after any number
    of items every source is within a few of its exact share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        remaining = np.cumsum(np.asarray(weights, np.float64)[::-1])[::-1]  # own weight + those of all later sources
        self._share_S = np.asarray(weights, np.float64) / remaining  # the last one is exactly 1

    def counts(self, num_items: int) -> list[int]:
        """Items of each source among the first ``num_items``; they sum to ``num_items``."""
        counts = []
        for share in self._share_S:
            counts.append(_first_share(num_items, share))
            num_items -= counts[-1]
        return counts

    def locate(self, item: int) -> tuple[int, int]:
        """``(source, how many items of this source came before)`` of item number ``item``."""
        for source, share in enumerate(self._share_S):
            before = _first_share(item, share)
            if _first_share(item + 1, share) > before:
                return source, before
            item -= before
        raise AssertionError("the last source takes every item left")


def _first_share(num_items: int, share: float) -> int:
    return int(np.floor(num_items * share + 0.5))

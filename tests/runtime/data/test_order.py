from __future__ import annotations

from fractions import Fraction

import pytest

from asa_dist.runtime.data.order import Mixture


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [1e-3, 5.0, 2.5, 0.3], [1.0] * 9])
def test_every_prefix_is_mixed_by_weight_and_counted_exactly(weights: list[float]) -> None:
    mixture = Mixture(weights)
    seen = [0] * len(weights)
    for item in range(3000):
        assert mixture.counts(item) == seen
        source, before = mixture.locate(item)
        assert before == seen[source]
        seen[source] += 1
        for count, weight in zip(seen, weights, strict=True):
            exact = Fraction(weight) / sum(map(Fraction, weights)) * (item + 1)
            assert abs(count - exact) < 2


def test_far_places_need_no_replay() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    assert sum(mixture.counts(10**12)) == 10**12
    source, before = mixture.locate(10**12)
    assert mixture.counts(10**12)[source] == before

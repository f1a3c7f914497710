"""Learning rates by step: warm-up, then what is configured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from asa_dist.config import OptimizerConfig
from asa_dist.runtime.engine import learning_rates, schedule_factor


def factors(num_steps: int, **changes: Any) -> list[float]:
    return [schedule_factor(step, num_steps, OptimizerConfig(**changes)) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "robbins_monro", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = factors(10, schedule=schedule, warmup_steps=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx(1.0), "no jump where the schedule begins"
    assert factors(3, schedule=schedule, warmup_steps=0)[0] == pytest.approx(1.0)


def test_cosine_falls_to_its_final_fraction() -> None:
    found = factors(105, warmup_steps=5, final_fraction=0.1)[5:]
    assert all(after < before for before, after in itertools.pairwise(found))
    assert found[50] == pytest.approx((1 + 0.1) / 2), "half-way"
    config = OptimizerConfig(warmup_steps=5, final_fraction=0.1)
    assert [schedule_factor(step, 105, config) for step in (105, 1000)] == pytest.approx([0.1, 0.1])
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_constant_stays() -> None:
    assert set(factors(50, schedule="constant", warmup_steps=3)[2:]) == {1.0}


@pytest.mark.parametrize("power", [0.51, 0.6, 1.0])
def test_robbins_monro(power: float) -> None:
    """η₀ / (1 + t/t₀)^p with ½ < p ≤ 1, t counted from the end of the warm-up."""
    config = OptimizerConfig(schedule="robbins_monro", warmup_steps=7, robbins_monro_t0=20, robbins_monro_power=power)
    for t in (0, 1, 20, 333):
        assert schedule_factor(7 + t, 10, config) == pytest.approx(1 / (1 + t / 20) ** power), "whatever num_steps"


@pytest.mark.parametrize("power", [0.6, 0.8, 1.0])
def test_robbins_monro_conditions(power: float) -> None:
    """Σ η diverges, Σ η² converges: from one doubling of the run to the next, what is added does not shrink, or does.

    The added Σ η tends to c·2^(1−p), the added Σ η² to c·2^(1−2p) times that of the doubling before.
    """
    found = factors(2**14, schedule="robbins_monro", warmup_steps=0, robbins_monro_t0=1, robbins_monro_power=power)
    doublings = [(2**k, 2 ** (k + 1)) for k in range(8, 14)]
    added = [sum(found[start:stop]) for start, stop in doublings]
    added_squares = [sum(x * x for x in found[start:stop]) for start, stop in doublings]
    for before, after in itertools.pairwise(added):
        assert after > 0.99 * before
        assert after / before == pytest.approx(2 ** (1 - power), rel=0.01)
    for before, after in itertools.pairwise(added_squares):
        assert after < 0.9 * before
        assert after / before == pytest.approx(2 ** (1 - 2 * power), rel=0.01)


def test_every_part_has_its_own_peak() -> None:
    config = OptimizerConfig(warmup_steps=4, lr_psi=4.0, lr_phi=2.0, lr_xi=0.0)
    assert learning_rates(1, 10, config) == {"psi": 2.0, "phi": 1.0, "xi": 0.0}

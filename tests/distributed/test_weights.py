"""What a worker serves is what the trainer holds: bit for bit, every stage, tied and untied, both dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.distributed.weight_cases import CASES, all_cases


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_served_weights_are_the_trainers(num_ranks: int, tmp_path: Path) -> None:
    for cases in run_on_ranks(all_cases, num_ranks, str(tmp_path)):
        assert list(cases) == CASES
        for case, seen in cases.items():
            assert seen["names_equal"], case
            assert all(seen["same"].values()), (
                f"{case}: differ: {[name for name, same in seen['same'].items() if not same]}"
            )
            bound = 1e-4 if case[1] == "float32" else 0.1
            assert seen["max_abs_dlogp"] < bound, f"{case}: log-probabilities differ by {seen['max_abs_dlogp']:.2e}"

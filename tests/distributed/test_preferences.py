"""DPO on the sharded engine is DPO: on any number of ranks, with accumulation, partitioned or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.preference_cases import STEPS, Outcome, both_stages, plain_steps
from tests.distributed.ranks import run_on_ranks

TOLERANCE = 1e-4  # of float32 gradients, relative, after two updates


@pytest.fixture(scope="module")
def expected() -> Outcome:
    return plain_steps()


@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "accumulation_steps"), [(1, 1), (2, 1), (2, 2)])
def test_dpo_steps_equal_plain_torch(
    num_ranks: int, accumulation_steps: int, expected: Outcome, tmp_path: Path
) -> None:
    for stages in run_on_ranks(both_stages, num_ranks, accumulation_steps, tmp_path):
        for stage, found in stages.items():
            np.testing.assert_allclose(
                found.reference, expected.reference, atol=1e-5, rtol=0, err_msg=f"stage {stage}"
            )
            assert len(found.sums) == len(STEPS) + 1
            for number, (sums, wanted) in enumerate(zip(found.sums, expected.sums, strict=True)):
                assert sums == pytest.approx(wanted, rel=1e-4, abs=1e-4), f"stage {stage}, step {number}"
            assert abs(expected.sums[1]["udasa/margin"]) > 0.01, "the steps should have moved the model"
            check_gradients(stage, found, expected)


def check_gradients(stage: int, found: Outcome, expected: Outcome) -> None:
    assert found.gradients.keys() == expected.gradients.keys()
    total = np.linalg.norm(np.concatenate([values.ravel() for values in expected.gradients.values()]))
    for name, wanted in expected.gradients.items():
        error = np.linalg.norm(found.gradients[name] - wanted) / max(np.linalg.norm(wanted), 1e-3 * total)
        assert error < TOLERANCE, f"stage {stage}, {name}: relative error {error:.2e}"

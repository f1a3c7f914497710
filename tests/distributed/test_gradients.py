"""The one backward of the fused step yields what each loss yields on its own, however the batch is split."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.asa import worlds
from tests.distributed.gradient_cases import Gradients, Outcome, all_stages, separate_gradients, with_recomputation
from tests.distributed.ranks import run_on_ranks
from tests.distributed.tiny import micro_batches

TOLERANCE = 1e-5


def norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values))


def responses_with_token() -> list[int]:
    """In how many responses of the whole batch each token occurs."""
    groups = micro_batches(1, 0, 1)[0].responses
    texts = zip(groups.content_PGT.flatten(0, 1).tolist(), groups.content_length_PG.flatten().tolist(), strict=True)
    contents = [content[:length] for content, length in texts]
    return [sum(token in content for content in contents) for token in range(worlds.VOCAB)]


def check(stages: dict[int, Outcome], expected: Gradients) -> None:
    for stage, (gradients, corpus, responses_with_V) in stages.items():
        assert gradients.keys() == expected.keys()
        assert corpus == pytest.approx(math.log(worlds.VOCAB), rel=0.05), f"stage {stage}: initial loss is not ln V"
        assert responses_with_V.tolist() == responses_with_token(), f"stage {stage}"
        for part in ("psi", "phi", "xi"):
            names = [name for name in expected if name.startswith(f"{part}.")]
            wanted = np.concatenate([expected[name].ravel() for name in names])
            found = np.concatenate([gradients[name].ravel() for name in names])
            assert norm(wanted) > 0
            error = norm(found - wanted) / norm(wanted)
            assert error < TOLERANCE, f"stage {stage}, {part}: relative error {error:.2e}"
            for name in names:
                scale = max(norm(expected[name]), 1e-3 * norm(wanted))
                error = norm(gradients[name] - expected[name]) / scale
                assert error < TOLERANCE, f"stage {stage}, {name}: relative error {error:.2e}"


@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "accumulation_steps"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_fused_backward_equals_separate_losses(num_ranks: int, accumulation_steps: int) -> None:
    expected = separate_gradients()
    for stages in run_on_ranks(all_stages, num_ranks, accumulation_steps):
        check(stages, expected)


@pytest.mark.distributed
def test_recomputed_activations_change_nothing() -> None:
    expected = separate_gradients()
    for stages in run_on_ranks(with_recomputation, 2):
        check(stages, expected)

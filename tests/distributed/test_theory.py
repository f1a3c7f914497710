"""What is measured of a step is what its definition says, at every ZeRO stage; and measuring changes nothing."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.distributed.theory_cases import CASES, NUM_STEPS, Theory, all_cases, by_definition, in_bfloat16

VARIANCES = {f"theory/gradient_variance/{part}" for part in ("psi", "phi", "xi")}
ALWAYS = {"theory/reward_max", "theory/lipschitz_phi"}


@pytest.fixture(scope="module")
def wanted() -> list[Theory]:
    return by_definition()


def test_the_definition_has_something_to_tell(wanted: list[Theory]) -> None:
    assert [set(values) for values in wanted] == [ALWAYS] + [ALWAYS | VARIANCES] * (NUM_STEPS - 1)
    assert all(value > 0 for values in wanted for value in values.values())


@pytest.mark.distributed
def test_observed_steps(wanted: list[Theory]) -> None:
    ranks = run_on_ranks(all_cases, 2)
    for name in CASES:
        for seen in (rank[name] for rank in ranks):
            assert seen.theory == ranks[0][name].theory, name
            assert seen.same_end, f"{name}: observing changed the training"
            for step, (found, expected) in enumerate(zip(seen.theory, wanted, strict=True)):
                assert found == pytest.approx(expected, rel=2e-3), f"{name}, step {step}"
            assert set(seen.when_phi_rests) == VARIANCES | {"theory/reward_max"}, name
            assert seen.when_skipped == {} and seen.num_hooks_left == 0, name


@pytest.mark.distributed
def test_in_bfloat16(wanted: list[Theory]) -> None:
    first, second = run_on_ranks(in_bfloat16, 2)
    assert first == second
    for stage, found in first.items():
        assert set(found) == ALWAYS | VARIANCES, f"stage {stage}"
        # DeepSpeed begins stage 0 in bfloat16 with a gradient of zeros, which Adam's averages remember for a while
        comparable = ALWAYS if stage == 0 else ALWAYS | VARIANCES
        for name in comparable:
            assert found[name] == pytest.approx(wanted[-1][name], rel=0.1), f"stage {stage}, {name}"

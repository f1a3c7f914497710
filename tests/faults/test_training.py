"""A step with a value that is not finite leaves no trace but its reason: every stage, dtype and accumulation."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.faults.training_cases import KINDS, SETTINGS, Seen, all_settings


def check(where: str, seen: Seen) -> None:
    assert set(seen.good_reasons) == {""}, where
    assert list(seen.skipped) == list(KINDS)
    for kind, skipped in seen.skipped.items():
        assert skipped.reason.startswith("not finite:"), f"{where}, {kind}"
        assert skipped.unchanged, f"{where}, {kind}: weights, moments or step counts changed"
    assert seen.same_end, f"{where}: later steps are not what they would have been"
    reward, loss, gradient = (seen.skipped[kind] for kind in ("reward", "loss", "gradient"))
    # of four groups rank 0 holds the first two
    assert "; reward terms self, used, advantage; " in reward.reason, where
    assert reward.prompt_ids == [100, 101] and reward.reason.endswith("; on rank 0; prompts 100, 101"), where
    assert loss.reason.startswith("not finite: loss/total; gradients of psi"), where
    assert loss.prompt_ids == [] and loss.reason.endswith("; on rank 1"), where
    assert gradient.reason == "not finite: gradients of psi, phi, xi" and gradient.prompt_ids == [], where


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_steps_are_as_if_they_had_not_been_and_all_ranks_say_why() -> None:
    for rank, settings in enumerate(run_on_ranks(all_settings, 2)):
        assert list(settings) == SETTINGS
        for setting, seen in settings.items():
            check(f"rank {rank}, (stage, dtype, micro-batches) = {setting}", seen)

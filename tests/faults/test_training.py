"""A step with a value that is not finite leaves no trace but its reason: every stage, dtype and accumulation."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.faults.training_cases import KINDS, SETTINGS, all_settings


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bad_steps_are_as_if_they_had_not_been(num_ranks: int) -> None:
    for rank, settings in enumerate(run_on_ranks(all_settings, num_ranks)):
        assert list(settings) == SETTINGS
        for setting, seen in settings.items():
            where = f"rank {rank} of {num_ranks}, (stage, dtype, micro-batches) = {setting}"
            assert set(seen.good_reasons) == {""}, where
            assert list(seen.skipped) == list(KINDS)
            for kind, skipped in seen.skipped.items():
                assert skipped.reason.startswith("not finite:"), f"{where}, {kind}"
                assert skipped.unchanged, f"{where}, {kind}: weights, moments or step counts changed"
            assert seen.same_end, f"{where}: later steps are not what they would have been"


@pytest.mark.distributed
def test_all_ranks_name_values_and_prompts_in_the_same_words() -> None:
    first, second = run_on_ranks(all_settings, 2)
    for setting in SETTINGS:
        assert first[setting].skipped == second[setting].skipped
        reward, loss, gradient = (first[setting].skipped[kind] for kind in ("reward", "loss", "gradient"))
        # of four groups rank 0 holds the first two; the last of its prompts ...
        assert reward.prompt_ids == [100, 101] and "; on rank 0; prompts 100, 101" in reward.reason
        assert "reward term self" in reward.reason and "reward term logic" not in reward.reason
        assert loss.prompt_ids == [] and "loss/total; " not in loss.reason
        assert gradient.reason.startswith("not finite: gradient of psi") and gradient.prompt_ids == []

"""When trainer and rollout engine disagree: what is done, when, and what it may come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from asa_dist.asa.mismatch import Mismatch, MismatchGuard
from asa_dist.config import ModelConfig, RolloutConfig

BOUND, PATIENCE = 0.1, 3


def guard(*, dtype: str = "float32", **rollout: Any) -> MismatchGuard:
    settings = {"mismatch_kl_bound": BOUND, "mismatch_patience_steps": PATIENCE, "engine": "vllm", **rollout}
    rollout = RolloutConfig.model_validate(settings)
    return MismatchGuard(rollout, ModelConfig.model_validate({"dtype": dtype}), rollout.engine)


def look(it: MismatchGuard, step: int, kl: float, *, difference: float = 3.0, age: int = 1) -> Mismatch | None:
    return it.look({"step": step, "rollout/mismatch_kl": kl, "rollout/max_abs_dlogp": difference,
                    "rollout/policy_age_max": float(age)})


def actions(it: MismatchGuard, kls: Sequence[float], **values: Any) -> dict[int, str]:
    """By step, from step 1 on."""
    found = ((step, look(it, step, kl, **values)) for step, kl in enumerate(kls, start=1))
    return {step: mismatch.action for step, mismatch in found if mismatch is not None}


def test_only_what_lasts_counts() -> None:
    assert actions(guard(on_mismatch="stop"), [0.2, 0.2, 0.1, 0.2, 0.2, 0.05] * 50) == {}
    assert actions(guard(on_mismatch="stop"), [0.2, 0.2, 0.1, 0.2, 0.2, 0.11]) == {6: "stop"}


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_what_is_no_number_counts(kl: float) -> None:
    assert actions(guard(), [0.2, kl, kl]) == {3: "warn"}
    assert told(guard(), kl, difference=kl).event["mismatch_kl"] is None, "JSON has no such number"


def test_a_warning_comes_once_an_episode_and_every_100_steps_of_it() -> None:
    assert actions(guard(), [*[0.2] * 210, 0.0, *[0.2] * 4]) == {3: "warn", 103: "warn", 203: "warn", 214: "warn"}


@pytest.mark.parametrize(("max_policy_age", "expected"), [(0, {3: "fall_back", 7: "stop"}),
                                                          (2, {3: "fall_back", 9: "stop"})])
def test_after_falling_back_only_the_new_workers_rollouts_count(max_policy_age: int, expected: dict[int, str]) -> None:
    falling = guard(on_mismatch="fall_back", max_policy_age=max_policy_age)
    assert actions(falling, [0.2] * max(expected)) == expected
    helped = guard(on_mismatch="fall_back", max_policy_age=max_policy_age)
    assert actions(helped, [*[0.2] * (4 + max_policy_age), *[0.0] * 200]) == {3: "fall_back"}


def test_there_is_nothing_to_fall_back_to_from_hf() -> None:
    it = guard(on_mismatch="fall_back", engine="hf")
    found = [look(it, step, 0.2) for step in (1, 2, 3)][-1]
    assert found is not None and found.action == "stop"
    assert found.consequence.endswith("rollout.on_mismatch = fall_back: the run stops, as the engine is hf already")


# --- on policy, one large difference is enough ----------------------------------------------------------------------
def test_on_policy_a_single_difference_is_said_at_most_every_100_steps() -> None:
    it = guard(on_mismatch="stop")
    found = {step: look(it, step, 1e-6, difference=0.11 if step >= 3 else 0.09, age=0) for step in range(1, 210)}
    assert [step for step, mismatch in found.items() if mismatch] == [3, 103, 203]
    assert {mismatch.action for mismatch in found.values() if mismatch} == {"warn"}


def test_older_weights_may_differ() -> None:
    assert look(guard(), 1, 1e-3, difference=5.0, age=1) is None


# --- what a reader gets -----------------------------------------------------------------------------------------
def told(it: MismatchGuard, kl: float, **values: Any) -> Mismatch:
    for step in range(7, 7 + PATIENCE):
        found = look(it, step, kl, **values)
    assert found is not None
    return found


def test_message_and_event() -> None:
    found = told(guard(on_mismatch="fall_back"), 0.25, difference=1.5, age=2)
    first, second, *causes, last = found.message.splitlines()
    assert first == (
        "asa: warning: step 9: trainer and rollout engine disagree about log-probabilities: rollout/mismatch_kl is "
        "0.25 nats per token, for 3 step(s) in a row above rollout.mismatch_kl_bound = 0.1; rollout/max_abs_dlogp is "
        "1.5 nats, with weights up to 2 step(s) old")
    assert second == "  Likely causes, the likeliest first:"
    assert [cause.split(".")[0] for cause in causes] == ["  1", "  2", "  3", "  4"]
    assert last.startswith("  rollout.on_mismatch = fall_back: new workers with engine hf")
    assert found.event == {"step": 9, "mismatch_kl": 0.25, "bound": 0.1, "steps_in_a_row": 3, "max_abs_dlogp": 1.5,
                           "policy_age": 2, "action": "fall_back"}


AGE, ROUNDING, WEIGHTS = "weights that change too fast", "the rounding of model.dtype", "weights in the engine"
VLLM, ATTENTION, HOSTS = "a version of vLLM", "another attention", "other versions of torch"
HEAT, TRUNCATION = "another meaning of rollout.temperature = 0.5", "log-probabilities after truncation"


@pytest.mark.parametrize(
    ("settings", "kl", "values", "expected"),
    [
        ({}, 0.2, {"age": 0}, [WEIGHTS, VLLM, ATTENTION]),
        ({}, 0.2, {"age": 1}, [AGE, WEIGHTS, VLLM, ATTENTION]),
        ({"dtype": "bfloat16"}, 0.2, {"age": 0}, [WEIGHTS, VLLM, ATTENTION, ROUNDING]),
        ({"dtype": "bfloat16", "mismatch_kl_bound": 0.001}, 0.005, {"age": 0}, [ROUNDING, WEIGHTS, VLLM, ATTENTION]),
        ({"engine": "hf"}, 0.2, {"age": 0}, [ATTENTION, HOSTS]),
        ({"temperature": 0.5}, 0.2, {"age": 0, "difference": 1e-6}, [HEAT, WEIGHTS, VLLM, ATTENTION]),
        ({"temperature": 0.5}, 0.2, {"age": 0, "difference": 2.0}, [WEIGHTS, VLLM, ATTENTION]),
        ({"temperature": 0.5, "mismatch_kl_bound": 1e-30}, 2e-13, {"age": 0, "difference": 1e-6},
         [WEIGHTS, VLLM, ATTENTION]),
        ({"top_k": 5}, 0.2, {"age": 0}, [WEIGHTS, VLLM, TRUNCATION, ATTENTION]),
    ],
)
def test_causes_follow_the_evidence(
    settings: dict[str, Any], kl: float, values: dict[str, Any], expected: list[str]
) -> None:
    causes = told(guard(**settings), kl, **values).causes
    assert len(causes) == len(expected)
    assert all(cause.startswith(start) for cause, start in zip(causes, expected, strict=True)), causes

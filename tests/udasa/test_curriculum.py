"""The curriculum: plan, learning rate, order of pairs, held-out pairs, early stopping."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from asa_dist.config_udasa import CurriculumConfig
from asa_dist.udasa.curriculum import MIN_MARGIN_GAIN, StagePlan, Stopping, plan_curriculum, shuffled, split_heldout

PEAK = 5e-6


def stage_of(num_steps: int, **changes: Any) -> StagePlan:
    """A stage alone, of so many steps of one pair."""
    settings = {"pairs_per_step": 1, "heldout_fraction": 0.0, "learning_rates": [PEAK], "max_steps": 10**6} | changes
    (plan,) = plan_curriculum(dict.fromkeys(range(num_steps), 0), CurriculumConfig(**settings), seed=0, round_index=0)
    assert plan.num_steps == min(num_steps, settings["max_steps"])
    return plan


def three_stages(num_pairs: int = 100) -> dict[int, int]:
    """Stage by prompt id: 0, 1 and 2 take turns."""
    return {7 * number + 3: number % 3 for number in range(num_pairs)}


# --- learning rate ----------------------------------------------------------------------------------------------
def test_learning_rate_of_the_longest_stage() -> None:
    """3,000 steps: 300 of warm-up (10 %, less than 500), 2,400 constant, 300 of decay."""
    plan = stage_of(4000, max_steps=3000)
    expected = {0: 1 / 300, 150: 151 / 300, 299: 1, 300: 1, 301: 1, 2699: 1, 2700: 1, 2701: 299 / 300, 2999: 1 / 300}
    assert {step: plan.learning_rate(step) for step in expected} == pytest.approx(
        {step: PEAK * factor for step, factor in expected.items()}, rel=1e-12
    )
    assert math.fsum(map(plan.learning_rate, range(3000))) == pytest.approx(PEAK * (2400 + 301))
    for step in (-1, 3000):
        with pytest.raises(ValueError, match=f"stage 0 has steps 0 to 2999, and no step {step}"):
            plan.learning_rate(step)


def test_warm_up_has_an_upper_limit() -> None:
    """The paper's 500, where 10 % of the planned steps would be more."""
    plan = stage_of(7000)
    assert (plan.num_warmup_steps, plan.num_decay_steps) == (500, 700)
    expected = {0: 1 / 500, 249: 1 / 2, 498: 499 / 500, 499: 1, 500: 1}
    for step, factor in expected.items():
        assert plan.learning_rate(step) == pytest.approx(PEAK * factor, rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 19, 20, 100])
def test_short_stages_have_every_step_at_a_rate(num_steps: int) -> None:
    for fraction in (0.0, 0.1, 0.29, 0.8, 1.0):  # two of which overlap
        plan = stage_of(num_steps, warmup_fraction=fraction, decay_fraction=fraction)
        assert plan.num_warmup_steps == plan.num_decay_steps == math.floor(round(fraction * num_steps, 6))
        rates = [plan.learning_rate(step) for step in range(num_steps)]
        assert all(0 < rate <= PEAK for rate in rates)
        assert rates == rates[::-1], "decay mirrors warm-up"


# --- plan -------------------------------------------------------------------------------------------------------
def test_stages_go_from_clear_to_doubtful_at_their_own_rates() -> None:
    plans = plan_curriculum(three_stages(), CurriculumConfig(pairs_per_step=7), seed=1, round_index=0)
    assert [plan.stage for plan in plans] == [0, 1, 2]
    assert [plan.peak_learning_rate for plan in plans] == [3e-6, 5e-6, 5e-6]
    assert [plan.is_last for plan in plans] == [False, False, True]
    for plan in plans:
        assert {three_stages()[prompt_id] for prompt_id in (*plan.train_ids, *plan.heldout_ids)} == {plan.stage}
        assert (len(plan.train_ids), len(plan.heldout_ids)) == ((31, 3) if plan.stage == 0 else (30, 3))
        assert plan.num_steps == 5
    assert plan_curriculum({}, CurriculumConfig(), seed=1, round_index=0) == ()


def test_a_stage_without_pairs_is_left_out() -> None:
    """Which stage is the first and which the last goes by those that are trained."""
    by_id = {prompt_id: stage for prompt_id, stage in three_stages().items() if stage == 1}
    (plan,) = plan_curriculum(by_id, CurriculumConfig(), seed=0, round_index=0)
    assert (plan.stage, plan.peak_learning_rate, plan.is_last) == (1, 3e-6, True)


def test_random_order_of_stages_is_seeded() -> None:
    config = CurriculumConfig(order="random", learning_rates=[1.0, 2.0, 3.0])
    found = Counter()
    for seed in range(100):
        plans = plan_curriculum(three_stages(), config, seed, round_index=0)
        assert plans == plan_curriculum(three_stages(), config, seed, round_index=0)
        assert [plan.peak_learning_rate for plan in plans] == [1.0, 2.0, 3.0]
        assert [plan.is_last for plan in plans] == [False, False, True]
        found[tuple(plan.stage for plan in plans)] += 1
    assert set(found) == set(itertools.permutations(range(3)))
    assert min(found.values()) > 5


@pytest.mark.parametrize(
    ("num_pairs", "max_epochs", "max_steps", "expected"),
    [(100, 1, 3000, 4), (96, 1, 3000, 3), (97, 1, 3000, 4), (5, 1, 3000, 1), (5, 3, 3000, 3), (100, 3, 5, 5)],
)
def test_planned_steps(num_pairs: int, max_epochs: int, max_steps: int, expected: int) -> None:
    config = CurriculumConfig(heldout_fraction=0.0, max_epochs=max_epochs, max_steps=max_steps)  # 32 pairs per step
    (plan,) = plan_curriculum(dict.fromkeys(range(num_pairs), 2), config, seed=0, round_index=0)
    assert plan.num_steps == expected == len(list(plan.pairs_by_step()))


# --- order of pairs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_pairs", [1, 31, 33, 100])
def test_every_epoch_has_every_pair_once_in_steps_of_equal_size(num_pairs: int) -> None:
    config = CurriculumConfig(heldout_fraction=0.0, max_epochs=3)
    (plan,) = plan_curriculum(dict.fromkeys(range(num_pairs), 0), config, seed=5, round_index=0)
    steps = list(plan.pairs_by_step())
    sizes = {len(prompt_ids) for prompt_ids in steps}
    assert min(sizes) >= 1 and max(sizes) <= 32 and max(sizes) - min(sizes) <= 1
    assert len(steps) == 3 * plan.steps_per_epoch
    ordered = list(itertools.chain(*steps))
    epochs = [ordered[k * num_pairs : (k + 1) * num_pairs] for k in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_pairs))
    if num_pairs > 1:
        assert len(set(map(tuple, epochs))) == 3, "in another order each time"


def test_a_resumed_stage_goes_on_with_the_same_pairs() -> None:
    config = CurriculumConfig(pairs_per_step=4, max_epochs=2, max_steps=25)
    (plan, *_) = plan_curriculum(three_stages(150), config, seed=9, round_index=1)
    undisturbed = list(plan.pairs_by_step())
    assert len(undisturbed) == plan.num_steps > plan.steps_per_epoch
    shuffled_ids = dict(sorted(three_stages(150).items(), key=lambda item: item[0] % 11))
    (again, *_) = plan_curriculum(shuffled_ids, config, seed=9, round_index=1)
    for step in range(plan.num_steps + 1):
        assert list(again.pairs_by_step(step)) == undisturbed[step:]


def test_seeds_and_rounds_have_orders_of_their_own() -> None:
    config = CurriculumConfig(heldout_fraction=0.0, pairs_per_step=40)
    orders = set()
    for seed, round_index in ((0, 0), (0, 1), (1, 0)):
        (plan,) = plan_curriculum(dict.fromkeys(range(40), 0), config, seed, round_index)
        orders |= {tuple(prompt_ids) for prompt_ids in plan.pairs_by_step()}
    assert len(orders) == 3


def test_an_order_is_uniform_and_does_not_depend_on_what_is_missing() -> None:
    orders = np.array([shuffled(range(6), "test", seed) for seed in range(3000)])
    for place in range(6):
        counts = np.bincount(orders[:, place], minlength=6)
        assert ((counts - 500) ** 2 / 500).sum() < 20.5, "χ², 5 degrees of freedom, p = 0.001"
    whole = shuffled(range(50), "test", 1)
    assert shuffled(range(0, 50, 3), "test", 1) == [number for number in whole if number % 3 == 0]


# --- held-out pairs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_pairs", "fraction", "num_heldout"),
    [(0, 0.1, 0), (1, 0.1, 0), (1, 1.0, 0), (2, 1.0, 1), (4, 0.1, 0), (5, 0.1, 1), (50, 0.1, 5), (50, 0.0, 0)],
)
def test_held_out_pairs(num_pairs: int, fraction: float, num_heldout: int) -> None:
    ids = [3 * number + 1 for number in range(num_pairs)]
    trained, heldout = split_heldout(ids, fraction, seed=2)
    assert len(heldout) == num_heldout
    assert sorted((*trained, *heldout)) == ids
    assert split_heldout(ids[::-1], fraction, seed=2) == (trained, heldout)


def test_prompts_stay_on_their_side_from_round_to_round() -> None:
    """Though some of them have no pair in the second round."""
    _, before = split_heldout(range(1000), 0.1, seed=3)
    second = [prompt_id for prompt_id in range(1000) if prompt_id % 10]
    trained, heldout = split_heldout(second, 0.1, seed=3)
    assert len(set(before) & set(trained)) + len(set(heldout) - set(before)) <= 30
    assert split_heldout(range(1000), 0.1, seed=4)[1] != before


# --- early stopping ---------------------------------------------------------------------------------------------
def stops_at(evaluations: list[tuple[float, float]], patience: int = 3) -> tuple[int | None, str]:
    """(number of the evaluation that ends the stage, why)."""
    stopping = Stopping()
    for number, evaluation in enumerate(evaluations):
        stopping = stopping.after(*evaluation)
        if reason := stopping.reason(patience):
            return number, reason
    return None, ""


def test_a_stage_goes_on_while_both_improve() -> None:
    assert stops_at([(0.69 - 0.001 * k, 0.01 * k) for k in range(40)]) == (None, "")


def test_it_ends_when_the_loss_stops_falling() -> None:
    losses = [0.69, 0.60, 0.61, 0.61, 0.59, 0.59, 0.62, 0.60, 0.5]
    number, reason = stops_at([(loss, k + 1.0) for k, loss in enumerate(losses)])
    assert (number, reason) == (7, "the held-out loss has not fallen in 3 evaluations")


def test_it_ends_when_the_margin_saturates() -> None:
    """Growth by less than 1 % within patience, though it never stops; negative margins can rise too."""
    margins = [-2.0, -1.0, 0.0, 1.0, 1.004, 1.008, 1.012, 1.0122, 1.016, 1.020, 1.0222]
    number, reason = stops_at([(1.0 - 0.01 * k, margin) for k, margin in enumerate(margins)])
    assert MIN_MARGIN_GAIN == 0.01
    assert (number, reason) == (9, "the held-out margin is saturated: it has not grown by 1% in 3 evaluations")


def test_a_negative_margin_can_saturate_too() -> None:
    number, reason = stops_at([(1.0 - 0.01 * k, margin) for k, margin in enumerate([-1.0, -0.999, -0.995, -0.991])])
    assert number == 3 and "saturated" in reason


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_no_progress(broken: float) -> None:
    for evaluation in ((broken, 1.0), (0.1, broken)):
        assert stops_at([(0.5, 0.5)] + [evaluation] * 3)[0] == 3
        assert stops_at([evaluation] * 3)[0] == 2
    assert Stopping().after(broken, broken).after(0.5, 0.5) == Stopping().after(0.5, 0.5)


def test_a_checkpoint_holds_it() -> None:
    stopping = Stopping()
    for evaluation in ((0.7, 0.1), (1 / 3, 0.1), (0.5, math.nan)):
        for state in (stopping, stopping := stopping.after(*evaluation)):
            saved = safetensors.torch.load(safetensors.torch.save(state.state_dict()))
            restored = Stopping.from_state_dict(saved)
            assert restored == state and restored.reason(1) == state.reason(1)
    with pytest.raises(KeyError, match="margin_to_beat"):
        Stopping.from_state_dict({name: value for name, value in saved.items() if name != "margin_to_beat"})

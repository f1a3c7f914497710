"""benchmarks/planner.py without its minutes: when it keeps its promise, and whom it blames if not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planner import (
    CASES,
    CONFIG,
    PARTS,
    SIZES,
    TARGET_BYTES,
    TARGET_STEP,
    Bytes,
    Size,
    Turn,
    measured_seconds,
    measurements,
    overrides_of,
    planned_seconds,
    ratios_of,
    settings,
)
from planner_bytes import ACTIVATIONS, KeptByAutograd, planned_bytes
from results import check_result, make_result

from asa_dist.config import load_config
from asa_dist.plan.rehearsal import DEPTHS
from asa_dist.plan.shape import count_parameters

MEASURED = {"compute": 0.5, "collectives": 0.3, "publish": 0.1, "waiting": 0.1, "step": 1.0}


def turn(step: float, **planned: float) -> Turn:
    return Turn(MEASURED | {"step": step} | planned, MEASURED, {"cores": 2.0})


@pytest.mark.parametrize(("step", "is_met"), [
    (1.0, True), (1 + TARGET_STEP, True), (1 - TARGET_STEP, True), (1.26, False), (0.74, False)])  # fmt: skip
def test_the_promise_has_two_sides(step: float, is_met: bool) -> None:
    [ratio] = ratios_of({"some": [turn(step, compute=step - 0.5)]}, {})
    assert ratio.is_met is is_met and ratio.value == pytest.approx(abs(step - 1), abs=1e-3)
    assert bool(ratio.why) is not is_met


def test_errors_on_both_sides_are_of_their_median_not_a_mean_of_errors() -> None:
    [ratio] = ratios_of({"some": [turn(0.8), turn(1.02), turn(1.2)]}, {})
    assert (ratio.value, ratio.lowest, ratio.highest) == (0.02, 0.02, 0.2)


def test_the_part_that_is_furthest_off_is_named_first() -> None:
    [ratio] = ratios_of({"some": [turn(2.0, compute=0.6, waiting=1.0)]}, {})
    assert ratio.why.startswith("planned (measured) seconds: step 2.000 (1.000), waiting 1.000 (0.100), compute")


@pytest.mark.parametrize(("planned", "is_met"), [(110.0, True), (90.0, True), (111.0, False), (89.0, False)])
def test_bytes_are_those_of_the_worst_part(planned: float, is_met: bool) -> None:
    held = Bytes({"weights": 100.0, "gradients": planned, "nothing": 0.0}, {"weights": 100, "gradients": 100,
                                                                          "nothing": 0})  # fmt: skip
    [ratio] = ratios_of({}, {"some": held})
    assert ratio.is_met is is_met and ratio.target == TARGET_BYTES
    assert ratio.why.startswith("gradients: planned") is not is_met


def test_parts_of_a_plan_and_of_a_run_have_the_same_names() -> None:
    seconds = {"compute": 1.0, "optimizer": 0.5, "exposed_collectives": 0.25, "publish": 0.1, "waiting": 0.2,
               "step": 2.0}
    planned = planned_seconds({"chosen": {"seconds": seconds}})
    rows = [{f"time/{part}_seconds": value for part, value in {
        "compute": compute, "data": 0.5, "collective": 0.25, "publish": 0.1, "wait_rollout": 0.2, "step": 2.0}.items()}
        for compute in (0.5, 1.5)]  # fmt: skip
    assert planned == measured_seconds(rows) and list(planned) == list(PARTS)


def test_a_result_is_of_the_schema() -> None:
    turns, held = {"some": [turn(1.1)]}, {"some": Bytes({"weights": 1.0}, {"weights": 1})}
    check_result(make_result("planner", "short", ratios_of(turns, held), settings(SIZES["short"]),
                             measurements(turns, held)))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_asked_for_what_it_has_not_rehearsed(case: str, size: Size) -> None:
    config = load_config(CONFIG, overrides_of(case, size))
    assert config.model.architecture.num_layers > max(DEPTHS)


def test_the_cases_differ() -> None:
    configs = [load_config(CONFIG, overrides_of(case, SIZES["full"])) for case in CASES]
    for choose in (lambda config: config.train.zero_stage, lambda config: config.num_ranks,
                   lambda config: config.rollout.max_policy_age, lambda config: config.data.sequence_length):
        assert len({choose(config) for config in configs}) > 1
    assert len({config.model.architecture.hidden_size for config in configs}) == len(configs)


def test_planned_parts_are_those_of_a_rank() -> None:
    config = load_config(CONFIG, overrides_of("quickstart", SIZES["full"]))
    planned = planned_bytes(config)
    assert planned["weights"] == pytest.approx(4 * sum(count_parameters(config).values()) / 2)
    assert planned[ACTIVATIONS] > planned["weights"]


def test_what_autograd_keeps_is_counted_once_and_without_parameters() -> None:
    module = torch.nn.Linear(3, 5, bias=False)
    with KeptByAutograd(module) as kept:
        for rows in (7, 2):  # the most of all forwards
            output = module(torch.ones(rows, 3))
            (output.exp() * output.detach()).sum().backward()
    # the linear keeps its input, the exponential its result, the product its other factor
    assert kept.most_bytes == 4 * (7 * 3 + 2 * 7 * 5)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_real_rank_holds_what_was_planned(tmp_path: Path) -> None:
    from planner_bytes import measure_bytes

    overrides = [*overrides_of("quickstart", SIZES["smoke"]), "train.zero_stage=2"]
    held = Bytes(*measure_bytes(CONFIG, overrides))
    assert max(map(abs, held.errors.values())) < TARGET_BYTES, held.errors

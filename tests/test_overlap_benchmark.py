"""benchmarks/overlap.py without its minutes: what is alone, when it keeps its promise, and what it learns from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from live_run import RUN_VARIABLE, VisibleRun
from overlap import SIZES, TARGET_RATIO, measurements, parse_arguments, ratios_of, settings
from overlap_blocks import (
    TRAINER_CORE,
    WORKER_CORE,
    Block,
    balanced_rows,
    core_seconds,
    pin,
    train_and_rollout_seconds,
)
from overlap_learning import SYNCHRONOUS, VARIANTS, Curve, seconds_by_step
from overlap_learning import ratios_of as ratios_of_learning
from overlap_picture import draw
from results import check_result, make_result


def block(age: int, wall_seconds: float, wait_seconds: float) -> Block:
    return Block(age, 10, wall_seconds, wait_seconds, 0.001, float(age),
                 {"rank 0": wall_seconds - wait_seconds, "worker": 0.4, "others": 0.01})


SYNCHRONOUS_BLOCK = block(0, 0.9, 0.4)  # trains for 0.5 s


def test_alone_is_what_the_other_waits_for() -> None:
    assert train_and_rollout_seconds(SYNCHRONOUS_BLOCK) == pytest.approx((0.5, 0.4))
    assert train_and_rollout_seconds(replace(SYNCHRONOUS_BLOCK, train_alone_seconds=0.45)) == (0.45, 0.4)


@pytest.mark.parametrize(("seconds", "is_met"), [(0.5 * TARGET_RATIO, True), (0.5 * TARGET_RATIO + 0.001, False)])
def test_the_promise_is_of_age_1(seconds: float, is_met: bool) -> None:
    rounds = [{0: SYNCHRONOUS_BLOCK, 1: block(1, seconds, 0.02), 8: block(8, 0.9, 0.4)}]
    of_name = {ratio.name: ratio for ratio in ratios_of(rounds)}
    assert of_name["age 1"].is_met is is_met
    assert bool(of_name["age 1"].why) is not is_met, "what is missed has a reason"
    assert of_name["age 8"].why == "mean age 8.00"
    assert of_name["age 8"].is_met is None and of_name["age 0"].is_met is None


def test_every_round_is_measured_against_itself() -> None:
    slower = {age: replace(one, wall_seconds=3 * one.wall_seconds, wait_seconds=3 * one.wait_seconds)
              for age, one in {0: SYNCHRONOUS_BLOCK, 1: block(1, 0.6, 0.1)}.items()}
    rounds = [{0: SYNCHRONOUS_BLOCK, 1: block(1, 0.5, 0.0)}, slower, {0: SYNCHRONOUS_BLOCK, 1: block(1, 0.55, 0.0)}]
    ratio = {ratio.name: ratio for ratio in ratios_of(rounds)}
    assert (ratio["age 1"].lowest, ratio["age 1"].value, ratio["age 1"].highest) == (1.0, 1.1, 1.2)
    assert ratio["age 1, against taking turns"].value == pytest.approx(0.55 / 0.9, abs=0.001)
    assert ratio["age 1, against taking turns"].limit == pytest.approx(0.5 / 0.9, abs=0.001)


def test_an_unbalanced_load_promises_nothing_of_overlap() -> None:
    lopsided = {0: block(0, 1.1, 0.1), 1: block(1, 1.0, 0.0)}
    balance = next(ratio for ratio in ratios_of([lopsided]) if ratio.name == "balance")
    assert balance.is_met is False and "choose --rows" in balance.why


def test_a_result_is_of_the_schema() -> None:
    rounds = [{0: SYNCHRONOUS_BLOCK, 1: block(1, 0.6, 0.1)}]
    check_result(make_result("overlap", "short", ratios_of(rounds), settings(SIZES["short"], 4, []),
                             measurements(rounds, {4: (0.5, 0.4)})))


@pytest.mark.parametrize(("tried", "rows"), [
    ({4: (0.5, 0.4)}, 3),
    ({4: (0.5, 0.7), 8: (0.9, 0.7)}, 6),  # a step costs 0.1 s without any row
    ({4: (0.5, 0.4), 3: (0.6, 0.4)}, 2),  # disturbed: fewer rows took longer
    ({1: (0.9, 0.1)}, 1),
])  # fmt: skip
def test_calibration_goes_where_both_take_as_long(tried: dict[int, tuple[float, float]], rows: int) -> None:
    assert balanced_rows(tried) == rows


@pytest.mark.parametrize("arguments", [["--learning", "--short"], ["--learning", "--rows", "4"], ["--work", "x"]])
def test_arguments_that_contradict_each_other(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)


@pytest.mark.skipif(not {TRAINER_CORE, WORKER_CORE} <= os.sched_getaffinity(0), reason="needs cores 0 and 1")
def test_each_process_stays_on_its_core_and_is_counted(tmp_path: Path) -> None:
    run = VisibleRun(tmp_path)
    spin = "import time\nwhile True: time.process_time()"
    environment = {**os.environ, RUN_VARIABLE: run.mark, "RANK": "0"}
    started = [subprocess.Popen([sys.executable, "-c", spin, word], env=environment)
               for word in ("asa_dist.train", "gcs")]
    try:
        while len(run.processes()) < len(started):  # environments are there once they run
            time.sleep(0.01)
        processes = pin(run)
        assert {kind: [process.pid for process in of_kind] for kind, of_kind in processes.items()} == {
            "rank 0": [started[0].pid], "others": [started[1].pid]}
        assert [os.sched_getaffinity(process.pid) for process in started] == [{TRAINER_CORE}, {WORKER_CORE}]
        everyone = [one for of_kind in processes.values() for one in of_kind]
        while min(core_seconds(everyone).values()) < 0.05:  # both compute
            time.sleep(0.01)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not core_seconds(everyone), "nobody can ask what has ended"


# --- learning -----------------------------------------------------------------------------------------------------
def test_variants_differ_by_age_and_weights_only(tmp_path: Path) -> None:
    assert [variant.name for variant in VARIANTS] == [
        "age 0", *(f"age {age}{weights}" for age in (1, 2, 4, 8) for weights in ("", ", no importance weights"))]
    folders = {variant.run(seed, (), tmp_path).folder for variant in VARIANTS for seed in (10, 11)}
    assert len(folders) == 2 * len(VARIANTS), "no two are kept in one place"


def test_seconds_are_of_training_alone() -> None:
    rows = [{"step": 0, "eval/perplexity": 9.0}, {"step": 1, "time/step_seconds": 2.0},
            {"step": 1, "time/checkpoint_seconds": 50.0}, {"step": 2, "time/step_seconds": 0.5}]
    assert seconds_by_step(rows) == {1: 2.0, 2: 2.5}


def curves() -> dict[str, dict[int, Curve]]:
    return {variant.name: {seed: Curve([100, 200], [10.0, 20.0 - variant.age], [0.3, 0.8 - 0.05 * variant.age])
                           for seed in (10, 11)} for variant in VARIANTS}


def test_learning_is_compared_with_age_0() -> None:
    of_name = {ratio.name: ratio for ratio in ratios_of_learning(curves())}
    assert of_name["age 4: truth at the end"].value == 0.75
    assert of_name["age 8, no importance weights: seconds of training"].value == 0.6
    assert not any(name.startswith(f"{SYNCHRONOUS.name}:") for name in of_name)
    assert all(ratio.is_met is None for ratio in of_name.values()), "nothing is promised"


def test_picture_has_every_variant(tmp_path: Path) -> None:
    measured = {name: {str(seed): asdict(curve) for seed, curve in of_variant.items()}
                for name, of_variant in curves().items()}
    draw({"measurements": measured}, tmp_path / "learning.svg")
    text = (tmp_path / "learning.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert all(f"<!-- {variant.name} -->" in text for variant in VARIANTS)

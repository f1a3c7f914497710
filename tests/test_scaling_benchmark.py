"""benchmarks/scaling.py without its minutes: what efficiency means, machine files, the simulator, and what ranks do."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scaling
import scaling_simulator
from live_run import Progress
from results import make_result, ratios_of, read_result, write_result
from scaling import (
    CONFIG,
    LOADS,
    OVERRIDES,
    SMOKE_LOADS,
    efficiency,
    machines_of,
    measured_ratios,
    merged,
    parse_arguments,
    simulate_all,
    simulated_ratios,
)
from scaling_case import ONE_RANK, Load, loads_of
from scaling_machine import as_file, read_machine
from scaling_picture import draw
from scaling_simulator import (
    at_age,
    best_placement,
    calibrated,
    divisions,
    placements,
    predicted_seconds,
    predicted_step,
    simulate,
)
from step_case import EOS
from step_variants import corpus_rows, rollout_rows

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.plan.machine import ASSUMED, MACHINES, Machine
from asa_dist.plan.planning import changed, fits
from asa_dist.plan.step_time import step_time

A100 = MACHINES["A100x8"]
HERE = Machine("this", 2, False, {"float32": 1e11}, 8e9, 3e10, 1e9, 1e9, 3e10, 16e9, "made up",
               ASSUMED | {"overlap": 0.0, "training_efficiency": 1.0, "hop_seconds": 1e-4}, {"op_seconds": 1e-6})


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(CONFIG, OVERRIDES)


# --- measured -----------------------------------------------------------------------------------------------------
def test_loads_keep_rows_per_rank_or_in_total() -> None:
    assert list(LOADS) == ["1 rank", "weak, 2 ranks", "strong, 2 ranks", "weak, 4 ranks", "strong, 4 ranks"]
    for name, load in LOADS.items():
        assert load.row_pairs == 4 if name.startswith("weak") else load.all_pairs == 4, name
        train, rollout = load.config.train, load.config.rollout
        assert (train.ranks, train.zero_stage, train.zero_persistence_threshold) == (load.num_ranks, 3, 0)
        assert train.corpus_rows_per_step == rollout.prompts_per_step == load.all_pairs
    with pytest.raises(ValueError, match="3 pairs of rows cannot be shared"):
        loads_of(Load(1, 3), (1, 2))


@pytest.mark.parametrize(("name", "seconds", "wanted"), [
    ("weak, 2 ranks", 1.0, 1.0), ("weak, 2 ranks", 1.25, 0.8), ("strong, 2 ranks", 0.5, 1.0),
    ("strong, 2 ranks", 1.0, 0.5), ("weak, 4 ranks", 2.0, 1.0), ("strong, 4 ranks", 0.5, 1.0),
    ("strong, 4 ranks", 0.625, 0.8),
])  # fmt: skip
def test_efficiency_is_of_the_cores_that_ranks_have(name: str, seconds: float, wanted: float) -> None:
    """One rank takes a second; there are two cores."""
    assert efficiency(LOADS[name], LOADS[ONE_RANK], seconds, 1.0, cores=2) == pytest.approx(wanted)


def test_four_ranks_on_four_cores_are_not_excused() -> None:
    assert efficiency(LOADS["weak, 4 ranks"], LOADS[ONE_RANK], 2.0, 1.0, cores=4) == 0.5


def made_up_rounds(seconds: dict[str, list[float]], predicted: float = 1.0) -> list[dict[str, Any]]:
    """A round for every number; a load that is not named takes one second."""
    def turn(each: float) -> dict[str, float]:
        return {"seconds": each, "cpu_seconds": 0.5 * each, "collective_seconds": 0.25 * each,
                "matmul_flops_per_second": 9e10}

    parts = {"compute": 0.75 * predicted, "optimizer": 0.0, "collectives": 0.25 * predicted}
    [number] = {len(values) for values in seconds.values()}
    return [{"calibration": {}, "predicted_seconds": dict.fromkeys(LOADS, parts),
             "turns": {name: [turn(seconds.get(name, [1.0] * number)[index])] * 3 for name in LOADS}}
            for index in range(number)]


def test_figures_of_rounds() -> None:
    rounds = made_up_rounds({"weak, 2 ranks": [1.0, 1.25, 2.0], ONE_RANK: [1.0, 1.0, 1.0]}, predicted=1.5)
    of_name = {ratio.name: ratio for ratio in measured_ratios(LOADS, rounds, cores=2)}
    assert len(of_name) == 4 + 5 + 4 and all(ratio.is_met is None for ratio in of_name.values())
    weak, error = of_name["efficiency, weak, 2 ranks"], of_name["error of the simulator, weak, 2 ranks"]
    assert (weak.lowest, weak.value, weak.highest, weak.limit) == (0.5, 0.8, 1.0, 1.0)
    assert "1 rank 1000, 500, 250; weak, 2 ranks 1250, 625, 312" in weak.why and weak.why.endswith("once: 1.00")
    assert (error.lowest, error.value, error.highest) == (0.2, 0.2, 0.5)
    assert error.why == "predicted 1500 ms, of it collectives 375; measured 1250"
    assert of_name["efficiency, weak, 4 ranks"].baseline == f"{weak.baseline}, which 4 ranks share"


def test_a_prediction_that_is_too_short_is_an_error_too() -> None:
    """One rank, predicted to compute for 0.525 s, took 1 s: so slow is every rank, but no collective."""
    ratios = measured_ratios(LOADS, made_up_rounds({ONE_RANK: [1.0]}, predicted=0.7), cores=2)
    by_name = {ratio.name: ratio.value for ratio in ratios}
    assert by_name["error of the simulator, strong, 4 ranks"] == pytest.approx(0.3)
    assert by_name["error of the simulator from 1 rank's step, strong, 4 ranks"] == pytest.approx(0.175)


def test_the_slowest_rank_counts() -> None:
    ranks = [{"seconds": 1.0, "collective_seconds": 0.6}, {"seconds": 3.0, "collective_seconds": 0.2}]
    assert merged(ranks) == {"seconds": 3.0, "collective_seconds": pytest.approx(0.4)}


def test_rank_counts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def measure(loads: dict[str, Load], turns: int) -> dict[str, list[dict[str, float]]]:
        [num_ranks] = {load.num_ranks for load in loads.values()}
        order.append(num_ranks)
        return {name: [{"seconds": 1.0}] * turns for name in loads}

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "calibrated", lambda config: HERE)
    rounds = scaling.measure_rounds(LOADS, 3, 2, 2, Progress())
    assert order == [1, 2, 4, 2, 4, 1, 4, 1, 2]
    assert [list(of_round["turns"]) for of_round in rounds] == [list(LOADS)] * 3


# --- predicted ----------------------------------------------------------------------------------------------------
def test_one_rank_has_no_network() -> None:
    """What is predicted is computing alone, however slow the network."""
    slow = replace(HERE, link_bytes_per_second=1.0, network_bytes_per_second=1.0)
    found = predicted_seconds(LOADS[ONE_RANK], slow, cores=2)
    time = step_time(LOADS[ONE_RANK].config, HERE)
    assert found == {"compute": time.compute, "optimizer": time.optimizer, "collectives": 0.0}
    assert predicted_step(found, found, None) == time.compute + time.optimizer
    assert predicted_step(found, found, 0.25) == pytest.approx(0.25)
    assert predicted_seconds(LOADS["weak, 2 ranks"], slow, cores=2)["collectives"] > 1e6


def test_ranks_beyond_the_cores_take_turns() -> None:
    weak = LOADS["weak, 4 ranks"]
    crowded, free = (predicted_seconds(weak, HERE, cores) for cores in (2, 4))
    assert crowded["compute"] == 2 * free["compute"] and crowded["collectives"] == free["collectives"]
    assert free["compute"] == predicted_seconds(LOADS[ONE_RANK], HERE, cores=2)["compute"]


def test_a_rehearsal_of_other_ranks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = HERE.measured | {"layer_compute_seconds": 9.0, "other_compute_seconds": 9.0}
    monkeypatch.setattr(scaling_simulator, "this_machine", lambda config: replace(HERE, measured=rehearsed))
    assert calibrated(LOADS["weak, 2 ranks"].config) == HERE


# --- simulated ----------------------------------------------------------------------------------------------------
def test_divisions() -> None:
    assert list(divisions(1, 3)) == [(0, 1), (0, 2), (0, 3)]
    assert list(divisions(8, 2)) == [(0, 1), (0, 2), (1, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize("num_nodes", [1, 2, 16])
def test_every_gpu_works_and_every_rank_has_the_same_load(config: Config, num_nodes: int) -> None:
    found = list(placements(config, A100, num_nodes))
    assert len({(placed.layout.num_rollout_nodes, placed.work.num_ranks) for placed in found}) == len(found) > 6
    for placed in found:
        work = placed.work
        assert work.num_ranks + work.num_workers == 8 * num_nodes
        assert (work.corpus_rows, work.micro_batches) == (4, 8)
        assert placed.config.rollout.prompts_per_step == 8 * work.num_ranks
        assert placed.config.train.corpus_rows_per_step == 32 * work.num_ranks


@pytest.mark.parametrize("age", [0, 1])
def test_the_best_division_is_chosen(config: Config, age: int) -> None:
    """With little to generate few GPUs do; ten times as much wants more."""
    few = at_age(config, age)
    many = changed(few, {"rollout.responses_per_prompt": 80})
    best = [best_placement(wanted, A100, 4) for wanted in (few, many)]
    assert best[0].work.num_workers < best[1].work.num_workers
    for wanted, chosen in zip((few, many), best, strict=True):
        others = [other for other in placements(wanted, A100, 4) if fits(other, A100)]
        assert chosen.tokens_per_second == max(other.tokens_per_second for other in others)
        assert chosen.time.take_turns is (age == 0)


def test_without_a_network_nothing_is_lost(config: Config) -> None:
    """No latency, no bytes that take time: a step is computing and what a rank does to its shard, at every size."""
    endless = dict.fromkeys(("link_bytes_per_second", "network_bytes_per_second", "host_link_bytes_per_second",
                             "memory_bytes_per_second"), 1e30)
    ideal = replace(A100, **endless, assumptions=A100.assumptions | {"hop_seconds": 0.0})
    rows = simulate(at_age(config, 1), ideal, (1, 2, 16))
    for row in rows:
        assert row["seconds"]["step"] == pytest.approx(row["seconds"]["compute"], rel=1e-9)
        assert row["efficiency"] == pytest.approx(1.0)
    assert [row["gpus"] for row in rows] == [8, 16, 128]
    assert rows[2]["tokens_per_second"] == pytest.approx(16 * rows[0]["tokens_per_second"])


def test_latency_costs_more_the_more_ranks_there_are(config: Config) -> None:
    late = replace(A100, assumptions=A100.assumptions | {"hop_seconds": 1e-4, "overlap": 0.0})
    rows = simulate(at_age(config, 1), late, (1, 2, 8, 64))
    efficiencies = [row["efficiency"] for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] < 0.5 < efficiencies[1] < 1


def test_few_ranks_on_two_nodes_talk_over_the_network(config: Config) -> None:
    """Four on each are no more than one node's GPUs."""
    slow = replace(A100, network_bytes_per_second=1e6)
    [four_each] = [placed for placed in placements(config, slow, 2)
                   if placed.layout.ranks_per_node == 4 and not placed.layout.num_rollout_nodes]
    assert four_each.work.num_ranks == 8 and four_each.time.exposed_collectives > 1000


def test_what_cannot_be_simulated_says_so(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"2 x A100x8: this config fits in no way"):
        best_placement(config, replace(A100, device_bytes=1e9), 2)
    half = replace(A100, peak_flops={"bfloat16": 312e12})
    elsewhere = config.data.tokenizer.model_copy(update={"path": "somewhere", "train": None})
    for settings, problem in (
        ({"rollout.placement": "shared", "rollout.max_policy_age": 0}, "must be separate"),
        ({"model.name_or_path": "somewhere", "data.tokenizer": elsewhere}, "made from the config alone"),
        ({"model.dtype": "float32"}, "A100x8 has peak_flops of no such dtype"),
    ):
        with pytest.raises(ConfigError, match=problem):
            best_placement(changed(config, settings), half, 1)


# --- machine files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_a_machine_reads_back_from_its_file(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(as_file(machine), encoding="utf-8")
    assert asdict(read_machine(path)) == asdict(machine)


def test_a_file_may_hold_what_differs(tmp_path: Path) -> None:
    (tmp_path / "known.yaml").write_text(as_file(A100), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        "base: known.yaml\nname: mine\nnetwork_bytes_per_second: 1e9\nassumptions: {overlap: 0}\n", encoding="utf-8")
    mine = read_machine(tmp_path / "mine.yaml")
    assert (mine.name, mine.network_bytes_per_second, mine.peak_flops) == ("mine", 1e9, A100.peak_flops)
    assert mine.assumptions == A100.assumptions | {"overlap": 0}


@pytest.mark.parametrize(("named", "overlap"), [("", ASSUMED["overlap"]), ("assumptions: {overlap: 0}\n", 0)])
def test_what_a_file_does_not_assume_is_assumed_for_it(named: str, overlap: float, tmp_path: Path) -> None:
    text = as_file(A100)
    path = tmp_path / "machine.yaml"
    path.write_text(text[:text.index("assumptions:")] + named, encoding="utf-8")
    assert read_machine(path).assumptions == ASSUMED | {"overlap": overlap}


def test_machines_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(as_file(A100).replace("name: A100x8", "name: mine"), encoding="utf-8")
    assert [machine.name for machine in machines_of([path])] == [*MACHINES, "mine"]
    path.write_text(as_file(A100), encoding="utf-8")
    with pytest.raises(ConfigError, match="'A100x8' is taken"):
        machines_of([path])


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("num_devices: 8\n", "", r"missing: num_devices$"),
    ("num_devices:", "devices: 8\nnum_devices:", "unknown: devices; known: name, num_devices"),
    ("num_devices: 8", "num_devices: 8.5", "num_devices = 8.5: must be a whole number"),
    ("num_devices: 8", "num_devices: 0", "num_devices = 0: must be finite and positive"),
    ("num_devices: 8", "num_devices: true", "num_devices = True: must be a number"),
    ("num_devices: 8", "num_devices: .inf", "num_devices = inf: must be finite"),
    ("hop_seconds:", "hop_seconds: -1 #", "assumptions.hop_seconds = -1: must be finite and not negative"),
    ("overlap:", "overlap: 1.5 #", "assumptions.overlap = 1.5: is a share"),
    ("overlap:", "overlaps: 0.5 #", "assumptions: unknown: overlaps"),
    ("  bfloat16:", "  float8:", "peak_flops: unknown: float8; known: float32, bfloat16"),
    ("name: A100x8", "name: 7", "name = 7: must be a text"),
    ("name: A100x8", "- a", "not valid YAML"),
])  # fmt: skip
def test_a_wrong_machine_file_says_what_is_wrong(old: str, new: str, problem: str, tmp_path: Path) -> None:
    text = as_file(A100)
    assert text.count(old) == 1
    path = tmp_path / "machine.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        read_machine(path)
    assert str(path) in str(caught.value)


# --- the whole ----------------------------------------------------------------------------------------------------
def test_result_and_picture(config: Config, tmp_path: Path) -> None:
    simulated = simulate_all(config, [A100], (1, 2), Progress())
    rounds = made_up_rounds({ONE_RANK: [1.0, 1.1]})
    ratios = measured_ratios(LOADS, rounds, 2) + simulated_ratios(simulated)
    settings = {"cores": 2, "config": CONFIG.name, "loads": {name: asdict(load) for name, load in LOADS.items()}}
    result = make_result("scaling", "full", ratios, settings, {"rounds": rounds, "simulated": simulated})
    assert write_result(result, tmp_path / "scaling.json") == 0
    assert [ratio.name for ratio in ratios_of(result)][-1] == "simulated efficiency, A100x8, policy age 1, 16 GPUs"
    draw(read_result(tmp_path / "scaling.json"), tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").count("<path") > 20


def test_sizes() -> None:
    assert [parse_arguments(words).size for words in ([], ["--short"], ["--smoke"])] == ["full", "short", "smoke"]
    assert parse_arguments(["--machine", "a", "--machine", "b"]).machine == [Path("a"), Path("b")]


@pytest.mark.parametrize("load", [*LOADS.values(), *SMOKE_LOADS.values()])
def test_work_is_that_of_the_rows(load: Load) -> None:
    """The model's load is the measured one."""
    from asa_dist.plan.shape import trunk_of, work_of

    rng, work = np.random.default_rng(0), work_of(load.config)
    corpus, rollouts = corpus_rows(load.case, rng), rollout_rows(load.case, rng)
    assert corpus.target_RT.numel() + rollouts.target_RT.numel() == work.tokens
    assert rollouts.target_RT.shape == (work.rollout_rows, work.row_tokens)
    assert trunk_of(load.config).hidden_size == load.hidden_size and rollouts.target_RT.max() > EOS


@pytest.mark.distributed
def test_ranks_train_and_say_where_time_goes() -> None:
    """Two engines of one process take turns; each counts what blocks its own steps."""
    found = scaling.measure({name: load for name, load in SMOKE_LOADS.items() if load.num_ranks == 2}, turns=2)
    assert {name: len(turns) for name, turns in found.items()} == {"weak, 2 ranks": 2, "strong, 2 ranks": 2}
    for turn in (turn for turns in found.values() for turn in turns):
        assert 0 < turn["collective_seconds"] < turn["seconds"]
        assert turn["cpu_seconds"] > 0 and turn["matmul_flops_per_second"] > 1e6

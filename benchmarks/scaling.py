"""How does training scale? Measured on this machine's cores; simulated, by the model of `asa plan`, to 1,024 GPUs.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json
    python benchmarks/scaling.py --simulate --config configs/asa-3b.yaml --machine mine.yaml

Measured: the fused step of `step.py` (four-layer Llama, 4.2 M parameters, float32, ZeRO-3 over gloo, one thread a rank)
on 1, 2 and 4 ranks; no loop around it, nothing generated, nothing published. Weak: as many rows on every rank. Strong:
as many rows on all ranks together. Efficiency is the speed-up in rows per second over one rank, divided by the cores
that the ranks have: where there are fewer cores than ranks, these take turns, and 1.0 is what the cores could do. Rank
counts take turns, in rounds of fresh processes; a figure is of the medians of rounds. `collective_seconds` are those
that a rank is blocked in collectives: communication and waiting for slower ranks.

Simulated: `scaling_simulator.py` divides 1 to 128 nodes between training and generating, at policy ages 0 and 1.
Arithmetic on data-sheet figures and stated assumptions; nobody measured it on a GPU. Of a machine of your own:
`scaling_machine.py`. Its error is that of the same formulas for the ranks measured here: from bare matrix products,
memory and gloo, as `asa plan` measures them; and from one rank's measured step, which leaves what is due to scaling.

One JSON line on stdout. Promises nothing. The limit of a measured efficiency is 1, as far as rows go: a rank's share of
the optimizer shrinks with more ranks, which can lift the weak one a little above. With --short two rounds; with --smoke
one, tiny, 1 and 2 ranks, 8 and 16 GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from live_run import ROOT, Progress
from local_ranks import run_on_ranks
from results import Ratio, add_sizes, make_result, write_result
from scaling_case import ONE_RANK, Load, loads_of
from scaling_machine import read_machine
from scaling_simulator import at_age, calibrated, predicted_seconds, predicted_step, simulate
from step_case import SEED

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.plan.machine import MACHINES, Machine

CONFIG = ROOT / "configs/asa-7b.yaml"
OVERRIDES = ["rollout.engine=vllm"]
AGES = (0, 1)
LOADS = loads_of(Load(num_ranks=1, row_pairs=4), (1, 2, 4))
SMOKE_LOADS = loads_of(Load(1, 2, row_tokens=64, vocab_size=512, hidden_size=64, num_layers=2), (1, 2))
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
SMOKE_NODE_COUNTS = (1, 2)
ROUNDS = {"full": 5, "short": 2, "smoke": 1}
TURNS = {"full": 7, "short": 5, "smoke": 2}
GROUP_SECONDS = 600.0
Turns = Sequence[Mapping[str, float]]
Round = Mapping[str, Turns]  # by load


# --- measuring --------------------------------------------------------------------------------------------------
def measure(loads: Mapping[str, Load], turns: int) -> dict[str, list[dict[str, float]]]:
    """Turns of loads of as many ranks, in fresh processes; ``run_on_ranks`` says what it raises."""
    [num_ranks] = {load.num_ranks for load in loads.values()}
    of_ranks = run_on_ranks(num_ranks, "scaling_ranks", (loads, turns), GROUP_SECONDS)
    return {load: [merged(turn) for turn in zip(*(rank[load] for rank in of_ranks), strict=True)] for load in loads}


def merged(of_ranks: Turns) -> dict[str, float]:
    """One turn: the slowest rank's seconds; of all else the ranks' mean."""
    means = {key: statistics.fmean(turn[key] for turn in of_ranks) for key in of_ranks[0]}
    return means | {"seconds": max(turn["seconds"] for turn in of_ranks)}


def measure_rounds(loads: Mapping[str, Load], rounds: int, turns: int, cores: int,
                   progress: Progress) -> list[dict[str, Any]]:
    """Of each: the calibration, what it predicts, and all loads' turns."""
    counts = sorted({load.num_ranks for load in loads.values()})
    found: list[dict[str, Any]] = []
    for number in range(rounds):
        eta = f"; about {progress.seconds / number * (rounds - number) / 60:.1f} minutes left" if number else ""
        progress.say(f"round {number + 1} of {rounds}: calibration, then {counts} ranks in turns{eta}")
        machine = calibrated(next(load.config for load in loads.values() if load.num_ranks > 1))
        measured: dict[str, list[dict[str, float]]] = {}
        for num_ranks in counts[number % len(counts):] + counts[:number % len(counts)]:
            measured |= measure({name: load for name, load in loads.items() if load.num_ranks == num_ranks}, turns)
        found.append({
            "calibration": dict(machine.measured), "turns": {name: measured[name] for name in loads},
            "predicted_seconds": {name: predicted_seconds(load, machine, cores) for name, load in loads.items()}})
    return found


# --- figures of what was measured -------------------------------------------------------------------------------
def median_of(turns: Turns, key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def speed_up(load: Load, one: Load, seconds: float, seconds_of_one: float) -> float:
    """In rows per second."""
    return load.all_pairs / one.all_pairs * seconds_of_one / seconds


def efficiency(load: Load, one: Load, seconds: float, seconds_of_one: float, cores: int) -> float:
    return speed_up(load, one, seconds, seconds_of_one) / min(load.num_ranks, cores)


def efficiency_ratio(name: str, loads: Mapping[str, Load], rounds: Sequence[Round], cores: int) -> Ratio:
    one, load = loads[ONE_RANK], loads[name]
    seconds = [median_of(of_round[name], "seconds") for of_round in rounds]
    of_one = [median_of(of_round[ONE_RANK], "seconds") for of_round in rounds]
    each = [efficiency(load, one, *pair, cores) for pair in zip(seconds, of_one, strict=True)]
    value = efficiency(load, one, statistics.median(seconds), statistics.median(of_one), cores)
    shared = f", which {load.num_ranks} ranks share" if load.num_ranks > cores else ""
    baseline = f"1 rank's rows per second x {min(load.num_ranks, cores)} cores{shared}"
    return Ratio(f"efficiency, {name}", round(value, 3), baseline, "higher",
                 round(min(each), 3), round(max(each), 3), limit=1.0, why=where_time_goes(name, load, rounds, cores))


def where_time_goes(name: str, load: Load, rounds: Sequence[Round], cores: int) -> str:
    def of_all(which: str, key: str) -> float:
        return statistics.median(turn[key] for of_round in rounds for turn in of_round[which])

    spent = [f"{which} {1000 * of_all(which, 'seconds'):.0f}, {1000 * of_all(which, 'cpu_seconds'):.0f}, "
             f"{1000 * of_all(which, 'collective_seconds'):.0f}" for which in (ONE_RANK, name)]
    rate = of_all(name, "matmul_flops_per_second") / of_all(ONE_RANK, "matmul_flops_per_second")
    alone = rate * load.num_ranks / min(load.num_ranks, cores)
    return (f"ms per step, on the CPU, blocked in collectives: {'; '.join(spent)}; efficiency of bare matrix products, "
            f"all ranks at once: {alone:.2f}")


def error_ratio(name: str, rounds: Sequence[Mapping[str, Any]], is_from_one: bool = False) -> Ratio:
    """Of the predicted step, whichever way it is wrong; ``why`` says which.

    Args:
        is_from_one: a rank is as fast as the one that trained alone in the same round, so that what is left is scaling.
    """
    real = [median_of(of_round["turns"][name], "seconds") for of_round in rounds]
    alone = [median_of(of_round["turns"][ONE_RANK], "seconds") if is_from_one else None for of_round in rounds]
    parts = [of_round["predicted_seconds"] for of_round in rounds]
    guess = [predicted_step(each[name], each[ONE_RANK], seconds) for each, seconds in zip(parts, alone, strict=True)]
    each_error = [abs(ours / theirs - 1) for ours, theirs in zip(guess, real, strict=True)]
    quotient = statistics.median(guess) / statistics.median(real)
    sent = statistics.median(each[name]["collectives"] for each in parts)
    from_one = " from 1 rank's step" if is_from_one else ""
    return Ratio(f"error of the simulator{from_one}, {name}", round(abs(quotient - 1), 3), "measured step", "lower",
                 round(min(each_error), 3), round(max(each_error), 3), limit=0.0,
                 why=f"predicted {1000 * statistics.median(guess):.0f} ms, of it collectives {1000 * sent:.0f}; "
                     f"measured {1000 * statistics.median(real):.0f}")


def measured_ratios(loads: Mapping[str, Load], rounds: Sequence[Mapping[str, Any]], cores: int) -> list[Ratio]:
    turns, more = [of_round["turns"] for of_round in rounds], [name for name in loads if name != ONE_RANK]
    return [*(efficiency_ratio(name, loads, turns, cores) for name in more),
            *(error_ratio(name, rounds) for name in loads),
            *(error_ratio(name, rounds, is_from_one=True) for name in more)]


# --- figures of what was simulated ------------------------------------------------------------------------------
def machines_of(paths: Sequence[Path]) -> list[Machine]:
    """Those that `asa plan` knows, and those of files.

    Raises:
        ConfigError: of ``read_machine``; a name that is taken.
    """
    machines = dict(MACHINES)
    for path in paths:
        machine = read_machine(path)
        if machine.name in machines:
            raise ConfigError(f"{path}: name = {machine.name!r} is taken by another machine; choose a new one")
        machines[machine.name] = machine
    return list(machines.values())


def simulate_all(config: Config, machines: Sequence[Machine], node_counts: Sequence[int],
                 progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """By "MACHINE, policy age A"."""
    found = {}
    for machine in machines:
        for age in AGES:
            name = f"{machine.name}, policy age {age}"
            found[name] = simulate(at_age(config, age), machine, node_counts)
            for row in found[name]:
                progress.say(f"{name}: {row['gpus']:5d} GPUs, {row['ranks']:4d} train: "
                             f"{row['tokens_per_second']:12,.0f} tokens/s, efficiency {row['efficiency']:.2f}")
    return found


def simulated_ratios(simulated: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Ratio]:
    """Of the largest number of GPUs; all others are in the measurements."""
    return [Ratio(f"simulated efficiency, {name}, {rows[-1]['gpus']} GPUs", round(rows[-1]["efficiency"], 3),
                  f"tokens per second and GPU of {rows[0]['gpus']} GPUs", "higher", why=_split(rows[0], rows[-1]))
            for name, rows in simulated.items()]


def _split(*rows: Mapping[str, Any]) -> str:
    parts = "compute", "exposed_collectives", "waiting", "step"
    said = [f"{row['gpus']} GPUs ({row['ranks']} train, {row['workers']} workers) "
            + ", ".join(f"{row['seconds'][part]:.2f}" for part in parts) for row in rows]
    return f"by formula; s of computing, exposed collectives, waiting for rollouts, step: {'; '.join(said)}"


# --- the program ------------------------------------------------------------------------------------------------
def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="measure nothing")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="to simulate; asa-7b")
    parser.add_argument("--machine", type=Path, action="append", default=[], metavar="FILE",
                        help="one more to simulate: scaling_machine.py")
    add_sizes(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options, cores = parse_arguments(), len(os.sched_getaffinity(0))
    if cores < 2 and not options.simulate:
        sys.exit("scaling: needs 2 cores, or --simulate")
    is_smoke = options.size == "smoke"
    loads = SMOKE_LOADS if is_smoke else LOADS
    progress = Progress()
    try:
        config = load_config(options.config, OVERRIDES)
        machines = machines_of(options.machine)
        simulated = simulate_all(config, machines, SMOKE_NODE_COUNTS if is_smoke else NODE_COUNTS, progress)
    except ConfigError as error:
        sys.exit(f"scaling: {error}")
    settings = {"seed": SEED, "cores": cores, "config": options.config.name, "overrides": OVERRIDES,
                "machines": {machine.name: asdict(machine) for machine in machines}}
    measurements: dict[str, Any] = {"simulated": simulated}
    ratios = simulated_ratios(simulated)
    if not options.simulate:
        rounds = measure_rounds(loads, ROUNDS[options.size], TURNS[options.size], cores, progress)
        settings["loads"] = {name: asdict(load) for name, load in loads.items()}
        measurements["rounds"] = rounds
        ratios = measured_ratios(loads, rounds, cores) + ratios
    return write_result(make_result("scaling", options.size, ratios, settings, measurements), options.out)


if __name__ == "__main__":
    sys.exit(main())

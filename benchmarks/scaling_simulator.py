"""What `scaling.py` expects of GPUs that are not here: the model of `asa plan`, from one node to 128. No torch.

Weak scaling: every rank has as many corpus rows and prompts as the config gives one of its own ranks. All GPUs train or
generate; of all ways to divide them, the one with most tokens per second counts, if it fits into memory. Divisions:
some GPUs of every node generate, or 1, 2, 4, … nodes do nothing else. More nodes can be divided more finely, by which
efficiency may pass 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from scaling_case import Load

from asa_dist.config import Config, ConfigError
from asa_dist.plan.calibration import this_machine
from asa_dist.plan.machine import Machine
from asa_dist.plan.planning import Placement, changed, fits, place
from asa_dist.plan.shape import trunk_of
from asa_dist.plan.step_time import step_time


# --- GPUs that are not here -------------------------------------------------------------------------------------
def best_placement(config: Config, machine: Machine, num_nodes: int) -> Placement:
    """
    Raises:
        ConfigError: no division of so many nodes is legal and fits.
    """
    found = [tried for tried in placements(config, machine, num_nodes) if fits(tried, machine)]
    if not found:
        raise ConfigError(f"{num_nodes} x {machine.name}: this config fits in no way; ask `asa plan` what would help")
    return max(found, key=lambda placement: placement.tokens_per_second)


def placements(config: Config, machine: Machine, num_nodes: int) -> Iterator[Placement]:
    """Every division that is legal.

    Raises:
        ConfigError: a config that cannot be simulated, or not on this machine.
    """
    _check(config, machine)
    devices, gpus = machine.num_devices, max(1, config.rollout.gpus_per_worker)
    for num_rollout_nodes, per_node in divisions(num_nodes, devices // gpus):
        num_ranks = (num_nodes - num_rollout_nodes) * (devices if num_rollout_nodes else devices - per_node * gpus)
        if num_ranks == 0:
            continue
        workers = per_node * (num_rollout_nodes or num_nodes)
        wanted = batch_of(config, num_ranks) | {"rollout__workers": workers, "rollout__gpus_per_worker": gpus}
        try:
            yield place(config, machine, num_nodes, num_rollout_nodes, **wanted)
        except ConfigError:
            continue


def _check(config: Config, machine: Machine) -> None:
    if config.method != "asa":
        raise ConfigError(f"method = {config.method!r}: only asa is simulated")
    if config.rollout.placement == "shared":
        raise ConfigError("rollout.placement = 'shared': nothing to divide; must be separate")
    if config.model.dtype not in machine.peak_flops:
        raise ConfigError(f"model.dtype = {config.model.dtype}: {machine.name} has peak_flops of no such dtype")
    trunk_of(config)


def divisions(num_nodes: int, workers_per_node: int) -> Iterator[tuple[int, int]]:
    """(nodes that only generate, workers on each node that generates)."""
    for per_node in range(1, workers_per_node + 1):
        yield 0, per_node
    num_rollout_nodes = 1
    while num_rollout_nodes < num_nodes:
        yield num_rollout_nodes, workers_per_node
        num_rollout_nodes *= 2


def batch_of(config: Config, num_ranks: int) -> dict[str, int]:
    """As much for every one of these ranks as for one of the config's."""
    rows, prompts = config.train.corpus_rows_per_step, config.rollout.prompts_per_step
    return {"train__corpus_rows_per_step": rows // config.num_ranks * num_ranks,
            "rollout__prompts_per_step": prompts // config.num_ranks * num_ranks}


def simulate(config: Config, machine: Machine, node_counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every number of nodes; efficiency is tokens per second and GPU, of the first row's.

    Raises:
        ConfigError: of ``best_placement``.
    """
    rows: list[dict[str, Any]] = []
    for num_nodes in node_counts:
        best = best_placement(config, machine, num_nodes)
        gpus = num_nodes * machine.num_devices
        per_gpu = best.tokens_per_second / gpus
        rows.append({
            "gpus": gpus, "ranks": best.layout.num_ranks, "workers": best.config.rollout.workers,
            "rollout_nodes": best.layout.num_rollout_nodes, "tokens_per_second": best.tokens_per_second,
            "tokens_per_second_and_gpu": per_gpu,
            "efficiency": per_gpu / rows[0]["tokens_per_second_and_gpu"] if rows else 1.0,
            "seconds": asdict(best.time) | {"step": best.time.step, "waiting": best.time.waiting},
        })
    return rows


def at_age(config: Config, max_policy_age: int) -> Config:
    return changed(config, {"rollout.max_policy_age": max_policy_age})


# --- the same model, of ranks that are here ---------------------------------------------------------------------
def calibrated(config: Config) -> Machine:
    """This machine by the figures that the formulas take. A rehearsal would be of so many ranks, and of no others."""
    machine = this_machine(changed(config, {"rollout.engine": "vllm"}))  # it is not rehearsed, which saves a minute
    figures = {name: value for name, value in machine.measured.items() if not name.startswith(("layer_", "other_"))}
    return replace(machine, measured=figures)


def predicted_seconds(load: Load, machine: Machine, cores: int) -> dict[str, float]:
    """Of one training step without publishing, which is not measured either, by part.

    The model gives every rank a core of its own. Ranks beyond the cores take turns on them, so that computing takes
    ranks / cores times as long; that is added here. Collectives are taken as they are.
    """
    time = step_time(load.config, machine)
    crowding = max(1.0, load.num_ranks / cores)
    return {"compute": crowding * time.compute, "optimizer": crowding * time.optimizer,
            "collectives": time.exposed_collectives}


def predicted_step(predicted: Mapping[str, float], of_one: Mapping[str, float], seconds_of_one: float | None) -> float:
    """
    Args:
        of_one: predicted of one rank.
        seconds_of_one: what that rank took, from which a rank's speed is taken; None: bare matrix products give it.
    """
    speed = 1.0 if seconds_of_one is None else seconds_of_one / (of_one["compute"] + of_one["optimizer"])
    return speed * (predicted["compute"] + predicted["optimizer"]) + predicted["collectives"]

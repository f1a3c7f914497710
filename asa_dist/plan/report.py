"""A plan for people, and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asa_dist.job_layout import who_is_where
from asa_dist.plan.machine import ASSUMED
from asa_dist.plan.planning import Placement, Plan, as_overrides, gib
from asa_dist.plan.step_time import DECODE_OPS_PER_LAYER, OPS_PER_LAYER, rollout_flops, training_flops


def as_text(plan: Plan) -> str:
    """Verdict first; what was measured or assumed last."""
    return "\n".join([*_verdict(plan), *_layout(plan), *_memory(plan), *_time(plan), *_basis(plan)])


def _verdict(plan: Plan) -> Iterator[str]:
    chosen = plan.chosen
    yield from plan.problems
    if plan.fits:
        of_rank, there = chosen.memory.device_bytes, plan.machine.device_bytes
        yield (f"fits: {gib(of_rank)} of {gib(there)} per rank; a step takes about {chosen.time.step:.2g} s, "
               f"{chosen.tokens_per_second:,.0f} tokens/s")  # fmt: skip
    if chosen.settings:
        yield f"on so many nodes with: {as_overrides(chosen.settings)}"
    if plan.better is not None:
        yield _faster(plan.better, chosen)


def _faster(better: Placement, chosen: Placement) -> str:
    nodes = f"--rollout-nodes {better.layout.num_rollout_nodes} " if better.layout.num_rollout_nodes else ""
    gain = better.tokens_per_second / chosen.tokens_per_second
    return (f"faster on the same nodes, {gain:.2g} times the tokens/s, {better.time.step:.2g} s per step: "
            f"{nodes}{as_overrides(better.settings)}")  # fmt: skip


def _layout(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"{plan.chosen.layout.num_nodes} x {plan.machine.name}"
    yield from who_is_where(plan.chosen.config, plan.chosen.layout)
    counts = plan.parameters
    yield f"  parameters: ψ {counts['psi']:,}, φ {counts['phi']:,}, ξ {counts['xi']:,}"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.chosen.memory
    yield ""
    yield f"memory of a rank: {gib(memory.device_bytes)} (model states {gib(memory.model_state_bytes)})"
    yield from _table(memory.device)
    if memory.host:
        yield f"beside it, in the host's memory: {gib(memory.host_bytes)}"
        yield from _table(memory.host)
    yield f"memory of a rollout worker's device: {gib(sum(plan.chosen.worker.values()))}"
    yield from _table(plan.chosen.worker)


def _table(parts: Mapping[str, float]) -> Iterator[str]:
    for name, num_bytes in parts.items():
        if num_bytes:
            yield f"  {name:<36}{num_bytes / 2**30:>10,.3f} GiB"


def _time(plan: Plan) -> Iterator[str]:
    time, config = plan.chosen.time, plan.chosen.config
    how = "one after the other" if time.take_turns else "at the same time"
    yield ""
    yield f"one step: {time.step:.3g} s; training and rollouts {how} (policy age {config.rollout.max_policy_age})"
    parts = [("training", time.training), ("  compute", time.compute), ("  collectives, exposed",
             time.exposed_collectives), ("  optimizer", time.optimizer), ("  publish", time.publish),
             ("rollouts", time.rollouts), ("ranks wait for rollouts", time.waiting)]  # fmt: skip
    for name, seconds in parts:
        if seconds or name != "  optimizer":  # a rehearsal has it in compute
            yield f"  {name:<36}{seconds:>10.4f} s"
    if time.step == time.crowded:
        yield "  ranks and workers share cores, which the step's work fills"
    yield f"  collectives hidden under compute: {time.hidden_collectives:.4f} s"
    yield (f"  matrix products of a step: {training_flops(config) / 1e12:.4g} TFLOP of a rank, "
           f"{rollout_flops(config) / 1e12:.4g} TFLOP of a worker")  # fmt: skip


def _basis(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    yield ""
    yield f"figures: {machine.source}"
    if machine.measured:
        yield "measured: " + ", ".join(f"{name} {value:.3g}" for name, value in machine.measured.items())
        how = ("seconds are those of a rehearsal with fewer layers, compute and optimizer together"
               if machine.is_rehearsed else
               f"not rehearsed; operations that a layer dispatches are assumed: {OPS_PER_LAYER} in training, "
               f"{DECODE_OPS_PER_LAYER} in decoding")  # fmt: skip
        yield f"responses as long as they may get; {how}"
        return
    yield "ASSUMED, for nobody knows them without such a machine; responses as long as they may get:"
    yield "  " + ", ".join(f"{name} {machine.assumptions[name]:g}" for name in ASSUMED)


def as_json(plan: Plan) -> str:
    """One object; bytes, seconds, FLOP/s."""
    return json.dumps(_tree(plan), allow_nan=False)


def keep_plan(plan: Plan, run_dir: Path) -> None:
    """In the run folder, where the run's report finds it."""
    from asa_dist.report.planned import PLAN_FILE  # both heavier than planning
    from asa_dist.runtime.checkpoint_files import write_atomically

    write_atomically(run_dir / PLAN_FILE, as_json(plan) + "\n")


def _tree(plan: Plan) -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "machine": asdict(plan.machine),
        "parameters": plan.parameters,
        "chosen": _placement(plan.chosen),
        "better": None if plan.better is None else _placement(plan.better),
    }


def _placement(placement: Placement) -> dict[str, Any]:
    time = placement.time
    return {
        "settings": placement.settings,
        "layout": asdict(placement.layout),
        "bytes_per_rank": placement.memory.device,
        "host_bytes_per_rank": placement.memory.host,
        "bytes_per_worker_device": placement.worker,
        "seconds": asdict(time) | {"training": time.training, "waiting": time.waiting, "step": time.step},
        "tokens_per_second": placement.tokens_per_second,
        "flops_per_rank": training_flops(placement.config),
        "flops_per_worker": rollout_flops(placement.config),
    }

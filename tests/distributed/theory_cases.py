"""What the ranks of test_theory.py run, and the same quantities without DeepSpeed, from their definitions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from asa_dist.asa.objective import StepInputs, StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.runtime.engine import Placement, TrainEngine, parameter_groups
from asa_dist.runtime.model import PHI, PSI, XI, AsaModel, named_parts
from tests.distributed import tiny

NUM_STEPS = 3
RATES = {PSI: 1e-2, PHI: 1e-2, XI: 1e-2}
PHI_RESTS = {**RATES, PHI: 0.0}
CLIP_NORM = 0.1  # below the norms of ψ and φ
Theory = dict[str, float]
CASES: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "stage 3, two micro-batches": {"stage": 3, "accumulation_steps": 2},
    "stage 3, small weights stay gathered": {"stage": 3, "train__zero_persistence_threshold": 100_000},
}


@dataclass(frozen=True)
class Seen:
    theory: list[Theory]  # by step, as the loop gets it
    same_end: bool  # weights after steps that were not observed are the same, bit for bit
    when_phi_rests: Theory
    when_skipped: Theory
    num_hooks_left: int


def all_cases(placement: Placement) -> dict[str, Seen]:
    return {name: observed(placement, **case) for name, case in CASES.items()}


def in_bfloat16(placement: Placement) -> dict[int, Theory]:
    """By stage: after the last step."""
    return {stage: _last_in_bfloat16(placement, stage) for stage in (0, 1, 3)}


def _last_in_bfloat16(placement: Placement, stage: int) -> Theory:
    engine, batches = _engine_and_batches(placement, stage, 1, model__dtype="bfloat16")
    theory = _trained(engine, engine.observed_step, batches)
    engine.close()
    return theory[-1]


def observed(placement: Placement, stage: int, accumulation_steps: int = 1, **changes: Any) -> Seen:
    """Training steps that are observed, beside the same that are not."""
    engine, batches = _engine_and_batches(placement, stage, accumulation_steps, **changes)
    assert not any(_trained(engine, engine.train_step, batches))
    wanted_end = _goes_on(engine, batches)
    engine.close()
    engine, batches = _engine_and_batches(placement, stage, accumulation_steps, **changes)
    hooks = len(engine.engine.module.evaluator._forward_pre_hooks)
    theory = _trained(engine, engine.observed_step, batches)
    same_end = all(map(torch.equal, _goes_on(engine, batches), wanted_end))
    resting = engine.observed_step(batches, tiny.inputs(), PHI_RESTS)
    bad = replace(tiny.inputs(), progress_F=torch.full((5,), float("nan")))
    skipped = engine.observed_step(batches, bad, RATES)
    assert skipped.skipped_because
    num_hooks_left = len(engine.engine.module.evaluator._forward_pre_hooks) - hooks
    seen = Seen(theory, same_end, _theory(engine, resting), _theory(engine, skipped), num_hooks_left)
    engine.close()
    return seen


def _engine_and_batches(
    placement: Placement, stage: int, accumulation_steps: int, **changes: Any
) -> tuple[TrainEngine, list[MicroBatch]]:
    settings = tiny.config(stage, placement.num_ranks, accumulation_steps, optimizer__clip_norm=CLIP_NORM, **changes)
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, accumulation_steps)
    return tiny.engine(tiny.model(settings), settings, placement), batches


def _trained(engine: TrainEngine, step: Callable[..., StepResult], batches: Sequence[MicroBatch]) -> list[Theory]:
    return [_theory(engine, step(batches, _inputs(number), RATES)) for number in range(NUM_STEPS)]


def _goes_on(engine: TrainEngine, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """This rank's weights after one more step."""
    engine.train_step(batches, tiny.inputs(), RATES)
    return [shard.clone() for part in (PSI, PHI, XI) for shard in engine.shards(part)]


def _inputs(number: int) -> StepInputs:
    """Gradients that differ from step to step."""
    inputs = tiny.inputs()
    return replace(inputs, coefficients=replace(inputs.coefficients, tau=0.1 + 0.4 * number))


def _theory(engine: TrainEngine, result: StepResult) -> Theory:
    """As the loop does it, which fails unless all ranks have the same keys."""
    names = [name for name in result.maxima if name.startswith("theory/")]
    return dict(zip(names, engine.max_over_ranks([float(result.maxima[name]) for name in names]), strict=True))


# --- by definition ------------------------------------------------------------------------------------------------
def by_definition() -> list[Theory]:
    """The whole batch in one process: gradients are kept, and a copy of the old model gets the new φ."""
    settings = tiny.config(stage=0)
    model, batch = tiny.model(settings), tiny.micro_batches(1, 0, 1)[0]
    adam = settings.optimizer
    betas = (adam.adam_beta1, adam.adam_beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model, adam), betas=betas, eps=adam.adam_eps)
    for group in optimizer.param_groups:
        group["lr"] = RATES[group["part"]]
    kept: dict[str, list[torch.Tensor]] = {PSI: [], PHI: [], XI: []}  # gradients by part, a row per step
    theory = []
    for number in range(NUM_STEPS):
        inputs = _inputs(number)
        output = model(batch=batch, inputs=inputs)
        output.loss.backward()
        for part, gradients in kept.items():
            of_part = [p for owner, _, p in named_parts(model) if owner == part and p.grad is not None]
            torch.nn.utils.clip_grad_norm_(of_part, CLIP_NORM)
            gradients.append(torch.cat([p.grad.flatten().double() for p in of_part]))
        before = copy.deepcopy(model)
        optimizer.step()
        optimizer.zero_grad()
        rewards = torch.stack([output.terms["self"], output.terms["intrinsic"]])
        values = {
            "theory/reward_max": float(rewards.abs().max()),
            "theory/lipschitz_phi": lipschitz(before, model, batch, inputs, output.terms["self"]),
        }
        if number > 0:
            values |= {
                f"theory/gradient_variance/{part}": variance(torch.stack(gradients), *betas)
                for part, gradients in kept.items()
            }
        theory.append(values)
    return theory


@torch.no_grad()
def lipschitz(before: AsaModel, after: AsaModel, batch: MicroBatch, inputs: StepInputs, self_PG: torch.Tensor) -> float:
    pairs = zip(before.evaluator.parameters(), after.evaluator.parameters(), strict=True)
    distance = torch.cat([(then - now).flatten().double() for then, now in pairs]).norm()
    mixed = copy.deepcopy(before)  # ψ and ξ as they were
    mixed.evaluator.load_state_dict(after.evaluator.state_dict())
    now_PG = mixed(batch=batch, inputs=inputs).terms["self"]
    return float((now_PG - self_PG).abs().max() / distance)


def variance(gradient_TD: torch.Tensor, beta1: float, beta2: float) -> float:
    """Σ over elements of (E[v] − E[m]²) / (1 − Σ w²), with the averages' weights written out."""
    age_T = torch.arange(len(gradient_TD) - 1, -1, -1, dtype=torch.float64)
    weight1_T, weight2_T = ((beta**age_T) / (beta**age_T).sum() for beta in (beta1, beta2))
    excess_D = weight2_T @ gradient_TD.square() - (weight1_T @ gradient_TD).square()
    return max(0.0, float(excess_D.sum() / (1 - weight1_T.square().sum())))

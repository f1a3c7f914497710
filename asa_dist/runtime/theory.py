"""What the theorems are about, measured on the steps that are asked for (the mathematics: asa/theory.py).

    before the step    a copy of this rank's shard of φ; a hook notes what the evaluator reads
    the step           as always
    after the update   φ is gathered once and scores the noted states again: of R_self, only φ has changed
                       one all-reduce: of what the ranks' shards of Adam's averages and of φ yield

Every rank does the same, whatever it holds. A step that makes no update is not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from asa_dist.asa.objective import StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.asa.theory import gradient_variance
from asa_dist.runtime.model import PHI, PSI, XI, AsaModel, named_parts
from asa_dist.runtime.parameter_state import pieces_to_save

PARTS = (PSI, PHI, XI)


@dataclass(frozen=True)
class StepObserver:
    """One rank's view of the model and its optimizer."""

    model: AsaModel
    optimizer: Any
    rank: int
    num_ranks: int
    phi_shards: Callable[[], Iterable[Tensor]]  # this rank's disjoint pieces of φ, as it is computed with
    sum_over_ranks: Callable[[Tensor], Tensor]

    def watch(self, train_step: Callable[[], StepResult], batches: Sequence[MicroBatch]) -> StepResult:
        """Makes the step; a collective. Adds to the result's maxima, each only where it is defined:

        theory/reward_max                      largest |R_self| or |R_intrinsic| of this rank
        theory/gradient_variance/{psi,phi,xi}  of the whole model: see ``gradient_variance``; from the second update on.
                                               At stage 0 in bfloat16 DeepSpeed gives Adam a gradient of zeros first:
                                               wrong until the averages have forgotten it
        theory/lipschitz_phi                   max over this rank's responses of |R_self(φ') − R_self(φ)| / ‖φ' − φ‖₂,
                                               φ' after the update; if φ moved. A lower bound of L_R in Theorem 1

        Args:
            batches: the step's micro-batches, on any device.
        """
        before = [shard.clone() for shard in self.phi_shards()]
        with _arguments_of(self.model.evaluator) as evaluated:
            result = train_step()
        if result.skipped_because:
            return result
        rewards = [terms[name] for terms in result.terms for name in ("self", "intrinsic")]
        values = {"theory/reward_max": _largest(rewards)}
        change = self._largest_change(evaluated, batches, result)
        totals = self.sum_over_ranks(torch.cat([self._squared_distance(before), *self._variances()]))
        squared_distance, variance_3, num_elements_3 = totals.split((1, len(PARTS), len(PARTS)))
        if squared_distance > 0:
            values["theory/lipschitz_phi"] = change / math.sqrt(squared_distance)
        for part, variance, num_elements in zip(PARTS, variance_3, num_elements_3, strict=True):
            if num_elements > 0:
                values[f"theory/gradient_variance/{part}"] = variance.clamp(min=0)
        return replace(result, maxima=result.maxima | values)

    def _squared_distance(self, before: Sequence[Tensor]) -> Tensor:
        """float64 [1]: of this rank's share of φ from what it was."""
        pairs = zip(before, self.phi_shards(), strict=True)
        squares = [(now.double() - then.double()).square().sum() for then, now in pairs]
        return torch.stack(squares).sum().view(1).cpu()

    def _variances(self) -> tuple[Tensor, Tensor]:
        """(gradient variance, elements it was estimated for), float64 [3], of this rank's share of each part."""
        part_of_parameter = {id(parameter): part for part, _, parameter in named_parts(self.model)}
        parts = {name: part_of_parameter[id(parameter)] for name, parameter in self.model.named_parameters()}
        beta1, beta2 = self.optimizer.param_groups[0]["betas"]
        variance_3, num_elements_3 = torch.zeros(2, len(PARTS), dtype=torch.float64)
        for piece in pieces_to_save(self.model, self.optimizer, self.rank, self.num_ranks):
            if piece.adam_step < 2 or beta1 == 0:
                continue  # one gradient has no variance
            averages = piece.tensors["exp_avg"], piece.tensors["exp_avg_sq"]
            part = PARTS.index(parts[piece.name])
            variance_3[part] += float(gradient_variance(*averages, beta1, beta2, piece.adam_step))
            num_elements_3[part] += piece.numel
        return variance_3, num_elements_3

    @torch.no_grad()
    def _largest_change(
        self, evaluated: Sequence[tuple[Any, ...]], batches: Sequence[MicroBatch], result: StepResult
    ) -> Tensor:
        """Of R_self of this rank's responses, by the update of φ; ω, states and uncertainty as in the step."""
        omega_3 = torch.stack([result.sums[f"omega/{term}"] for term in ("logic", "fact", "behav")]) / len(batches)
        changes = []
        with deepspeed.zero.GatheredParameters(list(self.model.evaluator.parameters())):
            for arguments, batch, terms in zip(evaluated, batches, result.terms, strict=True):
                groups = batch.responses.to(omega_3.device)
                now_PG = self.model.self_reward(arguments, groups, terms, omega_3)
                changes.append(now_PG - terms["self"])
        return _largest(changes)


@contextmanager
def _arguments_of(module: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """The positional arguments of every call of ``module`` within it."""
    calls: list[tuple[Any, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    try:
        yield calls
    finally:
        hook.remove()


def _largest(values: Sequence[Tensor]) -> Tensor:
    """Largest absolute value."""
    return torch.stack([value.abs().max() for value in values]).max()

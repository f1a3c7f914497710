"""Responses of a checkpoint, and every reward term of them, as training computes it, with that checkpoint's φ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from asa_dist.asa.objective import GlobalCounts
from asa_dist.asa.packing import MicroBatch, pack_groups
from asa_dist.evaluation.checkpoint_model import AsaCheckpoint
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.engine import Engine
from asa_dist.runtime.data.tokenizer import token_tables
from asa_dist.runtime.model import AsaModel

Item = TypeVar("Item")


@dataclass(frozen=True)
class ScoredResponses:
    """Of P groups of G responses, in the order of the groups."""

    terms: dict[str, Tensor]  # as ``asa.objective.reward_terms`` names them; float32 [P, G] on the CPU
    sums: dict[str, Tensor]  # as ``asa.objective.fused_loss`` names them, but for losses; over all responses
    num_responses: int
    num_tokens: int  # of responses, end-of-text included


def sample_groups(
    engine: Engine, prompts: Sequence[Prompt], groups_per_call: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[RolloutGroup]:
    """A group per prompt. What is sampled depends in its last bits on which prompts share a call."""
    groups: list[RolloutGroup] = []
    for bundle in _chunks(prompts, groups_per_call):
        progress(f"sampling: {len(groups)} of {len(prompts)} groups")
        for prompt, responses in zip(bundle, engine.generate(bundle), strict=True):
            groups.append(RolloutGroup(engine.version, len(groups), prompt, responses))
    return groups


@torch.no_grad()
def score_responses(
    checkpoint: AsaCheckpoint, model: AsaModel, groups: Sequence[RolloutGroup],
    progress: Callable[[str], None] = lambda message: None,
) -> ScoredResponses:
    """Rewards of ``groups`` (P ≥ 1) with the checkpoint's φ, ω, τ and centre.

    Args:
        model: of ``checkpoint.asa_model``.
        groups: of equal size, each prompt + response at most ``data.sequence_length`` tokens. Those with equally many
            phrasings, if they are neighbours, are computed together: as many as in a training micro-batch.
    """
    tables = token_tables(checkpoint.tokenizer(), model.vocab_size)
    device = next(model.parameters()).device
    per_batch = groups_per_micro_batch(checkpoint)
    terms: list[dict[str, Tensor]] = []
    sums: dict[str, Tensor] = {}
    for bundle in _uniform_chunks(groups, per_batch):
        progress(f"scoring: {sum(len(found['self']) for found in terms)} of {len(groups)} groups")
        batch = pack_groups(bundle, checkpoint.config.data.sequence_length, tables, checkpoint.step).to(device)
        output = model(batch, checkpoint.step_inputs(counts_of([batch]), str(device)))
        terms.append({name: value_PG.cpu() for name, value_PG in output.terms.items()})
        for name, value in output.sums.items():
            if not name.startswith("loss/"):  # divided by this batch's counts
                sums[name] = sums.get(name, 0) + value.double().cpu()
    return ScoredResponses(
        terms={name: torch.cat([found[name] for found in terms]) for name in terms[0]},
        sums=sums,
        num_responses=sum(len(group.responses) for group in groups),
        num_tokens=sum(len(response.token_ids) for group in groups for response in group.responses),
    )


def counts_of(batches: Sequence[MicroBatch]) -> GlobalCounts:
    """Of all of them together; at least 1 each, to divide by."""
    return GlobalCounts(*torch.stack([GlobalCounts.of(batch) for batch in batches]).sum(0).clamp(min=1).tolist())


def groups_per_micro_batch(checkpoint: AsaCheckpoint) -> int:
    """What one rank has memory for."""
    config = checkpoint.config
    return max(1, config.rollout.prompts_per_step // (config.num_ranks * config.train.accumulation_steps))


def _uniform_chunks(groups: Sequence[RolloutGroup], size: int) -> Iterator[Sequence[RolloutGroup]]:
    """A batch holds prompts with equally many phrasings."""
    for _, same in groupby(groups, key=lambda group: len(group.prompt.phrasings)):
        yield from _chunks(list(same), size)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]

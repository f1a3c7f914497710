"""What was not finite in a step: counted on every rank, and, in the rare case, told by all ranks in the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asa_dist.asa.objective import FusedOutput
from asa_dist.asa.packing import MicroBatch

LOSS = "loss/"
LOSSES_WITHOUT_PROMPTS = {"loss/mle", "loss/total"}  # the corpus rows', and the sum, whose summands tell more
PROMPTS_IN_MESSAGE = 16


@dataclass(frozen=True)
class NonfiniteValues:
    """Of one rank's step."""

    losses: tuple[str, ...]  # names as in metrics.jsonl
    rewards: tuple[str, ...]  # names as in samples.jsonl
    prompt_ids: tuple[int, ...]  # of the responses concerned, as far as they can be told


def count_nonfinite(output: FusedOutput) -> Tensor:
    """Number of losses and reward terms with a value that is not finite; float64 scalar, without waiting for it."""
    losses = [value for name, value in output.sums.items() if name.startswith(LOSS)]
    checked = torch.stack([value.sum() for value in (*losses, *output.terms.values())])
    return (~torch.isfinite(checked)).sum().double()


def find_nonfinite(batches: Sequence[MicroBatch], outputs: Sequence[FusedOutput]) -> NonfiniteValues:
    """Names the values and the prompts; a loss without a bad reward concerns every prompt of its micro-batch."""
    losses: dict[str, None] = {}  # in order of discovery, each once
    rewards: dict[str, None] = {}
    prompt_ids: set[int] = set()
    for batch, output in zip(batches, outputs, strict=True):
        assert batch.groups is not None
        bad_losses = [
            name for name, value in output.sums.items() if name.startswith(LOSS) and not torch.isfinite(value)
        ]
        bad_terms = {name: ~torch.isfinite(value_PG).all(1).cpu() for name, value_PG in output.terms.items()}
        bad_terms = {name: bad_P for name, bad_P in bad_terms.items() if bad_P.any()}
        losses |= dict.fromkeys(bad_losses)
        rewards |= dict.fromkeys(bad_terms)
        if bad_terms:
            concerned_P = torch.stack(list(bad_terms.values())).any(0)
        else:
            is_of_prompts = bool(set(bad_losses) - LOSSES_WITHOUT_PROMPTS)
            concerned_P = torch.full((batch.groups.num_groups,), is_of_prompts)
        prompt_ids |= set(batch.groups.prompt_id_P.cpu()[concerned_P].tolist())
    return NonfiniteValues(tuple(losses), tuple(rewards), tuple(sorted(prompt_ids)))


def skip_reason(found: Sequence[NonfiniteValues], gradient_norms: Mapping[str, float]) -> tuple[str, list[int]]:
    """One sentence for all ranks, and the prompt ids of all of them.

    Args:
        found: by rank.
        gradient_norms: by part, of the whole model.
    """
    losses = list(dict.fromkeys(name for values in found for name in values.losses))
    rewards = list(dict.fromkeys(name for values in found for name in values.rewards))
    gradients = [part for part, norm in gradient_norms.items() if not math.isfinite(norm)]
    prompt_ids = sorted({prompt_id for values in found for prompt_id in values.prompt_ids})
    ranks = [str(rank) for rank, values in enumerate(found) if values.losses or values.rewards]
    parts = [", ".join(losses)] if losses else []
    if rewards:
        parts.append("reward terms " + ", ".join(rewards))
    if gradients:
        parts.append("gradients of " + ", ".join(gradients))
    if ranks:
        parts.append("on rank " + ", ".join(ranks))
    if prompt_ids:
        more = len(prompt_ids) - PROMPTS_IN_MESSAGE
        shown = ", ".join(map(str, prompt_ids[:PROMPTS_IN_MESSAGE]))
        parts.append(f"prompts {shown}" + (f" and {more} more" if more > 0 else ""))
    return "not finite: " + "; ".join(parts), prompt_ids

"""The curriculum (stage 3 of UDASA): which stages, on which pairs, in which order, at which rate, and until when.

A round plans its stages once, from config, seed and its pairs; whoever resumes plans the same ones again. Only what the
evaluations of the current stage have shown has to be remembered: :class:`Stopping`. Pairs go by their prompt ids:
a prompt has one pair at most.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor

from asa_dist.config_udasa import CurriculumConfig

MIN_MARGIN_GAIN = 0.01  # share of itself by which a margin that is not saturated grows while patience lasts


def shuffled(numbers: Iterable[int], *key: str | int) -> list[int]:
    """The numbers in an order drawn from the key; which others there are, and in which order, changes nothing."""

    def draw(number: int) -> bytes:
        return hashlib.blake2b(" ".join(map(str, (*key, number))).encode(), digest_size=16).digest()

    return sorted(numbers, key=draw)


# --- the plan ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StagePlan:
    """One stage of a round."""

    stage: int  # 0 = the clearest pairs
    is_last: bool  # of the round: where the KL penalty applies
    train_ids: tuple[int, ...]  # prompt ids of the pairs, at least one
    heldout_ids: tuple[int, ...]  # may be none: then nothing can end the stage early
    steps_per_epoch: int
    num_steps: int  # planned; early stopping can leave out the last ones, and with them the decay
    num_warmup_steps: int
    num_decay_steps: int
    peak_learning_rate: float
    seed: int  # of the run
    round_index: int

    def learning_rate(self, step: int) -> float:
        """At 0-based ``step`` of the stage: warm-up by equal increments, constant, decay by the same in reverse.

        Raises:
            ValueError: the stage has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"stage {self.stage} has steps 0 to {self.num_steps - 1}, and no step {step}")
        rising = (step + 1) / max(1, self.num_warmup_steps)
        falling = (self.num_steps - step) / max(1, self.num_decay_steps)
        return self.peak_learning_rate * min(1.0, rising, falling)

    def pairs_by_step(self, first_step: int = 0) -> Iterator[list[int]]:
        """Prompt ids of the pairs of each step from ``first_step`` to the last one, never none.

        Every epoch has its own order, and its steps are of equal size within one pair, rather than the last one small.
        """
        num_pairs, per_epoch = len(self.train_ids), self.steps_per_epoch
        for epoch in range(first_step // per_epoch, math.ceil(self.num_steps / per_epoch)):
            ordered = shuffled(self.train_ids, "order of pairs", self.seed, self.round_index, epoch)
            start = epoch * per_epoch
            for step in range(max(first_step, start), min(self.num_steps, start + per_epoch)):
                part = step - start
                yield ordered[part * num_pairs // per_epoch : (part + 1) * num_pairs // per_epoch]


def plan_curriculum(
    stage_by_id: Mapping[int, int], config: CurriculumConfig, seed: int, round_index: int
) -> tuple[StagePlan, ...]:
    """The stages of a round in the order in which they are trained; those without pairs are not among them.

    What is special about the first stage (its learning rate) and the last one (the KL penalty) goes by this order.

    Args:
        stage_by_id: stage of every pair, 0 = clearest, by prompt id.
        seed: of the run.
        round_index: from 0; the order of pairs, and of stages if random, differs from round to round.
    """
    stages = sorted(set(stage_by_id.values()))
    if config.order == "random":
        stages = shuffled(stages, "order of stages", seed, round_index)
    plans = []
    for position, stage in enumerate(stages):
        prompt_ids = [prompt_id for prompt_id, own in stage_by_id.items() if own == stage]
        train_ids, heldout_ids = split_heldout(prompt_ids, config.heldout_fraction, seed)
        steps_per_epoch = math.ceil(len(train_ids) / config.pairs_per_step)
        num_steps = min(config.max_steps, config.max_epochs * steps_per_epoch)
        plans.append(
            StagePlan(
                stage=stage,
                is_last=position == len(stages) - 1,
                train_ids=train_ids,
                heldout_ids=heldout_ids,
                steps_per_epoch=steps_per_epoch,
                num_steps=num_steps,
                num_warmup_steps=min(config.max_warmup_steps, _share(num_steps, config.warmup_fraction)),
                num_decay_steps=_share(num_steps, config.decay_fraction),
                peak_learning_rate=config.learning_rates[min(position, len(config.learning_rates) - 1)],
                seed=seed,
                round_index=round_index,
            )
        )
    return tuple(plans)


def split_heldout(prompt_ids: Iterable[int], fraction: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(trained, held out), both ascending: ``fraction`` of them held out, rounded to whole pairs, but never all.

    Those held out are the first in one order of all prompts, so a prompt stays on its side from round to round unless
    it stands near the border.
    """
    ordered = shuffled(prompt_ids, "held-out pairs", seed)
    num_heldout = min(math.floor(fraction * len(ordered) + 0.5), max(0, len(ordered) - 1))
    return tuple(sorted(ordered[num_heldout:])), tuple(sorted(ordered[:num_heldout]))


def _share(num_steps: int, fraction: float) -> int:
    return int(fraction * num_steps + 1e-9)  # whole steps; 0.29 · 100 is 28.999…


# --- early stopping ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stopping:
    """What the evaluations of a stage on its held-out pairs have shown so far.

    A loss has to fall below the lowest one before it, a margin to rise above the highest one by ``MIN_MARGIN_GAIN``.
    What is not finite does neither.
    """

    loss_to_beat: float = math.inf
    margin_to_beat: float = -math.inf
    evaluations_since_loss: int = 0  # since the last one that beat it
    evaluations_since_margin: int = 0

    def after(self, loss: float, margin: float) -> Stopping:
        """With one more evaluation: mean loss and reward margin of the held-out pairs, the same on every rank."""
        fell, rose = loss < self.loss_to_beat, self.margin_to_beat < margin < math.inf
        return Stopping(
            loss_to_beat=loss if fell else self.loss_to_beat,
            margin_to_beat=margin + MIN_MARGIN_GAIN * abs(margin) if rose else self.margin_to_beat,
            evaluations_since_loss=0 if fell else self.evaluations_since_loss + 1,
            evaluations_since_margin=0 if rose else self.evaluations_since_margin + 1,
        )

    def reason(self, patience: int) -> str:
        """Why the stage ends now; "" = it goes on.

        Args:
            patience: evaluations in a row without progress, of either kind, that end a stage.
        """
        if self.evaluations_since_loss >= patience:
            return f"the held-out loss has not fallen in {self.evaluations_since_loss} evaluations"
        if self.evaluations_since_margin >= patience:
            return (
                f"the held-out margin is saturated: it has not grown by {MIN_MARGIN_GAIN:.0%} in "
                f"{self.evaluations_since_margin} evaluations"
            )
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: float64 scalars."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """What :meth:`state_dict` gave. Raises KeyError if a value is missing."""
        return cls(
            loss_to_beat=float(state["loss_to_beat"]),
            margin_to_beat=float(state["margin_to_beat"]),
            evaluations_since_loss=int(state["evaluations_since_loss"]),
            evaluations_since_margin=int(state["evaluations_since_margin"]),
        )

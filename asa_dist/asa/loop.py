"""The training loop of ASA-LLM, as a table of contents: each line of ``_step`` is one concern.

    consumes     rollout groups for (step, rank), corpus rows for step
    waits for    ``rollouts.take`` (workers that serve a fresh enough version), collectives
    unblocks     workers, by publishing version step + 1 and the next steps' prompts

The collaborators are arguments; this file knows no DeepSpeed, no Ray, no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asa_dist.asa.errors import TrainingError
from asa_dist.asa.objective import GlobalCounts, StepCoefficients, StepInputs, StepResult
from asa_dist.asa.packing import MicroBatch, TextTables, join, pack_groups
from asa_dist.asa.trust import AlignmentState, StepSummary
from asa_dist.config import Config
from asa_dist.records import RolloutGroup


class Engine(Protocol):
    """The sharded model (runtime/engine.py)."""

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: dict[str, float]
    ) -> StepResult: ...
    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float: ...
    def sum_over_ranks(self, values: Tensor) -> Tensor: ...
    def max_over_ranks(self, values: Sequence[float]) -> list[float]: ...
    def peak_memory_bytes(self) -> int: ...


class Corpus(Protocol):
    """Rows of this rank."""

    def train_batches(self, step: int) -> list[MicroBatch]: ...
    def heldout_batches(self) -> list[MicroBatch]: ...
    def bigram_perplexity(self) -> float: ...


class Rollouts(Protocol):
    """Where groups come from and weights go to."""

    def request(self, step: int) -> None: ...
    def take(self, step: int) -> list[RolloutGroup]: ...
    def publish(self, version: int) -> None: ...


class Recorder(Protocol):
    """Where results go."""

    def metrics(self, values: dict[str, float]) -> None: ...
    def trained(self, step: int, prompt_ids: list[int]) -> None: ...
    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...


LARGEST_EXPONENT = 700.0  # of exp in float64


@dataclass
class AsaLoop:
    """One rank's loop over the training steps."""

    config: Config
    rank: int
    num_ranks: int
    device: torch.device
    tables: TextTables
    state: AlignmentState
    engine: Engine
    corpus: Corpus
    rollouts: Rollouts
    recorder: Recorder
    learning_rates: Callable[[int], dict[str, float]]
    save: Callable[[int], None]  # writes the checkpoint after so many steps; a collective
    tokens_corpus: float = 0.0
    tokens_rollout: float = 0.0

    def run(self, first_step: int, num_steps: int) -> None:
        """Trains steps first_step … num_steps − 1, starting from policy version ``first_step``."""
        self.rollouts.publish(first_step)
        lookahead = self.config.rollout.max_policy_age
        for step in range(first_step, min(num_steps, first_step + lookahead + 1)):
            self.rollouts.request(step)
        self.recorder.metrics({"step": first_step, **self._evaluate()})  # while the first rollouts are generated
        for step in range(first_step, num_steps):
            values = self._step(step)
            if step + 1 + lookahead < num_steps:
                self.rollouts.request(step + 1 + lookahead)
            if (step + 1) % self.config.train.eval_every_steps == 0 or step + 1 == num_steps:
                values |= self._evaluate()
            if step + 1 == num_steps:
                values["time/checkpoint_seconds"] = self._timed(lambda: self.save(num_steps))
            self.recorder.metrics(values)

    def _step(self, step: int) -> dict[str, float]:
        started = time.monotonic()
        corpus = self.corpus.train_batches(step)  # while the rollouts are under way
        asked = time.monotonic()
        groups = self.rollouts.take(step)
        waited_seconds = time.monotonic() - asked
        batches = self._batches(step, corpus, groups)
        counts = self._global_counts(batches)
        inputs = self._inputs(counts)
        rates = self.learning_rates(step)
        result = self.engine.train_step(batches, inputs, rates)
        publish_seconds = self._timed(lambda: self.rollouts.publish(step + 1))
        sums, maxima, prompt_ids = self._reduce(result.sums, result.maxima, groups)
        tau = self.state.tau
        self.state.update(self._summary(sums, counts))
        self.recorder.trained(step + 1, prompt_ids)
        if step % self.config.metrics.samples_every_steps == 0:
            self.recorder.samples(step + 1, groups, result.terms, tau)
        step_seconds = time.monotonic() - started
        return self._metrics(step + 1, sums, maxima, counts, inputs) | {
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **{f"grad_norm/{part}": norm for part, norm in result.gradient_norms.items()},
            "time/step_seconds": step_seconds,
            "time/wait_rollout_seconds": waited_seconds,
            "time/publish_seconds": publish_seconds,
            "perf/tokens_per_second": (counts.corpus_tokens + counts.response_tokens) / step_seconds,
        }

    @staticmethod
    def _timed(action: Callable[[], None]) -> float:
        started = time.monotonic()
        action()
        return time.monotonic() - started

    def _batches(
        self, step: int, corpus: Sequence[MicroBatch], groups: Sequence[RolloutGroup]
    ) -> list[MicroBatch]:
        """Micro-batches of corpus and rollout rows; a group is never split."""
        per_batch, row_length = len(groups) // len(corpus), self.config.data.sequence_length
        return [
            join(rows, pack_groups(groups[i * per_batch : (i + 1) * per_batch], row_length, self.tables, step))
            for i, rows in enumerate(corpus)
        ]

    def _global_counts(self, batches: Sequence[MicroBatch]) -> GlobalCounts:
        """The step's normalisers: one all-reduce before the first forward."""
        local = torch.stack([GlobalCounts.of(batch) for batch in batches]).sum(0)
        return GlobalCounts(*self.engine.sum_over_ranks(local).tolist())

    def _inputs(self, counts: GlobalCounts) -> StepInputs:
        objective = self.config.objective
        coefficients = StepCoefficients(
            objective.alpha, objective.beta if self.state.aligning else 0.0, objective.gamma, self.state.tau
        )
        return StepInputs(
            coefficients,
            counts,
            self.state.center().to(self.device),
            self.state.scale(),
            self.state.progress().to(self.device),
        )

    def _reduce(
        self,
        sums: dict[str, Tensor],
        maxima: dict[str, Tensor],
        groups: Sequence[RolloutGroup],
    ) -> tuple[dict[str, Tensor], dict[str, float], list[int]]:
        """Sums and maxima over ranks, and the prompt ids of the whole step: two collectives."""
        num_prompts = self.config.rollout.prompts_per_step
        prompt_ids = torch.zeros(num_prompts, dtype=torch.float64, device=self.device)  # exact below 2⁵³
        for group in groups:
            prompt_ids[group.index] = group.prompt.prompt_id
        names = sorted(sums)
        flat = torch.cat([prompt_ids] + [sums[name].double().flatten() for name in names])
        sizes = [num_prompts] + [sums[name].numel() for name in names]
        all_ids, *reduced = self.engine.sum_over_ranks(flat).split(sizes)
        largest = self.engine.max_over_ranks(
            [*(float(value) for value in maxima.values()), float(self.engine.peak_memory_bytes())]
        )
        return (
            dict(zip(names, reduced, strict=True)),
            dict(zip([*maxima, "memory/peak_bytes"], largest, strict=True)),
            [int(prompt_id) for prompt_id in all_ids.tolist()],
        )

    def _summary(self, sums: dict[str, Tensor], counts: GlobalCounts) -> StepSummary:
        return StepSummary(
            rho_sum=float(sums["trust/rho_sum"]),
            num_valid_groups=float(sums["trust/valid_groups"]),
            reward_mean_3=torch.cat([sums["reward/logic"], sums["reward/fact"], sums["reward/behav"]])
            / counts.responses,
            meta_loss=float(sums["loss/meta"]),
            pooled_sum_H=sums["pooled_sum"],
            pooled_square_sum=float(sums["pooled_square_sum"]),
            num_pooled=counts.contentful,
        )

    def _metrics(
        self,
        step: int,
        sums: dict[str, Tensor],
        maxima: dict[str, float],
        counts: GlobalCounts,
        inputs: StepInputs,
    ) -> dict[str, float]:
        """Flat metrics: losses as they are, rewards per response, rollout figures per token or response."""
        self.tokens_corpus += counts.corpus_tokens
        self.tokens_rollout += counts.response_tokens
        per_token = {"mismatch_kl", "entropy", "importance_mean", "clipped_fraction"}
        values: dict[str, float] = {
            "step": step,
            "tokens/corpus": self.tokens_corpus,
            "tokens/rollout": self.tokens_rollout,
        }
        for name, value in sums.items():
            kind, _, rest = name.partition("/")
            if kind == "loss":
                values[name] = float(value)
            elif kind == "omega":
                values[name] = float(value) / (self.num_ranks * self.config.train.accumulation_steps)
            elif kind == "reward":
                values[name] = float(value) / counts.responses
            elif name == "rollout/policy_age_mean":
                values[name] = float(value) / self.config.rollout.prompts_per_step
            elif kind == "rollout":
                denominator = max(counts.response_tokens, 1.0) if rest in per_token else counts.responses
                values[name] = float(value) / denominator
        values |= {
            "trust/tau": inputs.coefficients.tau,
            "trust/rho": float(self.state.rho),
            "trust/valid_groups": float(sums["trust/valid_groups"]),
            "trust/beta": inputs.coefficients.beta,
        }
        return values | maxima

    def _evaluate(self) -> dict[str, float]:
        """Held-out perplexity, beside that of a bigram model of the same training tokens."""
        batches = self.corpus.heldout_batches()
        local = torch.stack([GlobalCounts.of(batch) for batch in batches]).sum(0)
        counts = GlobalCounts(*self.engine.sum_over_ranks(local).clamp(min=1).tolist())
        inputs = self._inputs(counts)
        loss = sum(self.engine.corpus_loss(batch, inputs) for batch in batches)
        mean_loss = float(self.engine.sum_over_ranks(torch.tensor([loss])))
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the held-out loss is {mean_loss}: the weights are not usable any more")
        return {
            "eval/perplexity": math.exp(min(mean_loss, LARGEST_EXPONENT)),
            "eval/bigram_perplexity": self.corpus.bigram_perplexity(),
        }

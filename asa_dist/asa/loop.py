"""The training loop of ASA-LLM, as a table of contents: each line of ``_step`` is one concern.

    consumes     rollout groups for (step, rank), corpus rows for step
    waits for    ``rollouts.take`` (workers that serve a fresh enough version), collectives
    unblocks     workers, by publishing version step + 1 and the prompts of step + 1 + max_policy_age

    workers   |  generate s, with version >= s - max_policy_age  |  generate s + 1 ...
    trainer   |  train s - 1  | publish | train s ...               (one loop: with max_policy_age 0 they take turns)

The collaborators are arguments; this file knows no DeepSpeed, no Ray, no files. Between two steps every rank stands at
the same place, so there a run is saved, stopped and resumed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from asa_dist.asa.errors import RolloutsUnavailable, TrainingError
from asa_dist.asa.objective import GlobalCounts, StepInputs, StepResult, step_inputs
from asa_dist.asa.packing import MicroBatch, TextTables, join, pack_groups
from asa_dist.asa.trust import AlignmentState, StepSummary
from asa_dist.config import Config
from asa_dist.records import RolloutGroup


class Engine(Protocol):
    """The sharded model (runtime/engine.py)."""

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: dict[str, float]
    ) -> StepResult: ...
    def observed_step(  # also measures theory/*
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: dict[str, float]
    ) -> StepResult: ...
    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float: ...
    def sum_over_ranks(self, values: Tensor) -> Tensor: ...
    def max_over_ranks(self, values: Sequence[float]) -> list[float]: ...
    def peak_memory_bytes(self) -> int: ...


class Corpus(Protocol):
    """Rows of this rank."""

    def train_batches(self, step: int) -> list[MicroBatch]: ...
    def trained(self) -> None: ...  # on the batches handed out last
    def heldout_batches(self) -> list[MicroBatch]: ...
    def bigram_perplexity(self) -> float: ...
    def state_dict(self) -> dict[str, Tensor]: ...  # a collective; the same on every rank
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Rollouts(Protocol):
    """Where groups come from and weights go to. What fails is raised by ``take``, as RolloutsUnavailable."""

    def request(self, step: int) -> None: ...
    def take(self, step: int) -> list[RolloutGroup]: ...
    def publish(self, version: int) -> None: ...


class Recorder(Protocol):
    """Where results go."""

    def metrics(self, values: dict[str, float]) -> None: ...
    def trained(self, step: int, prompt_ids: list[int], skipped: bool) -> None: ...
    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None: ...
    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...


class Checkpoints(Protocol):
    """Where a run can go on from. ``save`` is a collective; False: it could not be written, the one before stands."""

    def is_due(self, step: int) -> bool: ...
    def save(self, step: int, state: dict[str, Tensor]) -> bool: ...


LARGEST_EXPONENT = 700.0  # of exp in float64
def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """``alignment``, ``corpus`` or ``counters`` of ``AsaLoop.state_dict``, without that word before the names."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


COUNTERS = ("tokens/corpus", "tokens/rollout", "train/skipped_steps")


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
    checkpoints: Checkpoints
    learning_rates: Callable[[int], dict[str, float]]
    stop_code: Callable[[], int]  # 0: go on; else why to stop; the largest of all ranks counts
    finished: int = 0  # steps; = the policy version
    saved: int = 0  # steps of the newest checkpoint
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))  # since the first step
    skipped_in_a_row: int = 0

    def run(self, num_steps: int) -> int:
        """Trains steps ``finished`` … num_steps − 1; ends early if any rank's ``stop_code`` says so.

        Returns:
            The largest stop code of all ranks. What was trained is in a checkpoint, also when it raises
            RolloutsUnavailable.

        Raises:
            RolloutsUnavailable, TrainingError: on every rank.
        """
        stop = self._start(num_steps)
        try:
            while self.finished < num_steps and not stop:
                if self.checkpoints.is_due(self.finished):
                    self._save()
                stop = self._step(self.finished, num_steps)
        except RolloutsUnavailable:
            stop = self._agreed_stop_code()
            if not (self._save() and stop):  # who ends a run may end Ray first
                raise
            return stop
        if not self._save():
            raise TrainingError(f"the last checkpoint, after {self.finished} steps, could not be written")
        return stop

    def _start(self, num_steps: int) -> int:
        """Sets the workers going; the stop code before the first step."""
        self.rollouts.publish(self.finished)
        for step in range(self.finished, min(num_steps, self.finished + 1 + self.config.rollout.max_policy_age)):
            self.rollouts.request(step)
        if self.finished == 0:
            self.recorder.metrics({"step": 0, **self._evaluate()})  # while the first rollouts are generated
        return self._agreed_stop_code()

    def _agreed_stop_code(self) -> int:
        return int(self.engine.max_over_ranks([self.stop_code()])[0])

    def _step(self, step: int, num_steps: int) -> int:
        """Trains version ``step`` into ``step`` + 1; returns the stop code."""
        started = time.monotonic()
        corpus = self.corpus.train_batches(step)  # while the rollouts are under way
        asked = time.monotonic()
        groups = self._take(step)
        waited_seconds = time.monotonic() - asked
        batches = self._batches(step, corpus, groups)
        counts = self._global_counts(batches)
        inputs = step_inputs(self.state, self.config.objective, counts, self.device)
        rates = self.learning_rates(step)
        is_sampled = step % self.config.metrics.samples_every_steps == 0
        train_step = self.engine.observed_step if is_sampled else self.engine.train_step
        result = train_step(batches, inputs, rates)
        self.finished = step + 1
        self.corpus.trained()
        sums, maxima, prompt_ids, stop = self._reduce(result, groups)
        publish_seconds = self._unblock_workers(self.finished if stop else num_steps)
        self._count(counts, result)
        self.recorder.trained(step + 1, prompt_ids, skipped=bool(result.skipped_because))
        if result.skipped_because:
            self._skip(result, prompt_ids)
            return stop
        values = self._metrics(sums, counts, inputs) | maxima
        self.state.update(self._summary(sums, counts))
        values["trust/rho"] = float(self.state.rho)
        if is_sampled:
            self.recorder.samples(step + 1, groups, result.terms, inputs.coefficients.tau)
        step_seconds = time.monotonic() - started
        values |= {
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **{f"grad_norm/{part}": norm for part, norm in result.gradient_norms.items()},
            "time/step_seconds": step_seconds,
            "time/wait_rollout_seconds": waited_seconds,
            "time/publish_seconds": publish_seconds,
            "perf/tokens_per_second": (counts.corpus_tokens + counts.response_tokens) / step_seconds,
        }
        if (step + 1) % self.config.train.eval_every_steps == 0 or step + 1 == num_steps:
            values |= self._evaluate()
        self.recorder.metrics(values)
        return stop

    @staticmethod
    def _timed(action: Callable[[], object]) -> float:
        started = time.monotonic()
        action()
        return time.monotonic() - started

    def _take(self, step: int) -> list[RolloutGroup]:
        """This rank's groups. Every rank raises if one of them gets none: nothing has been trained of this step."""
        groups: list[RolloutGroup] = []
        problem = ""
        try:
            groups = self.rollouts.take(step)
        except RolloutsUnavailable as error:
            problem = str(error)
        if any(self.engine.max_over_ranks([bool(problem)])):
            raise RolloutsUnavailable(problem or f"another rank got no rollouts for step {step + 1}")
        return groups

    def _unblock_workers(self, num_steps: int) -> float:
        """Hands them the new version, and the prompts it may be used for; how long publishing held up training."""
        needed = self.finished < num_steps
        publish_seconds = self._timed(lambda: self.rollouts.publish(self.finished)) if needed else 0.0
        if (ahead := self.finished + self.config.rollout.max_policy_age) < num_steps:
            self.rollouts.request(ahead)
        return publish_seconds

    def _count(self, counts: GlobalCounts, result: StepResult) -> None:
        self.counters["tokens/corpus"] += counts.corpus_tokens
        self.counters["tokens/rollout"] += counts.response_tokens
        self.counters["train/skipped_steps"] += bool(result.skipped_because)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped_because else 0

    def _skip(self, result: StepResult, prompt_ids: list[int]) -> None:
        """Says so; gives up after too many in a row, as the last good update left everything."""
        self.recorder.skipped(self.finished, result.skipped_because, result.skipped_prompt_ids)
        self.recorder.metrics({"step": self.finished, **self.counters})
        if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
            self._save()
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row, the last one step {self.finished}, were skipped "
                f"(train.max_skipped_steps). {result.skipped_because}; all prompts of the last one: {prompt_ids}"
            )

    # --- between two steps --------------------------------------------------------------------------------------
    def _save(self) -> bool:
        if self.saved == self.finished > 0:
            return True  # nothing has been trained since
        started = time.monotonic()
        saved = self.checkpoints.save(self.finished, self.state_dict())
        seconds = time.monotonic() - started
        if saved:
            self.saved = self.finished
            self.recorder.metrics({"step": self.finished, "time/checkpoint_seconds": seconds})
        return saved

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step needs beside the model; the same on every rank. A collective."""
        return {
            **{f"alignment.{name}": value for name, value in self.state.state_dict().items()},
            **{f"corpus.{name}": value for name, value in self.corpus.state_dict().items()},
            **{f"counters.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.counters.items()},
        }

    def load_state_dict(self, finished: int, state: dict[str, Tensor]) -> None:
        """Goes on after ``finished`` steps, with what :meth:`state_dict` gave then.

        Raises:
            TrainingError: what another version of this loop gave.
        """
        try:
            self.state.load_state_dict(part_of(state, "alignment"))
        except RuntimeError as error:
            difference = " ".join(str(error).split())
            raise TrainingError(
                f"the checkpoint after {finished} steps is of another version of asa-dist: {difference}"
            ) from None
        self.finished = self.saved = finished
        self.corpus.load_state_dict(part_of(state, "corpus"))
        self.counters = {name: float(value) for name, value in part_of(state, "counters").items()}

    # --- one step -----------------------------------------------------------------------------------------------
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

    def _reduce(
        self, result: StepResult, groups: Sequence[RolloutGroup]
    ) -> tuple[dict[str, Tensor], dict[str, float], list[int], int]:
        """Sums and maxima over ranks, the prompt ids of the whole step, and the stop code: two collectives."""
        num_prompts = self.config.rollout.prompts_per_step
        prompt_ids = torch.zeros(num_prompts, dtype=torch.float64, device=self.device)  # exact below 2⁵³
        for group in groups:
            prompt_ids[group.index] = group.prompt.prompt_id
        names = sorted(result.sums)
        flat = torch.cat([prompt_ids] + [result.sums[name].double().flatten() for name in names])
        sizes = [num_prompts] + [result.sums[name].numel() for name in names]
        all_ids, *sums = self.engine.sum_over_ranks(flat).split(sizes)
        *maxima, peak_bytes, stop = self.engine.max_over_ranks(
            [*map(float, result.maxima.values()), self.engine.peak_memory_bytes(), self.stop_code()]
        )
        return (
            dict(zip(names, sums, strict=True)),
            dict(zip(result.maxima, maxima, strict=True)) | {"memory/peak_bytes": peak_bytes},
            [int(prompt_id) for prompt_id in all_ids.tolist()],
            int(stop),
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
            responses_with_V=sums["responses_with_token"],
            num_responses=counts.responses,
        )

    def _metrics(self, sums: dict[str, Tensor], counts: GlobalCounts, inputs: StepInputs) -> dict[str, float]:
        """Flat metrics: losses as they are, rewards per response, rollout figures per token or response."""
        per_token = {"mismatch_kl", "entropy", "importance_mean", "clipped_fraction"}
        values: dict[str, float] = {"step": self.finished, **self.counters}
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
        return values | {
            "trust/tau": inputs.coefficients.tau,
            "trust/valid_groups": float(sums["trust/valid_groups"]),
            "trust/beta": inputs.coefficients.beta,
        }

    def _evaluate(self) -> dict[str, float]:
        """Held-out perplexity, beside that of a bigram model of the same training tokens."""
        batches = self.corpus.heldout_batches()
        local = torch.stack([GlobalCounts.of(batch) for batch in batches]).sum(0)
        counts = GlobalCounts(*self.engine.sum_over_ranks(local).clamp(min=1).tolist())
        inputs = step_inputs(self.state, self.config.objective, counts, self.device)
        loss = sum(self.engine.corpus_loss(batch, inputs) for batch in batches)
        mean_loss = float(self.engine.sum_over_ranks(torch.tensor([loss])))
        if not math.isfinite(mean_loss):
            raise TrainingError(f"the held-out loss is {mean_loss}: the weights are not usable any more")
        return {
            "eval/perplexity": math.exp(min(mean_loss, LARGEST_EXPONENT)),
            "eval/bigram_perplexity": self.corpus.bigram_perplexity(),
        }

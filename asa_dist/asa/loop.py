"""The training loop of ASA-LLM, as a table of contents: each line of ``_step`` is one concern.

    consumes     rollout groups for (step, rank), corpus rows for step
    waits for    ``rollouts.take`` (workers that serve a fresh enough version), collectives
    unblocks     workers, by publishing version step + 1 and the prompts of step + 1 + max_policy_age

    workers   |  generate s, with version >= s - max_policy_age  |  generate s + 1 ...
    trainer   |  train s - 1  | publish | train s ...               (one loop: with max_policy_age 0 they take turns)

The collaborators are arguments; this file knows no DeepSpeed, no Ray, no files. What happens between two steps, and to
one that is not finite, is the same for every method: stepping.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from asa_dist.asa.errors import RolloutsUnavailable, TrainingError
from asa_dist.asa.mismatch import MismatchGuard
from asa_dist.asa.objective import GlobalCounts, StepInputs, StepResult, step_inputs
from asa_dist.asa.packing import MicroBatch, TextTables, join, pack_groups
from asa_dist.asa.step_time import StepTime, timed_evaluation
from asa_dist.asa.stepping import StepEngine, SteppedLoop, StepRecorder, of_another_version, part_of, require_usable
from asa_dist.asa.trust import AlignmentState, StepSummary
from asa_dist.config import Config
from asa_dist.records import RolloutGroup


class Engine(StepEngine, Protocol):
    """The sharded model (runtime/engine.py)."""

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: dict[str, float]
    ) -> StepResult: ...
    def observed_step(  # also measures theory/*
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: dict[str, float]
    ) -> StepResult: ...
    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float: ...
    def collective_seconds(self) -> float: ...  # that this rank has been blocked in collectives, so far


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
    def fall_back(self, reason: str) -> None: ...  # to the trainer's own model


class Recorder(StepRecorder, Protocol):
    """Where results go."""

    def say(self, message: str) -> None: ...
    def event(self, name: str, /, **details: Any) -> None: ...
    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...


LARGEST_EXPONENT = 700.0  # of exp in float64
COUNTERS = ("tokens/corpus", "tokens/rollout", "train/skipped_steps")


@dataclass(kw_only=True)
class AsaLoop(SteppedLoop):
    """One rank's loop over the training steps; ``finished`` is the policy version, too."""

    config: Config
    rank: int
    num_ranks: int
    device: torch.device
    tables: TextTables
    state: AlignmentState
    engine: Engine
    corpus: Corpus
    rollouts: Rollouts
    rollout_engine: Literal["hf", "vllm"]  # of all workers, as far as rank 0 knows
    recorder: Recorder
    learning_rates: Callable[[int], dict[str, float]]
    around_step: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()  # step: from 1 on
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))

    def __post_init__(self) -> None:
        self._mismatch_guard = MismatchGuard(self.config.rollout, self.config.model, self.rollout_engine)

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
                self._save_if_due()
                with self.around_step(self.finished + 1):
                    stop = self._step(self.finished, num_steps)
        except RolloutsUnavailable:
            stop = self._agreed_stop_code()
            if not (self._save() and stop):  # who ends a run may end Ray first
                raise
            return stop
        self._save_last()
        return stop

    def _start(self, num_steps: int) -> int:
        """Sets the workers going; the stop code before the first step."""
        self.rollouts.publish(self.finished)
        for step in range(self.finished, min(num_steps, self.finished + 1 + self.config.rollout.max_policy_age)):
            self.rollouts.request(step)
        if self.finished == 0:
            # while the first rollouts are generated
            self.recorder.metrics({"step": 0, **timed_evaluation(self._evaluate)})
        return self._agreed_stop_code()

    def _step(self, step: int, num_steps: int) -> int:
        """Trains version ``step`` into ``step`` + 1; returns the stop code."""
        spent = StepTime(self.engine.collective_seconds)
        with spent.part("data"):
            corpus = self.corpus.train_batches(step)  # while the rollouts are under way
        with spent.part("wait_rollout"):
            groups = self._take(step)
        with spent.part("data"):
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
        self._unblock_workers(self.finished if stop else num_steps, spent)
        tokens = {"tokens/corpus": counts.corpus_tokens, "tokens/rollout": counts.response_tokens}
        if not self._record(result, prompt_ids, tokens, self.config.train.max_skipped_steps):
            return stop
        values = self._metrics(sums, counts, inputs) | maxima
        self.state.update(self._summary(sums, counts))
        values["trust/rho"] = float(self.state.rho)
        if is_sampled:
            self.recorder.samples(step + 1, groups, result.terms, inputs.coefficients.tau)
        times = spent.metrics()
        values |= self._speed_and_size(result, rates, times["time/step_seconds"], sum(tokens.values())) | times
        if (step + 1) % self.config.train.eval_every_steps == 0 or step + 1 == num_steps:
            values |= timed_evaluation(self._evaluate)
        self.recorder.metrics(values)
        self._guard_against_mismatch(values, is_ending=bool(stop) or self.finished == num_steps)
        return stop

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

    def _unblock_workers(self, num_steps: int, spent: StepTime) -> None:
        """Hands them the new version, and the prompts it may be used for."""
        if self.finished < num_steps:
            with spent.part("publish"):
                self.rollouts.publish(self.finished)
        if (ahead := self.finished + self.config.rollout.max_policy_age) < num_steps:
            self.rollouts.request(ahead)

    def _guard_against_mismatch(self, values: dict[str, float], is_ending: bool) -> None:
        """Says, mends or ends it if rollouts are not those of the policy that is trained: `rollout.on_mismatch`.

        A run that is ending has nothing to act for.
        """
        if (found := self._mismatch_guard.look(values)) is None:
            return
        self.recorder.event("rollout_mismatch", **found.event)
        self.recorder.say(found.message)
        if is_ending:
            return
        if found.action == "fall_back":
            self.rollouts.fall_back(f"step {self.finished}: rollout.on_mismatch = fall_back: engine hf from now on")
        if found.action == "stop":
            self._save()
            raise TrainingError(f"{found.headline}. {found.consequence}")

    # --- between two steps --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {
            **{f"alignment.{name}": value for name, value in self.state.state_dict().items()},
            **{f"corpus.{name}": value for name, value in self.corpus.state_dict().items()},
        }

    def load_state_dict(self, finished: int, state: dict[str, Tensor]) -> None:
        try:
            self.state.load_state_dict(part_of(state, "alignment"))
        except RuntimeError as error:
            raise of_another_version(finished, " ".join(str(error).split())) from None
        super().load_state_dict(finished, state)
        self.corpus.load_state_dict(part_of(state, "corpus"))

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
        sums = self._sums({**result.sums, "prompt_ids": prompt_ids})
        maxima, stop = self._maxima(result.maxima)
        return sums, maxima, [int(prompt_id) for prompt_id in sums.pop("prompt_ids").tolist()], stop

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
        require_usable(mean_loss)
        return {
            "eval/perplexity": math.exp(min(mean_loss, LARGEST_EXPONENT)),
            "eval/bigram_perplexity": self.corpus.bigram_perplexity(),
        }

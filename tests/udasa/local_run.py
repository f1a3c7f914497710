"""The real UDASA loop in one process, with the smallest model that learns: one logit per token, whatever the context.

Pairs, packing, reference files and losses are the real ones.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa_dist.asa.objective import FusedOutput, StepResult, sum_per_response
from asa_dist.asa.packing import MicroBatch
from asa_dist.config_udasa import CurriculumConfig, DpoConfig
from asa_dist.records import MeasuredResponse, PreferencePair, unmeasured
from asa_dist.runtime.data.preferences import PreferenceFeed
from asa_dist.udasa.curriculum import plan_curriculum
from asa_dist.udasa.loop import UdasaLoop
from asa_dist.udasa.objective import PairInputs, preference_loss
from tests.asa import worlds
from tests.asa.local_run import ListRecorder as AsaRecorder

ROW = 32
NUM_PAIRS = 27  # nine in every stage: one of them held out, three steps of up to three
RATES = [3.0, 5.0]
SETTINGS: dict[str, Any] = {"pairs_per_step": 3, "learning_rates": RATES, "eval_every_steps": 2}


def pair(prompt_id: int) -> PreferencePair:
    rng = np.random.default_rng([5, prompt_id])

    def response(longest: int) -> MeasuredResponse:
        token_ids = rng.integers(1, worlds.VOCAB, rng.integers(1, longest)).astype(np.int32)
        return unmeasured(str(token_ids), token_ids, finished=False)

    prompt = rng.integers(1, worlds.VOCAB, 3).astype(np.int32)
    return PreferencePair(prompt_id, str(prompt), prompt, response(9), response(13), 0, 1, 0.5, 0, 7)


class Ranks:
    """The collectives of ranks that are threads; a single rank needs no other."""

    def __init__(self, num_ranks: int):
        self._values: list[Any] = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=20)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        gathered = list(self._values)
        self._barrier.wait()  # before anyone writes the next value
        return gathered


@dataclass
class Step:
    """What the engine was asked for."""

    prompt_ids: list[int]  # of this rank
    rate: float
    kl_weight: float
    logit_V: Tensor  # before the step


def merged(outputs: Sequence[FusedOutput]) -> dict[str, Tensor]:
    return {name: torch.stack([output.sums[name] for output in outputs]).sum(0) for name in outputs[0].sums}


class UnigramEngine:
    """Log-probability of a token = log softmax of its logit; plain gradient descent."""

    def __init__(self, ranks: Ranks, rank: int):
        self.logit_V = torch.zeros(worlds.VOCAB, requires_grad=True)
        self.steps: list[Step] = []
        self.bad_steps: set[int] = set()  # numbers, from 1, of those that end as if their loss was not finite
        self.breaks_at = math.inf  # number of the step that makes an update nobody can use
        self._ranks, self._rank = ranks, rank

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        return self.logit_V.log_softmax(0)[batch.target_RT.flatten().clamp(min=0)]

    def _output(self, batch: MicroBatch, inputs: PairInputs) -> FusedOutput:
        groups, logprob_N = batch.responses, self._logprobs(batch)
        logprob_P2, reference_P2 = (sum_per_response(v_N, groups) for v_N in (logprob_N, groups.sampled_logprob_N))
        return preference_loss(
            logprob_P2, reference_P2, groups.length_PG, inputs.dpo, inputs.kl_weight, inputs.counts
        )

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: PairInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        [rate] = learning_rates.values()
        prompt_ids = [i for batch in batches for i in batch.responses.prompt_id_P.tolist()]
        self.steps.append(Step(prompt_ids, rate, inputs.kl_weight, self.logit_V.detach().clone()))
        outputs = [self._output(batch, inputs) for batch in batches]
        loss = torch.stack([output.loss for output in outputs]).sum()
        gradient_V = self.sum_over_ranks(torch.autograd.grad(loss, self.logit_V)[0])
        is_bad = len(self.steps) in self.bad_steps
        with torch.no_grad():
            self.logit_V -= 0 if is_bad else rate * gradient_V.float()
            self.logit_V *= math.nan if len(self.steps) == self.breaks_at else 1
        norms = {"psi": float(gradient_V.norm())}
        return StepResult(merged(outputs), {}, [], norms, skipped_because="the loss" if is_bad else "")

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], inputs: PairInputs) -> dict[str, Tensor]:
        return merged([self._output(batch, inputs) for batch in batches])

    @torch.no_grad()
    def reference_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        return [self._logprobs(batch) for batch in batches]

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return torch.stack(self._ranks.gather(self._rank, values.detach().double())).sum(0)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [max(column) for column in zip(*self._ranks.gather(self._rank, list(values)), strict=True)]

    def collective_seconds(self) -> float:
        return 0.0

    def peak_memory_bytes(self) -> int:
        return 1


class WatchedFeed(PreferenceFeed):
    """Keeps what references were asked for, and after how many steps."""

    def watch(self, engine: UnigramEngine) -> WatchedFeed:
        self.calls: list[tuple[str, str, int]] = []
        self._steps = engine.steps
        return self

    def compute_reference(self, name: str, prompt_ids: Sequence[int]) -> None:
        self.calls.append(("compute", name, len(self._steps)))
        super().compute_reference(name, prompt_ids)

    def load_reference(self, name: str, prompt_ids: Sequence[int]) -> None:
        self.calls.append(("load", name, len(self._steps)))
        super().load_reference(name, prompt_ids)


@dataclass
class ListRecorder(AsaRecorder):
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def event(self, name: str, /, **details: Any) -> None:
        self.events.append((name, details))

    def say(self, message: str) -> None:
        self.said.append(message)


@dataclass
class KeptCheckpoints:
    """In memory: the loop's state and the weights, by step."""

    engine: UnigramEngine
    every_steps: int
    disk_is_full: bool = False
    kept: dict[int, tuple[dict[str, Tensor], Tensor]] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.every_steps == 0

    def save(self, step: int, state: dict[str, Tensor]) -> bool:
        if not self.disk_is_full:
            self.kept[step] = copy.deepcopy((state, self.engine.logit_V.detach()))
        return not self.disk_is_full


@dataclass
class LocalRun:
    loop: UdasaLoop
    engine: UnigramEngine
    pairs: WatchedFeed
    recorder: ListRecorder
    checkpoints: KeptCheckpoints

    def train_rows(self) -> list[dict[str, float]]:
        return [row for row in self.recorder.rows if "udasa/loss" in row]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [details for event, details in self.recorder.events if event == name]

    def go_on_from(self, other: LocalRun, step: int) -> None:
        state, logit_V = copy.deepcopy(other.checkpoints.kept[step])
        self.engine.logit_V = logit_V.requires_grad_()
        self.loop.load_state_dict(step, state)


def local_run(
    folder: Path, *, ranks: Ranks | None = None, rank: int = 0, num_ranks: int = 1, num_pairs: int = NUM_PAIRS,
    every_steps: int = 1000, reference: Any = "stage_start", **curriculum: Any,
) -> LocalRun:
    settings = CurriculumConfig(**{**SETTINGS, **curriculum})
    engine = UnigramEngine(ranks or Ranks(1), rank)
    pairs = WatchedFeed(
        map(pair, range(num_pairs)), engine, folder, worlds.TABLES, row_length=ROW,
        pairs_per_step=settings.pairs_per_step, accumulation_steps=2, rank=rank, num_ranks=num_ranks,
    ).watch(engine)
    recorder, checkpoints = ListRecorder(), KeptCheckpoints(engine, every_steps)
    loop = UdasaLoop(
        stages=plan_curriculum({i: i % 3 for i in range(num_pairs)}, settings, seed=3, round_index=0),
        curriculum=settings, dpo=DpoConfig(reference=reference, kl_weight=0.25), max_skipped_steps=2,
        engine=engine, pairs=pairs, recorder=recorder, checkpoints=checkpoints, stop_code=lambda: 0,
    )
    return LocalRun(loop, engine, pairs, recorder, checkpoints)


def run_together(runs: Sequence[LocalRun]) -> list[int]:
    """Ranks, each in a thread of its own; their stop codes."""
    with ThreadPoolExecutor(len(runs)) as threads:
        return list(threads.map(lambda run: run.loop.run(), runs))

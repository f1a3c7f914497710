"""The real loop in one process: plain torch instead of DeepSpeed, the rollout engine called directly instead of Ray."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa_dist.asa.errors import RolloutsUnavailable
from asa_dist.asa.loop import AsaLoop
from asa_dist.asa.objective import StepInputs, StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.asa.trust import AlignmentState
from asa_dist.config import Config
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.runtime.engine import PARTS, parameter_groups
from asa_dist.runtime.model import PSI, AsaModel, named_parts
from asa_dist.runtime.theory import StepObserver
from tests.asa import worlds
from tests.distributed import tiny


class LocalEngine:
    """One device, one plain optimizer."""

    def __init__(self, model: AsaModel, config: Config):
        self.model = model
        self.bad_steps: set[int] = set()  # numbers of calls that end as a step does whose loss is not finite
        self.num_calls = 0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.optimizer))

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        result = StepResult({}, {}, [], dict.fromkeys(PARTS, 0.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rates[group["part"]]
        for batch in batches:
            output = self.model(batch=batch, inputs=inputs)
            output.loss.backward()
            for name, value in output.sums.items():
                result.sums[name] = result.sums.get(name, 0) + value
            result.maxima.update(output.maxima)
            result.terms.append(output.terms)
        self.num_calls += 1
        is_bad = self.num_calls in self.bad_steps
        if not is_bad:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return dataclasses.replace(result, skipped_because="the loss" if is_bad else "")

    def observed_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        def phi() -> list[Tensor]:
            return [parameter.detach() for parameter in self.model.evaluator.parameters()]

        observer = StepObserver(self.model, self.optimizer, 0, 1, phi, self.sum_over_ranks)
        return observer.watch(lambda: self.train_step(batches, inputs, learning_rates), batches)

    @torch.no_grad()
    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float:
        return float(self.model(batch=batch, inputs=inputs).loss)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values.detach().double().clone()

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def collective_seconds(self) -> float:
        return 0.0

    def peak_memory_bytes(self) -> int:
        return 1

    def generator_shards(self) -> list[Tensor]:
        return [parameter.detach().flatten() for part, _, parameter in named_parts(self.model) if part == PSI]


class LocalCorpus:
    def __init__(self, config: Config):
        self._num_batches = config.train.accumulation_steps
        self.rows_seen = 0

    def trained(self) -> None:
        self.rows_seen += 1

    def train_batches(self, step: int) -> list[MicroBatch]:
        return [tiny.corpus_part(batch) for batch in tiny.micro_batches(1, 0, self._num_batches)]

    def heldout_batches(self) -> list[MicroBatch]:
        return [tiny.corpus_part(tiny.micro_batches(1, 0, 1)[0])]

    def bigram_perplexity(self) -> float:
        return 50.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": torch.tensor(self.rows_seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rows_seen = int(state["rows"])


class LocalRollouts:
    """Serves whatever was published last, and keeps the order of calls."""

    def __init__(self, config: Config, model: AsaModel, folder: Path):
        model.lm.config.save_pretrained(folder)
        self._config, self._model = config, model
        self._engine = HfEngine(
            str(folder), config.model, SamplingConfig(config.rollout, config.seed, worlds.EOS), "cpu"
        )
        self.calls: list[tuple[str, int]] = []
        self.unavailable_from = math.inf  # step
        self.noise = 0.0  # standard deviation of what the engine makes of each weight

    def request(self, step: int) -> None:
        self.calls.append(("request", step))

    def publish(self, version: int) -> None:
        self.calls.append(("publish", version))
        noise = torch.Generator().manual_seed(0)
        self._engine.load(version, (
            (name, p.detach() + self.noise * torch.randn(p.shape, generator=noise))
            for part, name, p in named_parts(self._model) if part == PSI))

    def fall_back(self, reason: str) -> None:
        """Too late for what was published already."""
        self.calls.append(("fall_back", self._engine.version))
        self.noise = 0.0

    def take(self, step: int) -> list[RolloutGroup]:
        self.calls.append(("take", step))
        if step >= self.unavailable_from:
            raise RolloutsUnavailable("the workers are gone")
        rng, num_prompts = np.random.default_rng(step), self._config.rollout.prompts_per_step
        prompts = [
            Prompt(step * num_prompts + i, 0, rng.integers(1, worlds.VOCAB, 4).astype(np.int32))
            for i in range(num_prompts)
        ]
        answers = self._engine.generate(prompts)
        return [RolloutGroup(step, i, p, r) for i, (p, r) in enumerate(zip(prompts, answers, strict=True))]


@dataclass
class ListRecorder:
    rows: list[dict[str, float]] = field(default_factory=list)
    prompt_ids: list[list[int]] = field(default_factory=list)
    sampled_steps: list[int] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.messages.append(message)

    def event(self, name: str, /, **details: Any) -> None:
        self.events.append((name, details))

    def metrics(self, values: dict[str, float]) -> None:
        self.rows.append(values)

    def trained(self, step: int, prompt_ids: list[int], skipped: bool) -> None:
        self.prompt_ids.append(prompt_ids)

    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None:
        self.skipped_steps.append(step)

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None:
        self.sampled_steps.append(step)


@dataclass
class KeptCheckpoints:
    """In memory: the loop's state and the weights, by step."""

    model: AsaModel
    every_steps: int
    disk_is_full: bool = False
    kept: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.every_steps == 0

    def save(self, step: int, state: dict[str, Tensor]) -> bool:
        if not self.disk_is_full:
            self.kept[step] = copy.deepcopy((state, self.model.state_dict()))
        return not self.disk_is_full


@dataclass
class LocalRun:
    loop: AsaLoop
    engine: LocalEngine
    rollouts: LocalRollouts
    recorder: ListRecorder
    checkpoints: KeptCheckpoints


def local_run(config: Config, folder: Path) -> LocalRun:
    model = tiny.model(config)
    engine = LocalEngine(model, config)
    rollouts, recorder = LocalRollouts(config, model, folder), ListRecorder()
    checkpoints = KeptCheckpoints(model, config.checkpoint.every_steps)
    loop = AsaLoop(
        config=config, rank=0, num_ranks=1, device=torch.device("cpu"), tables=worlds.TABLES,
        state=AlignmentState(config.evaluator, config.model.architecture.hidden_size, model.vocab_size),
        engine=engine, corpus=LocalCorpus(config), rollouts=rollouts, recorder=recorder,
        rollout_engine="hf" if config.rollout.engine == "hf" else "vllm",
        checkpoints=checkpoints, learning_rates=lambda step: dict.fromkeys(PARTS, 1e-3), stop_code=lambda: 0,
    )
    return LocalRun(loop, engine, rollouts, recorder, checkpoints)

"""The loop's collaborators that join parts of the system: rollouts, engine, checkpoints, under one watchdog."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from asa_dist.asa.errors import RolloutsUnavailable
from asa_dist.asa.objective import StepInputs, StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.config import CheckpointConfig, OptimizerConfig, RolloutConfig, TrainConfig
from asa_dist.records import LedgerSnapshot, Prompt, RolloutGroup
from asa_dist.rollout.calls import RolloutTimeout
from asa_dist.rollout.client import RolloutClient
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.snapshot import dump_snapshot, load_snapshot
from asa_dist.rollout.spans import begin_recording, end_recording
from asa_dist.rollout.system import RolloutSystem
from asa_dist.runtime.checkpoint import Checkpointer
from asa_dist.runtime.data.prompts import PromptStream
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.metrics import RunRecorder, SilentRecorder
from asa_dist.runtime.step_trace import RankTrace, write_trace
from asa_dist.runtime.stopping import StopRequests
from asa_dist.runtime.trunk import TrunkModel
from asa_dist.runtime.watchdog import Watchdog
from asa_dist.udasa.objective import PairInputs

# Of what a single collective or wait may take: whoever can raise a readable error by itself comes first.
PATIENCE = 1.5


class RolloutFeed:
    """The loop's view of rollouts: rank 0 hands in prompts, every rank takes its groups and publishes its shard.

    ``prompts`` and ``system`` are rank 0's.

    After the first failure nothing of Ray is touched any more: a process that talks to a dead Ray may be ended by it.
    """

    def __init__(
        self, client: RolloutClient, prompts: PromptStream | None, rollout: RolloutConfig, engine: TrainEngine,
        watchdog: Watchdog, system: RolloutSystem | None = None,
    ):
        self._client, self._prompts, self._engine, self._watchdog = client, prompts, engine, watchdog
        self._per_step, self._is_shared = rollout.prompts_per_step, rollout.placement == "shared"
        # publishing, taking, publishing again, the coordinator's state
        self._timeout_seconds = 4 * rollout.timeout_seconds
        self._system = system
        self._problem = ""

    def request(self, step: int) -> None:
        if self._prompts is not None:
            self._attempt(lambda: self._client.submit_prompts(step, self._prompts_of(step)))

    def _prompts_of(self, step: int) -> list[Prompt]:
        assert self._prompts is not None
        return [self._prompts.prompt(step * self._per_step + index) for index in range(self._per_step)]

    def take(self, step: int) -> list[RolloutGroup]:
        groups: list[RolloutGroup] = []
        if self._is_shared:
            torch.cuda.empty_cache()  # for the workers that wake now; does nothing on a CPU
        self._attempt(lambda: groups.extend(self._client.take(step)))
        if self._problem:
            raise RolloutsUnavailable(self._problem)
        return groups

    def publish(self, version: int) -> None:
        self._attempt(lambda: self._client.publish(version, self._engine.generator_shards()))

    def fall_back(self, reason: str) -> None:
        """Rank 0: from now on workers decode with the trainer's own model; the reason is for their events."""
        if (system := self._system) is not None:
            self._attempt(lambda: system.fall_back(reason))

    def snapshot(self) -> bytes | None:
        """Rank 0: queue and ledger; None if there are no rollouts any more: then they are generated again."""
        kept: list[LedgerSnapshot] = []
        if self._prompts is not None:
            self._attempt(lambda: kept.append(self._client.snapshot()))
        return dump_snapshot(kept[0]) if kept else None

    def restore(self, snapshot: bytes | None, next_step: int) -> None:
        """Rank 0, before the first request: what had been generated already need not be generated again."""
        if self._prompts is not None and snapshot is not None:
            self._attempt(lambda: self._client.restore(load_snapshot(snapshot), next_step))

    def _attempt(self, action: Callable[[], object]) -> None:
        """Keeps the first failure for ``take`` to raise: there all ranks are told, and none is left waiting."""
        if self._problem:
            return
        try:
            with self._watchdog.phase("talking to the coordinator", self._timeout_seconds):
                action()
        except (RolloutFailure, RolloutTimeout) as error:
            self._problem = str(error)
            if isinstance(error, RolloutTimeout):
                self._watchdog.dump(self._problem, error)
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
            self._watchdog.dump(self._problem, error)


class PeriodicCheckpoints:
    """When a checkpoint is written, and what of the rollouts, if there are any, belongs into it."""

    def __init__(
        self, checkpointer: Checkpointer, config: CheckpointConfig, rollouts: RolloutFeed | None,
        recorder: RunRecorder | SilentRecorder, stopping: StopRequests, watchdog: Watchdog, first_step: int,
    ):
        self._checkpointer, self._config, self._rollouts = checkpointer, config, rollouts
        self._recorder, self._stopping, self._watchdog = recorder, stopping, watchdog
        self._due_step = self._next_due(first_step)

    def is_due(self, step: int) -> bool:
        return step >= self._due_step

    def save(self, step: int, state: dict[str, Tensor]) -> bool:
        """A collective. After a failure it is due again soon."""
        timeout_seconds = PATIENCE * self._config.timeout_seconds
        with self._watchdog.phase(f"writing the checkpoint of step {step}", timeout_seconds):
            # what ends this process may have ended Ray already: queued groups are then generated again
            rollouts = None if self._rollouts is None or self._stopping.by_signal else self._rollouts.snapshot()
            result = self._checkpointer.save(step, state, rollouts, before_commit=self._recorder.sync)
        if result.ok:
            self._recorder.event("checkpoint", step=step, seconds=round(result.seconds, 3), bytes=result.num_bytes)
            if result.reason:
                self._recorder.say(f"asa: warning: the checkpoint of step {step} is written, but: {result.reason}")
            self._due_step = self._next_due(step)
        else:
            self._recorder.event("checkpoint_failed", step=step, reason=result.reason)
            self._recorder.say(f"asa: warning: the checkpoint of step {step} could not be written: {result.reason}")
            self._due_step = step + max(1, self._config.every_steps // 10)
        return result.ok

    def _next_due(self, step: int) -> int:
        """The next multiple of ``every_steps``."""
        return (step // self._config.every_steps + 1) * self._config.every_steps


class StepProfiler:
    """Records steps ``first`` to ``last``, counted from 1: ranks and workers, in one profile/trace.json.gz.

    A run that goes on after ``first`` was begun records nothing.
    """

    def __init__(
        self, run_dir: Path, first: int, last: int, engine: TrainEngine, recorder: RunRecorder | SilentRecorder
    ):
        self._folder, self._first, self._last = run_dir / "profile", first, last
        self._engine, self._recorder, self._placement = engine, recorder, engine.placement
        self._trace: RankTrace | None = None
        self._start_ns = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._placement.rank == 0:
            end_recording(self._folder)  # what a run that was killed has left

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step. A collective after the last one."""
        if step == self._first:
            self._trace = RankTrace(self._placement.rank, self._placement.device.type == "cuda")
            self._trace.start()
            self._start_ns = time.time_ns()
            if self._placement.rank == 0:
                self._begin_recording()
        if self._trace is None:
            yield
            return
        with self._trace.step(step):
            yield
        if step == self._last:
            self._write(self._trace)
            self._trace = None

    def _begin_recording(self) -> None:
        try:
            begin_recording(self._folder)
        except OSError as error:  # a full disk: not worth a run
            self._recorder.say(f"asa: warning: {self._folder}: workers are not recorded: {error}")

    def _write(self, trace: RankTrace) -> None:
        """Every rank its part, then rank 0 all of them. What cannot be written costs the trace, not the run."""
        path, problem = self._folder / "trace.json.gz", ""
        try:
            trace.write(self._part(self._placement.rank))
        except (OSError, ValueError, RuntimeError) as error:  # a full disk truncates what the profiler writes, silently
            problem = str(error)
        failed = any(self._engine.max_over_ranks([bool(problem)]))
        if self._placement.rank > 0:
            return
        parts = [self._part(rank) for rank in range(self._placement.num_ranks)]
        try:
            if failed:
                raise OSError(problem or "another rank could not write its part")
            write_trace(parts, end_recording(self._folder), self._start_ns, path)
            self._recorder.say(f"asa: steps {self._first} to {self._last} are in {path}: open it in ui.perfetto.dev")
        except OSError as error:
            self._recorder.say(f"asa: warning: {path} could not be written: {error}")
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def _part(self, rank: int) -> Path:
        return self._folder / f"part-rank-{rank}.json"

    def close(self) -> None:
        """Workers record no longer."""
        if self._placement.rank == 0:
            end_recording(self._folder)


class WatchedEngine(TrainEngine):
    """The engine under a watchdog: a collective may hang in native code without any error (a GPU waits for ever)."""

    def __init__(
        self, model: TrunkModel, train: TrainConfig, optimizer: OptimizerConfig, dtype: str, placement: Placement,
        watchdog: Watchdog,
    ):
        super().__init__(model, train, optimizer, dtype, placement)
        self._timeout_seconds = PATIENCE * train.collective_timeout_seconds
        self._watchdog = watchdog

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs | PairInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        with self._watchdog.phase("training on a step", self._timeout_seconds):
            return super().train_step(batches, inputs, learning_rates)

    def observed_step(
        self, batches: Sequence[MicroBatch], inputs: StepInputs, learning_rates: Mapping[str, float]
    ) -> StepResult:
        with self._watchdog.phase("training on a step and observing it", 2 * self._timeout_seconds):
            return super().observed_step(batches, inputs, learning_rates)

    def corpus_loss(self, batch: MicroBatch, inputs: StepInputs) -> float:
        with self._watchdog.phase("evaluating held-out rows", self._timeout_seconds):
            return super().corpus_loss(batch, inputs)

    def evaluate(self, batches: Sequence[MicroBatch], inputs: PairInputs) -> dict[str, Tensor]:
        with self._watchdog.phase("evaluating held-out pairs", len(batches) * self._timeout_seconds):
            return super().evaluate(batches, inputs)

    def reference_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        with self._watchdog.phase("computing the reference's log-probabilities", len(batches) * self._timeout_seconds):
            return super().reference_logprobs(batches)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        with self._watchdog.phase("summing over ranks", self._timeout_seconds):
            return super().sum_over_ranks(values)

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        with self._watchdog.phase("comparing with other ranks", self._timeout_seconds):
            return super().max_over_ranks(values)

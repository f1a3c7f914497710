"""What every training loop does alike: count its steps, skip one that is not finite, agree to stop, save.

Between two steps every rank stands at the same place, so there a run is saved, stopped and resumed. What one rank finds
(its stop code, a number that is not finite) all ranks learn from a collective, and then do the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from asa_dist.asa.errors import TrainingError
from asa_dist.asa.objective import StepResult


class StepEngine(Protocol):
    """The collectives of the sharded model (runtime/engine.py)."""

    def sum_over_ranks(self, values: Tensor) -> Tensor: ...
    def max_over_ranks(self, values: Sequence[float]) -> list[float]: ...
    def peak_memory_bytes(self) -> int: ...


class StepRecorder(Protocol):
    """Where results go."""

    def metrics(self, values: dict[str, float]) -> None: ...
    def trained(self, step: int, prompt_ids: list[int], skipped: bool) -> None: ...
    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None: ...


class Checkpoints(Protocol):
    """Where a run can go on from. ``save`` is a collective; False: it could not be written, the one before stands."""

    def is_due(self, step: int) -> bool: ...
    def save(self, step: int, state: dict[str, Tensor]) -> bool: ...


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The values of a loop's ``state_dict`` whose names begin with ``part`` and a dot, without that beginning."""
    return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}


def of_another_version(finished: int, difference: str) -> TrainingError:
    """For a loop's ``load_state_dict``, of a checkpoint after ``finished`` steps that it cannot go on from."""
    return TrainingError(f"the checkpoint after {finished} steps is of another version of asa-dist: {difference}")


def require_usable(heldout_loss: float) -> None:
    """Raises TrainingError if it is not finite; it is the same on every rank."""
    if not math.isfinite(heldout_loss):
        raise TrainingError(f"the held-out loss is {heldout_loss}: the weights are not usable any more")


@dataclass(kw_only=True)
class SteppedLoop:
    """One rank's loop over optimizer steps; a method's own loop says what a step is."""

    engine: StepEngine
    recorder: StepRecorder
    checkpoints: Checkpoints
    stop_code: Callable[[], int]  # 0: go on; else why to stop; the largest of all ranks counts
    finished: int = 0  # steps, skipped ones too
    saved: int = 0  # steps of the newest checkpoint
    counters: dict[str, float] = field(default_factory=dict)  # since the first step
    skipped_in_a_row: int = 0

    # --- one step -----------------------------------------------------------------------------------------------
    def _sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat sums over ranks, float64: one collective."""
        names = sorted(values)
        flat = torch.cat([values[name].double().flatten() for name in names])
        sums = self.engine.sum_over_ranks(flat).split([values[name].numel() for name in names])
        return dict(zip(names, sums, strict=True))

    def _maxima(self, values: Mapping[str, Tensor]) -> tuple[dict[str, float], int]:
        """Maxima over ranks, with the peak memory; and the stop code: one collective."""
        *maxima, peak_bytes, stop = self.engine.max_over_ranks(
            [*map(float, values.values()), self.engine.peak_memory_bytes(), self.stop_code()]
        )
        return dict(zip(values, maxima, strict=True)) | {"memory/peak_bytes": peak_bytes}, int(stop)

    def _record(
        self, result: StepResult, prompt_ids: list[int], tokens: Mapping[str, float], max_skipped_steps: int
    ) -> bool:
        """Counts the step just finished, with its tokens by counter; whether it made an update.

        Raises:
            TrainingError: too many in a row made none; as the last good update left everything is in a checkpoint.
        """
        is_skipped = bool(result.skipped_because)
        for name, number in {**tokens, "train/skipped_steps": is_skipped}.items():
            self.counters[name] += number
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        self.recorder.trained(self.finished, prompt_ids, skipped=is_skipped)
        if is_skipped:
            self.recorder.skipped(self.finished, result.skipped_because, result.skipped_prompt_ids)
            self.recorder.metrics({"step": self.finished, **self.counters})
        if self.skipped_in_a_row >= max_skipped_steps:
            self._save()
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row, the last one step {self.finished}, were skipped "
                f"(train.max_skipped_steps). {result.skipped_because}; all prompts of the last one: {prompt_ids}"
            )
        return not is_skipped

    @staticmethod
    def _speed_and_size(
        result: StepResult, rates: Mapping[str, float], step_seconds: float, num_tokens: float
    ) -> dict[str, float]:
        """Metrics of every step's update, whatever it was made for."""
        return {
            **{f"lr/{part}": rate for part, rate in rates.items()},
            **{f"grad_norm/{part}": norm for part, norm in result.gradient_norms.items()},
            "time/step_seconds": step_seconds,
            "perf/tokens_per_second": num_tokens / step_seconds,
        }

    @staticmethod
    def _timed(action: Callable[[], object]) -> float:
        started = time.monotonic()
        action()
        return time.monotonic() - started

    # --- between two steps --------------------------------------------------------------------------------------
    def _agreed_stop_code(self) -> int:
        return int(self.engine.max_over_ranks([self.stop_code()])[0])

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

    def _save_if_due(self) -> None:
        if self.checkpoints.is_due(self.finished):
            self._save()

    def _save_last(self) -> None:
        if not self._save():
            raise TrainingError(f"the last checkpoint, after {self.finished} steps, could not be written")

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step needs beside the model; the same on every rank. A collective."""
        return {f"counters.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.counters.items()}

    def load_state_dict(self, finished: int, state: dict[str, Tensor]) -> None:
        """Goes on after ``finished`` steps, with what :meth:`state_dict` gave then.

        Raises:
            TrainingError: what another version of this loop gave.
        """
        self.finished = self.saved = finished
        self.counters = {name: float(value) for name, value in part_of(state, "counters").items()}

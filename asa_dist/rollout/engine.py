"""What every rollout engine is: a plain object that holds one version of the weights and continues prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from asa_dist.config import RolloutConfig
from asa_dist.records import Prompt, Response

NO_VERSION = -1  # an engine into which nothing has been loaded


class WeightLoadError(Exception):
    """Tensors that do not fit the engine's model; the weights served so far are untouched."""


@dataclass(frozen=True)
class SamplingConfig:
    """How every engine samples: the ``rollout`` section, the run's seed and the end-of-text token."""

    rollout: RolloutConfig
    seed: int
    eos_token_id: int


class Engine(Protocol):
    """One model that samples. Not thread-safe: ``load`` and ``generate`` are called in turn by one worker."""

    version: int
    """Policy version of the weights that ``generate`` uses; ``NO_VERSION`` before the first load."""

    def load(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights. Names, shapes and dtypes are those of ``model.named_parameters()``: tied ones once.

        Raises:
            WeightLoadError: a missing, unknown or repeated name, a wrong shape or dtype; nothing was changed.
        """

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        """Samples G responses to each prompt, in order; a function of (weights, ``prompts`` as a bundle, seed)."""

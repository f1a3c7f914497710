"""What every rollout engine is: a plain object that holds one version of the weights and continues prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from asa_dist.config import RolloutConfig
from asa_dist.records import Prompt, Response

NO_VERSION = -1  # an engine into which nothing has been loaded


class WeightLoadError(Exception):
    """Tensors that do not fit the engine's model; the weights served so far are untouched."""


class EngineStartError(Exception):
    """An engine that cannot be built on this machine; says what is missing and what to do."""


@dataclass(frozen=True)
class SamplingConfig:
    """How every engine samples: the ``rollout`` section, the run's seed and the end-of-text token."""

    rollout: RolloutConfig
    seed: int
    eos_token_id: int


class Engine(Protocol):
    """One model that samples. Not thread-safe: one worker calls its methods in turn.

    begin(a)   begin(b)   advance()   load(v + 1)   advance()   begin(c)   advance() …
                          └ a is finished            └ b: what it had sampled stays, the rest comes from v + 1
    """

    @property
    def version(self) -> int:
        """Policy version of the weights that it samples with; ``NO_VERSION`` before the first load, and asleep."""

    @property
    def has_room(self) -> bool:
        """Whether another bundle would be worked on at once, at least in part."""

    def load(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights. Names, shapes and dtypes are those of ``model.named_parameters()``: tied ones once.

        Responses that are under way keep their tokens and go on with the new weights, nothing cached of older ones:
        their ``spans`` say which token is whose.

        Raises:
            WeightLoadError: a missing, unknown or repeated name, a wrong shape or dtype; nothing was changed.
        """

    def begin(self, bundle_id: int, prompts: Sequence[Prompt]) -> None:
        """G responses to each prompt are to be sampled; the id is of none that is still under way."""

    def advance(self) -> list[tuple[int, list[tuple[Response, ...]]]]:
        """Samples for a while; the bundles that are finished now: their ids, and the responses in order of prompts."""

    def drop(self) -> None:
        """Forgets all bundles that are under way."""

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        """G responses to each prompt, in order, while no bundle is under way.

        A function of (weights, ``prompts``, seed).
        """

    def sleep(self) -> None:
        """Between bundles: weights and caches leave the GPU, until the next :meth:`load`."""


class BundleEngine:
    """Half of an :class:`Engine` that answers a whole bundle in one call of ``generate``."""

    _waiting: tuple[int, Sequence[Prompt]] | None = None

    @property
    def has_room(self) -> bool:
        return self._waiting is None

    def begin(self, bundle_id: int, prompts: Sequence[Prompt]) -> None:
        self._waiting = bundle_id, prompts

    def advance(self) -> list[tuple[int, list[tuple[Response, ...]]]]:
        assert self._waiting is not None
        bundle_id, prompts = self._waiting
        self._waiting = None
        return [(bundle_id, self.generate(prompts))]

    def drop(self) -> None:
        self._waiting = None

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        raise NotImplementedError


def fitting_weights(
    version: int, tensors: Iterable[tuple[str, Tensor]], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All of a version's tensors by name, read to the end before any engine changes.

    Args:
        parameters: the model's own, on any device ("meta" too), of which each version brings every one once.

    Raises:
        WeightLoadError: a missing, unknown or repeated name, a wrong shape or dtype.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in parameters:
            raise WeightLoadError(f"version {version}: the model has no parameter {name!r}")
        if name in found:
            raise WeightLoadError(f"version {version}: parameter {name!r} arrived twice")
        own = parameters[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise WeightLoadError(f"version {version}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the model "
                                  f"has {own.dtype} {tuple(own.shape)}")
        found[name] = tensor
    if missing := [name for name in parameters if name not in found]:
        raise WeightLoadError(f"version {version}: {len(missing)} of {len(parameters)} parameters are missing: "
                              f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}")
    return found

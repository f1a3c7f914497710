"""Where the wall time of one step goes on this rank. Its parts add up to it: computing is what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch.profiler import record_function

Part = Literal["data", "wait_rollout", "publish"]
PARTS: tuple[Part, ...] = ("data", "wait_rollout", "publish")


class StepTime:
    """Runs from its making; a collective within a part counts as that part, any other as collective.

    Args:
        collective_seconds: how long this rank has been blocked in collectives, since whenever.
        parts: those of the method's steps.
        clock: in seconds.
    """

    def __init__(
        self, collective_seconds: Callable[[], float], parts: tuple[Part, ...] = PARTS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._collective_seconds, self._clock = collective_seconds, clock
        self._seconds: dict[str, float] = dict.fromkeys(parts, 0.0)
        self._started, self._collective_before = clock(), collective_seconds()

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        started, before = self._clock(), self._collective_seconds()
        with record_function(name):  # in traces, too
            yield
        self._seconds[name] += self._clock() - started
        self._collective_before += self._collective_seconds() - before

    def metrics(self) -> dict[str, float]:
        """The step until now, and its parts."""
        step_seconds = self._clock() - self._started
        parts = self._seconds | {"collective": self._collective_seconds() - self._collective_before}
        parts["compute"] = step_seconds - sum(parts.values())
        return {"time/step_seconds": step_seconds} | {f"time/{name}_seconds": value for name, value in parts.items()}


def timed_evaluation(evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What it returns, and how long it took: no part of any step."""
    started = time.monotonic()
    return {**evaluate(), "time/evaluation_seconds": time.monotonic() - started}

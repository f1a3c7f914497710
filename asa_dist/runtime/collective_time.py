"""How long this process is blocked in collectives, ZeRO's and our own: all of them pass DeepSpeed's backend.

On a CPU that is communication and waiting for slower ranks. On a GPU a collective returns once it is launched: what it
takes shows up where the process next waits for the device, as computing.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

COLLECTIVES = (
    "all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)  # fmt: skip


class CollectiveTime:
    """Counts from its making to ``close``, in the thread that made it: time in other threads blocks no step.

    Args:
        backend: ``deepspeed.comm.comm.cdb``; its collectives are replaced by ones that are timed.
    """

    def __init__(self, backend: Any):
        self.seconds = 0.0
        self._thread, self._is_counting = threading.get_ident(), False
        self._backend = backend
        self._replaced = {name: getattr(backend, name) for name in COLLECTIVES if hasattr(backend, name)}
        for name, collective in self._replaced.items():
            setattr(backend, name, self._timed(collective))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._is_counting or threading.get_ident() != self._thread:  # the outermost one counts
                return function(*arguments, **named)
            self._is_counting, started = True, time.monotonic()
            try:
                result = function(*arguments, **named)
            finally:
                self.seconds += time.monotonic() - started
                self._is_counting = False
            return _TimedHandle(result, self._timed(result.wait)) if hasattr(result, "wait") else result

        return timed

    def close(self) -> None:
        """Gives the backend its own collectives back."""
        for name, collective in self._replaced.items():
            setattr(self._backend, name, collective)


class _TimedHandle:
    """Of a collective under way; waiting for it is where an asynchronous one blocks."""

    def __init__(self, handle: Any, wait: Callable[..., Any]):
        self._handle, self.wait = handle, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

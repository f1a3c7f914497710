"""Every wait has a deadline: a thread that ends this process, with a word and all its stacks, when one has passed.

Collectives, Ray calls and files have time-outs of their own, which are raised as errors. This is for what they miss: a
lock, a native call, a library that never returns.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # beyond a deadline, until the watchdog's own thread counts as unable to run
LONGEST_TIMER_SECONDS = 1e6
STDERR = 2  # the descriptor: whatever stands in sys.stderr
EXIT_FAILED = 1


@dataclass(frozen=True)
class _Phase:
    name: str
    hint: str
    started: float  # time.monotonic()
    timeout_seconds: float

    @property
    def left_seconds(self) -> float:
        return self.started + self.timeout_seconds - time.monotonic()


class Watchdog:
    """Watches this process's phases.

        with Watchdog(run_dir, rank) as watchdog:
            with watchdog.phase("waiting for the rollouts of step 5", timeout_seconds=600):
                ...

    A phase that outlives its deadline ends the process with exit code 1: one message on stderr, the stacks of all
    threads in RUN/stacks/rank-N.txt. Phases may be nested and come from several threads; each keeps its own deadline.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._stacks = run_dir / "stacks" / f"rank-{rank}.txt"
        self._who = f"rank {rank} on {socket.gethostname()}"
        self._open: dict[object, _Phase] = {}  # outermost first
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str, timeout_seconds: float, hint: str = "") -> Iterator[None]:
        """Names what this process does now, and how long it may take; costs microseconds.

        An error that leaves the innermost phase gets its name as a note (``__notes__``).

        Args:
            hint: where to look when the deadline has passed.
        """
        key = object()
        with self._lock:
            self._open[key] = _Phase(name, hint, time.monotonic(), timeout_seconds)
        try:
            yield
        except Exception as error:
            if not getattr(error, "__notes__", None):
                error.add_note(f"while {name}")
            raise
        finally:
            with self._lock:
                del self._open[key]

    def dump(self, reason: str, error: BaseException | None = None) -> Path | None:
        """Adds the stacks of all threads to RUN/stacks/rank-N.txt; its path, or None if it cannot be written.

        What cannot be written goes to stderr.

        Args:
            error: of a deadline that was raised elsewhere: its traceback says where this thread had waited.
        """
        header = f"{datetime.now(UTC).isoformat(timespec='seconds')} {self._who}, pid {os.getpid()}: {reason}\n"
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(header)
                if error is not None:
                    file.write("".join(traceback.format_exception(error)) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            print(f"asa: {self._stacks}: {error.strerror}; the stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(STDERR, all_threads=True)
            return None
        return self._stacks

    def stop(self) -> None:
        """Watches no longer."""
        self._stopping.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            with self._lock:
                phases = list(self._open.values())
            next_due = min(phases, key=lambda phase: phase.left_seconds, default=None)
            if next_due is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            if next_due.left_seconds <= 0:
                self._end_process(next_due, phases)
            # native code that hangs with the interpreter's lock would stop this thread too: a timer without Python
            timer_seconds = min(max(0.0, next_due.left_seconds) + GRACE_SECONDS, LONGEST_TIMER_SECONDS)
            faulthandler.dump_traceback_later(timer_seconds, exit=True, file=STDERR)
        faulthandler.cancel_dump_traceback_later()

    def _end_process(self, phase: _Phase, phases: list[_Phase]) -> None:
        """Says why and exits without clean-up, which might wait for the same thing."""
        try:
            lasted_seconds = time.monotonic() - phase.started
            inner = [other.name for other in phases if other.started > phase.started]
            what = f"{phase.name!r}" + (f" (now in {inner[-1]!r})" if inner else "")
            what += f" has lasted {lasted_seconds:.1f} s, its deadline is {phase.timeout_seconds:g} s"
            stacks = self.dump(what)
            where = f"what every thread was doing: {stacks}" if stacks else "stacks above"
            hint = f"; {phase.hint}" if phase.hint else ""
            with suppress(OSError, ValueError):  # stderr may be gone
                print(f"asa: {self._who}: {what}; {where}{hint}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_FAILED)

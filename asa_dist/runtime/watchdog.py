"""Every wait has a deadline: a thread that ends this process, with a word and all its stacks, when one has passed.

Collectives, Ray calls and files have time-outs of their own, which are raised as errors. This is for what they miss: a
lock, a native call, a library that never returns.

    a phase opens ──► its deadline ── + 0.5 s ──► the watchdog's thread: a message, all stacks, exit
                           └───────── + 5 s ────► a timer without Python, for native code that holds the interpreter's
                                                  lock: all stacks, exit
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
from typing import BinaryIO, Self

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0  # beyond a deadline, until the watchdog's own thread counts as unable to run
STDERR = 2  # the descriptor: whatever stands in sys.stderr
EXIT_FAILED = 1


@dataclass(frozen=True)
class _Phase:
    name: str
    started: float  # time.monotonic()
    timeout_seconds: float

    @property
    def deadline(self) -> float:
        return self.started + self.timeout_seconds


class Watchdog:
    """Watches this process's phases.

        with Watchdog(run_dir, rank) as watchdog:
            with watchdog.phase("waiting for the rollouts of step 5", timeout_seconds=600):
                ...

    A phase that outlives its deadline ends the process with exit code 1: one message on stderr, the stacks of all
    threads in RUN/stacks/rank-N.txt. Phases may be nested and come from several threads; each keeps its own deadline.
    A process has one watchdog: the interpreter has one such timer.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._stacks = run_dir / "stacks" / f"rank-{rank}.txt"
        self._file = _appendable(self._stacks)  # open all the time: the timer can only write to what is
        self._who = f"rank {rank} on {socket.gethostname()}"
        self._open: dict[object, _Phase] = {}  # outermost first
        self._timer_deadline: float | None = None  # what the timer is set for
        self._lock = threading.Lock()  # of both
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str, timeout_seconds: float) -> Iterator[None]:
        """Names what this process does now, and how long it may take; costs some 20 µs.

        An error that leaves the innermost phase gets its name as a note (``__notes__``).
        """
        key = object()
        with self._lock:
            self._open[key] = _Phase(name, time.monotonic(), timeout_seconds)
            self._set_timer()
        try:
            yield
        except Exception as error:
            if not getattr(error, "__notes__", None):
                error.add_note(f"while {name}")
            raise
        finally:
            with self._lock:
                del self._open[key]
                self._set_timer()

    def dump(self, reason: str, error: BaseException | None = None) -> Path | None:
        """Adds the stacks of all threads to RUN/stacks/rank-N.txt; its path, or None if it cannot be written.

        What cannot be written goes to stderr.

        Args:
            error: of a deadline that was raised elsewhere: its traceback says where this thread had waited.
        """
        text = f"{datetime.now(UTC).isoformat(timespec='seconds')} {self._who}, pid {os.getpid()}: {reason}\n"
        if error is not None:
            text += "".join(traceback.format_exception(error)) + "\n"
        if self._file is not None:
            with suppress(OSError):  # the disk may be full
                self._file.write(text.encode())
                faulthandler.dump_traceback(self._file, all_threads=True)
                self._file.write(b"\n")
                return self._stacks
        with suppress(OSError, ValueError):  # stderr may be gone
            print(f"asa: {self._stacks} cannot be written; the stacks: {text}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(STDERR, all_threads=True)
        return None

    def stop(self) -> None:
        """Watches no longer; leaves no trace in the run folder if no stacks were dumped."""
        self._stopping.set()
        self._thread.join()
        with self._lock:
            self._set_timer()
        if self._file is not None:
            is_empty = self._file.tell() == 0
            self._file.close()
            with suppress(OSError):  # the folder may hold the stacks of others
                if is_empty:
                    self._stacks.unlink()
                    self._stacks.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            with self._lock:
                phases = list(self._open.values())
            next_due = min(phases, key=lambda phase: phase.deadline, default=None)
            if next_due is not None and next_due.deadline <= time.monotonic():
                self._end_process(next_due, phases)

    def _set_timer(self) -> None:
        """For the earliest deadline; none after :meth:`stop`. Under the lock."""
        phases = [] if self._stopping.is_set() else self._open.values()
        deadline = min((phase.deadline for phase in phases), default=None)
        if deadline == self._timer_deadline:
            return
        self._timer_deadline = deadline
        if deadline is None:
            faulthandler.cancel_dump_traceback_later()
            return
        seconds = min(max(0.0, deadline - time.monotonic()) + GRACE_SECONDS, threading.TIMEOUT_MAX)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file or STDERR)

    def _end_process(self, phase: _Phase, phases: list[_Phase]) -> None:
        """Says why and exits without clean-up, which might wait for the same thing."""
        try:
            lasted_seconds = time.monotonic() - phase.started
            inner = [other.name for other in phases if other.started > phase.started]
            what = f"{phase.name!r}" + (f" (now in {inner[-1]!r})" if inner else "")
            what += f" has lasted {lasted_seconds:.1f} s, its deadline is {phase.timeout_seconds:g} s"
            stacks = self.dump(what)
            where = f"what every thread was doing: {stacks}" if stacks else "stacks above"
            with suppress(OSError, ValueError):  # stderr may be gone
                print(f"asa: {self._who}: {what}; {where}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_FAILED)


def _appendable(path: Path) -> BinaryIO | None:
    """The file, unbuffered; None if it cannot be opened."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError:
        return None

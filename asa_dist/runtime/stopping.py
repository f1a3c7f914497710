"""How a run is asked to end early: the file RUN/stop, a signal to a rank, or the wall time.

All of them mean the same: finish the step, write a checkpoint, leave. They differ in the exit code that follows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

STOP_FILE = "stop"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GO_ON, ASKED, ENDED_EARLY = 0, 1, 2  # what StopRequests.code answers; the largest of all ranks counts
# exit codes; 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, queue me again; 76: a later start does the work, do not
EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_ENDED_EARLY, EXIT_TAKEN_OVER, EXIT_INTERRUPTED = 1, 2, 75, 76, 130


def ask_to_stop(run_dir: Path, by: str) -> None:
    """Leaves the request for rank 0. ``by``: who asks. Raises :class:`OSError` if the file cannot be made."""
    partial = run_dir / f".{STOP_FILE}.tmp"
    try:
        partial.write_text(by, encoding="utf-8")
        partial.replace(run_dir / STOP_FILE)
    except OSError:  # a full disk still has room for an empty file
        (run_dir / STOP_FILE).touch()


def forget_stop_request(run_dir: Path, started_at: float) -> None:
    """At the start of a run, so that the request which ended the last one does not end this one.

    One that was made while this run was starting stays, and ends it at its first step, with a checkpoint.

    Args:
        started_at: Unix time at which this run was started. Clocks of hosts differ, by less than preflight lets pass
            (5 s): so near to the start, a request from another host may be taken for the one or the other.
    """
    path = run_dir / STOP_FILE
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < started_at:
            path.unlink()


def tell(message: str) -> None:
    """A line on stderr from within a signal handler: `print` may not be entered twice, and a terminal may be gone."""
    newline = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # below a progress bar
    with contextlib.suppress(OSError):
        os.write(2, f"{newline}asa: {message}\n".encode())


class SignalCatcher:
    """As a context manager: sends STOP_SIGNALS to ``_on_signal`` as long as it lasts."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        raise NotImplementedError


class StopRequests(SignalCatcher):
    """One rank's ear for requests to end early. As a context manager: the signals are caught as long as it lasts.

    Keep it around *all* a rank does, its shutdown too: the launcher sends SIGTERM to the ranks that are still closing
    when the first one has left with a code other than 0.

    Args:
        run_dir: the run folder.
        rank: only rank 0 looks for the file and at the clock, and speaks.
        max_wall_time_minutes: `train.max_wall_time_minutes`; None = no limit.
        started: `time.monotonic()` when this process started.
    """

    def __init__(self, run_dir: Path, rank: int, max_wall_time_minutes: float | None, started: float) -> None:
        super().__init__()
        self._file = run_dir / STOP_FILE
        self._rank = rank
        self._max_wall_time_minutes = max_wall_time_minutes
        self._started = started
        self._signal: int | None = None  # the first one

    def _on_signal(self, number: int, frame: object) -> None:
        """Only takes note: whatever is going on goes on. Ctrl-C reaches a rank twice, from terminal and launcher."""
        if self._signal is None:
            self._signal = number
            if self._rank == 0:
                tell(f"{signal.Signals(number).name}: finishing the step and writing a checkpoint")

    def code(self) -> int:
        """GO_ON; ASKED: the run folder holds the file `stop`; ENDED_EARLY: a signal came, or the time is up."""
        if self._signal is not None or self._is_time_up():
            return ENDED_EARLY
        return ASKED if self._rank == 0 and self._file.exists() else GO_ON

    @property
    def by_signal(self) -> bool:
        """Whether this process is being ended from outside, and Ray perhaps with it."""
        return self._signal is not None

    def reason(self) -> str:
        """Why the run ends early, as far as this rank knows; for people."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._is_time_up():
            return f"train.max_wall_time_minutes = {self._max_wall_time_minutes:g}"
        try:
            return f"asked by {self._file.read_text(encoding='utf-8').strip() or 'the file stop'}"
        except OSError:
            return "a signal to another rank"

    def _is_time_up(self) -> bool:
        limit = self._max_wall_time_minutes
        return self._rank == 0 and limit is not None and time.monotonic() - self._started >= 60 * limit

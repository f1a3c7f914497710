"""The run folder's .jsonl files: appended to so that a full disk delays lines but never tears or loses them.

One JSON object per line; a line without its newline was torn by the end of its process, and counts as not written.
No torch here: ``asa inspect`` reads with it.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

STEP_LOGS = ("metrics", "samples", "trained")  # rows with "step", in order: a resumed run writes them anew
EVENT_LOG = "events"


class RunLog:
    """Appends to one file; may be used from several threads, but only one process."""

    def __init__(self, path: Path):
        """Opens or creates the file, and cuts a torn last line off.

        Raises:
            OSError: the file cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._num_bytes = _whole_lines_bytes(path)  # of the lines that are written
        self._is_torn = True  # whatever stands after them

    def append(self, row: dict[str, Any]) -> OSError | None:
        """Writes the row, after all that wait; it reaches the system before this returns.

        Returns:
            None, or why it waits in memory now, to be written by a later call.

        Raises:
            ValueError: the row holds what is no JSON (not a number, infinite).
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            self._pending.append(line)
            return self._write_pending()

    def sync(self) -> OSError | None:
        """Makes every row durable. None, or why it could not be done."""
        with self._lock:
            try:
                error = self._write_pending()
                if error is None:
                    os.fsync(self._file)
                return error
            except OSError as error:
                return error

    @property
    def num_pending(self) -> int:
        """Rows that wait in memory."""
        return len(self._pending)

    def close(self) -> None:
        with self._lock:
            os.close(self._file)

    def _write_pending(self) -> OSError | None:
        try:
            if self._is_torn:
                os.ftruncate(self._file, self._num_bytes)
                self._is_torn = False
            while self._pending:
                self._write_line(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            return error
        return None

    def _write_line(self, line: bytes) -> None:
        try:
            rest = line
            while rest:  # a disk that fills up takes a part
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._is_torn = True
            with suppress(OSError):  # else the next call does it
                os.ftruncate(self._file, self._num_bytes)
                self._is_torn = False
            raise
        self._num_bytes += len(line)


def _whole_lines_bytes(path: Path) -> int:
    """Size of the file up to and including its last newline."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _whole_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset of its end, row) of every whole line."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield end, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a .jsonl file, but a torn last one; none if there is no such file yet.

    Raises:
        ValueError: another line is damaged; names it.
    """
    if path.exists():
        yield from (row for _, row in _whole_rows(path))


def truncate_logs(run_dir: Path, step: int) -> None:
    """Before a run goes on after ``step`` steps: cuts off later rows and torn lines; of events only torn ones.

    Rows stand in the order of their steps, so that cutting a file short does it: it needs no room on a full disk, and
    if it is interrupted, the next time cuts at the same place.

    Raises:
        OSError: a file cannot be read or cut.
        ValueError: a line within a file is damaged; names it.
    """
    for name in STEP_LOGS:
        path = run_dir / f"{name}.jsonl"
        if path.exists():
            kept = itertools.takewhile(lambda place: place[1]["step"] <= step, _whole_rows(path))
            _cut(path, max((end for end, _ in kept), default=0))
    events = run_dir / f"{EVENT_LOG}.jsonl"
    if events.exists():
        _cut(events, _whole_lines_bytes(events))


def _cut(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(num_bytes)
        os.fsync(file.fileno())

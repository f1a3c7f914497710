"""The run folder's .jsonl files: appended to so that a full disk delays lines but never tears or loses them.

One JSON object per line; a line without its newline was torn by the end of its process, and counts as not written.
No torch here: ``asa inspect`` reads with it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asa_dist.runtime.checkpoint_files import sync_folder

STEP_LOGS = ("metrics", "samples", "trained")  # rows with "step", in order: a resumed run writes them anew
WITHOUT_GAPS = ("metrics", "trained")  # those of them with a row for every step
EVENT_LOG = "events"
UNREADABLE = "unreadable"  # what `read_events` calls a damaged line


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
        self._is_torn = os.fstat(self._file).st_size > self._num_bytes
        self._is_closed = False

    def append(self, row: dict[str, Any]) -> OSError | None:
        """Writes the row, after all that wait; it reaches the system before this returns. After ``close``: drops it.

        Returns:
            None, or why it waits in memory now, to be written by a later call.

        Raises:
            ValueError: the row holds what is no JSON (not a number, infinite).
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._is_closed:  # a thread was late; the descriptor may belong to another file by now
                return None
            self._pending.append(line)
            return self._write_pending()

    def sync(self) -> OSError | None:
        """Makes every row durable. None, or why it could not be done."""
        with self._lock:
            if self._is_closed:
                return None
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
            if not self._is_closed:
                self._is_closed = True
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


def event_row(name: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """A row of events.jsonl: what happened now."""
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **details}


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


def _rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """(number, offset of its end, row) of every whole line; None instead of the row: damaged."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, end, row if isinstance(row, dict) else None


def _damage(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}, line {number}: no JSON object")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a .jsonl file; none if there is no such file yet.

    What is torn or damaged at its end, as a loss of power leaves it, counts as not written.

    Raises:
        ValueError: a damaged line has sound ones after it; names it.
    """
    damaged = None  # the first such line
    for number, _, row in _rows(path) if path.exists() else ():
        if row is None:
            damaged = damaged or number
        elif damaged is not None:
            raise _damage(path, damaged)
        else:
            yield row


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every event; a damaged line is one, too: UNREADABLE, with its number. Nothing depends on them."""
    path = run_dir / f"{EVENT_LOG}.jsonl"
    for number, _, row in _rows(path) if path.exists() else ():
        yield {"event": UNREADABLE, "line": number} if row is None else row


def truncate_logs(run_dir: Path, step: int, work: Path) -> None:
    """Before a run goes on after ``step`` steps: cuts off later rows, and all that is damaged behind those needed.

    Of events, which stay, only torn lines. Rows stand in the order of their steps, so that cutting a file short does
    it; if it is interrupted, the next time cuts at the same place. The logs are new files then: an earlier start that
    still writes has the old ones open, and what it adds is nobody's.

    Args:
        work: folder in which they are made, this start's own (``ownership``).

    Raises:
        OSError: a file cannot be read, or there is no room for a copy; then no file has been cut.
        ValueError: a line that is needed is damaged; names it. Then no file has been cut.
    """
    sizes = {}
    for name in STEP_LOGS:
        path = run_dir / f"{name}.jsonl"
        if path.exists():
            sizes[path] = _needed_bytes(path, step, has_every_step=name in WITHOUT_GAPS)
    events = run_dir / f"{EVENT_LOG}.jsonl"
    if events.exists():
        sizes[events] = _whole_lines_bytes(events)
    for path, num_bytes in sizes.items():
        _copy(path, num_bytes, work / path.name)
    for path in sizes:
        (work / path.name).replace(path)
    sync_folder(run_dir)


def _needed_bytes(path: Path, step: int, has_every_step: bool) -> int:
    """Size of the file up to the end of the last row of a step up to ``step``."""
    num_bytes = reached = 0
    damaged = None  # the first such line
    for number, end, row in _rows(path):
        if row is None:
            damaged = damaged or number
        elif row["step"] > step:
            break
        elif damaged is not None:
            raise _damage(path, damaged)
        else:
            num_bytes, reached = end, row["step"]
    if damaged is not None and has_every_step and reached < step:
        raise _damage(path, damaged)
    return num_bytes


def _copy(path: Path, num_bytes: int, copy: Path) -> None:
    """Of the beginning of a file, durable."""
    shutil.copyfile(path, copy)
    with copy.open("r+b") as file:
        file.truncate(num_bytes)
        os.fsync(file.fileno())

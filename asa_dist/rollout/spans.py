"""What workers do and when, for a run's trace: a line per span in a file of each worker's, while rank 0 records."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

RECORDING = "recording"  # this file stands in the folder while spans are wanted
PREFIX = "spans-"


@dataclass(frozen=True)
class Span:
    """Wall-clock times, as other processes and hosts have them, too."""

    name: str
    start_ns: int
    end_ns: int
    lease_id: int | None = None  # of a lease, which may overlap with anything; None: the main thread's


class SpanLog:
    """One worker's; without a recording it only looks for one."""

    def __init__(self, folder: Path, worker_id: str):
        self._folder, self._path = folder, folder / f"{PREFIX}{worker_id}.jsonl"

    def add(self, name: str, start_ns: int, lease_id: int | None = None) -> None:
        """A span that ends now."""
        if not (self._folder / RECORDING).exists():
            return
        line = json.dumps(asdict(Span(name, start_ns, time.time_ns(), lease_id)))
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # it costs the span at most
            file.write(f"{line}\n")

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        start_ns = time.time_ns()
        yield
        self.add(name, start_ns)


def begin_recording(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    end_recording(folder)
    (folder / RECORDING).touch()


def end_recording(folder: Path) -> dict[str, list[Span]]:
    """Spans by worker; their files are gone then. A line that is not complete is left out."""
    (folder / RECORDING).unlink(missing_ok=True)
    found: dict[str, list[Span]] = {}
    for path in sorted(folder.glob(f"{PREFIX}*.jsonl")):
        spans = found.setdefault(path.stem.removeprefix(PREFIX), [])
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                spans.append(Span(**json.loads(line)))
        path.unlink(missing_ok=True)
    return found

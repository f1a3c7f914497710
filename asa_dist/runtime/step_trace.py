"""A few steps in the trace format that Perfetto and Chrome read: this rank's, and what becomes of all of them.

Every process has wall-clock times; those of one host agree, those of several as far as NTP makes them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class TimedSpan(Protocol):
    """Of a worker: rollout/spans.py."""

    @property
    def name(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def lease_id(self) -> int | None: ...


class RankTrace:
    """Of one rank, from ``start`` to ``write``."""

    def __init__(self, rank: int, on_cuda: bool):
        self._rank = rank
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        with record_function(f"step {step}"):
            yield

    def write(self, path: Path) -> None:
        """Stops, and writes events whose processes are named after the rank.

        Raises:
            OSError: it cannot be written.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
        events = [event for event in trace["traceEvents"] if isinstance(event.get("pid"), int)]
        names = {pid: self._name(pid) for pid in {event["pid"] for event in events}}
        kept = [event | {"pid": names[event["pid"]]} for event in events if not _names_a_process(event)]
        for event in kept:
            if "id" in event:
                event["id"] = f"{self._rank}-{event['id']}"  # arrows within a rank
        part = {"base_ns": trace.get("baseTimeNanoseconds", 0), "events": kept}
        path.write_text(json.dumps(part), encoding="utf-8")

    def _name(self, pid: int) -> str:
        return f"rank {self._rank}" if pid == os.getpid() else f"rank {self._rank}, GPU {pid}"


def _names_a_process(event: Mapping[str, Any]) -> bool:
    return event["ph"] == "M" and event["name"].startswith("process_")


def write_trace(
    parts: Sequence[Path], spans_by_worker: Mapping[str, Sequence[TimedSpan]], start_ns: int, path: Path
) -> None:
    """All processes on one time line that begins at ``start_ns``; workers' spans from then on.

    Raises:
        OSError: a part cannot be read, or the trace not written.
    """
    events: list[dict[str, Any]] = []
    for part in parts:
        found = json.loads(part.read_text(encoding="utf-8"))
        shift_us = (found["base_ns"] - start_ns) / 1000
        events += [event | {"ts": event["ts"] + shift_us} for event in found["events"]]
    for worker, spans in spans_by_worker.items():
        for span in spans:
            if span.end_ns > start_ns:
                events += _worker_events(worker, span, start_ns)
    numbers = {name: number for number, name in enumerate(sorted({event["pid"] for event in events}), start=1)}
    named = [
        {"ph": "M", "name": name, "pid": number, "args": arguments}
        for process, number in numbers.items()
        for name, arguments in (("process_name", {"name": process}), ("process_sort_index", {"sort_index": number}))
    ]
    trace = {
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": start_ns,
        "traceEvents": named + [event | {"pid": numbers[event["pid"]]} for event in events],
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    with gzip.open(unfinished, "wt", encoding="utf-8") as file:
        json.dump(trace, file)
    unfinished.replace(path)


def _worker_events(worker: str, span: TimedSpan, start_ns: int) -> list[dict[str, Any]]:
    """Leases overlap, so that each has a line of its own; what the main thread does is one line."""
    shared = {"name": span.name, "cat": "rollout", "pid": worker, "tid": 0}
    begin_us, end_us = ((time_ns - start_ns) / 1000 for time_ns in (span.start_ns, span.end_ns))
    if span.lease_id is None:
        return [{"ph": "X", "ts": begin_us, "dur": end_us - begin_us, **shared}]
    lease = shared | {"id": f"{worker}-{span.lease_id}"}
    return [{"ph": "b", "ts": begin_us, **lease}, {"ph": "e", "ts": end_us, **lease}]

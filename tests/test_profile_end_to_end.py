"""metrics.profile_steps leaves one trace of a real run: both ranks and the worker on one time line."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.real_run import ASA, runs_of_tiny

CLOCKS_US = 10_000  # by which the profiler's clock may differ from time.time

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]


def by_process(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Events by their process's name."""
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            found[names[event["pid"]]].append(event)
    return found


def span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def named_spans(events: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """What the trainer itself names; of several with one name the last."""
    return {event["name"]: span(event) for event in events if event.get("cat") == "user_annotation"}


def test_two_steps_of_ranks_and_worker_on_one_time_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    with runs_of_tiny(tmp_path_factory) as start:
        run = start(ASA, "metrics.profile_steps=2:3")
        assert run.wait() == 0, run.errors
    folder: Path = run.run_dir / "profile"
    assert [path.name for path in folder.iterdir()] == ["trace.json.gz"], "nothing unfinished stays"
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        processes = by_process(json.load(file))
    assert {"rank 0", "rank 1"} < processes.keys() and len(processes) == 3
    [worker] = processes.keys() - {"rank 0", "rank 1"}
    named = {rank: named_spans(processes[rank]) for rank in ("rank 0", "rank 1")}
    for rank, spans in named.items():
        assert {"step 2", "step 3", "data", "wait_rollout", "publish"} <= spans.keys() and "step 1" not in spans
        assert spans["step 2"][1] <= spans["step 3"][0]
        assert any(event["name"].startswith("gloo:") for event in processes[rank])
    assert named["rank 0"]["step 2"][0] < named["rank 1"]["step 2"][1], "both are in step 2 together"
    assert named["rank 1"]["step 2"][0] < named["rank 0"]["step 2"][1]
    [generated] = [event for event in processes[worker] if event["name"].startswith("generating step 2 ")]  # from 0 on
    begin, end = span(generated)
    assert named["rank 0"]["publish"][0] < begin < end, "with the weights that step 2 has published"
    assert end < named["rank 0"]["wait_rollout"][1] + CLOCKS_US, "step 3 waits for it"
    assert {event["ph"] for event in processes[worker] if event["name"].startswith("lease of step 2")} == {"b", "e"}
    assert any(event["name"].startswith("loading version") for event in processes[worker])

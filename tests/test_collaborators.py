"""What a rank does around its part in rollouts; a whole run is in tests/test_train_end_to_end.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asa_dist.collaborators import RolloutFeed, StepProfiler
from asa_dist.config import RolloutConfig
from asa_dist.runtime.engine import Placement
from asa_dist.runtime.watchdog import Watchdog


class NotingClient:
    """In the place of the RolloutClient: notes when it is asked."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def take(self, step: int) -> list[Any]:
        self._calls.append("take")
        return []


@pytest.mark.parametrize(("placement", "expected"), [("shared", ["empty_cache", "take"]), ("separate", ["take"])])
def test_cached_memory_is_given_back_before_workers_wake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, expected: list[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    with Watchdog(tmp_path, rank=1) as watchdog:
        rollout = RolloutConfig.model_validate({"placement": placement})
        client: Any = NotingClient(calls)
        engine: Any = None  # not looked at
        assert RolloutFeed(client, None, rollout, engine, watchdog).take(0) == []
    assert calls == expected


class OneRank:
    """In the place of the TrainEngine: all there is of it to a profiler."""

    placement = Placement(0, 0, 1, torch.device("cpu"))

    def max_over_ranks(self, values: list[bool]) -> list[bool]:
        return values


class SayingRecorder:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("broken", "message"), [
    ("begin_recording", "workers are not recorded: no room"), ("write_trace", "could not be written: no room")])
def test_a_trace_that_cannot_be_written_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(f"asa_dist.collaborators.{broken}", fail)
    recorder, engine, done = SayingRecorder(), OneRank(), []
    profiler = StepProfiler(tmp_path, 2, 3, engine, recorder)  # type: ignore[arg-type]
    for step in range(1, 5):
        with profiler.step(step):
            done.append(step)
    profiler.close()
    assert done == [1, 2, 3, 4] and message in recorder.said[0]
    kept = ["trace.json.gz"] if broken == "begin_recording" else []
    assert [path.name for path in (tmp_path / "profile").iterdir()] == kept, "no part stays"

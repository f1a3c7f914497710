"""A pool of real actors that die, raise, hang or cannot start: every task is finished once, or the pool says why."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from asa_dist.config import ConfigError
from asa_dist.rollout.cluster import RayHandle
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.pool import ActorPool, wait_for_any
from tests.rollout.ray_run import local_ray, wait_until

pytestmark = pytest.mark.ray


class Doubler:
    """Doubles numbers; a file named after one holds its fault, which strikes once unless the file ends in `always`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self) -> None:
        self._strike("start")

    def work(self, number: int) -> tuple[int, int]:
        self._strike(str(number))
        return 2 * number, os.getpid()

    def _strike(self, name: str) -> None:
        file = self._folder / name
        fault, _, how_often = file.read_text().partition(" ") if file.exists() else ("", "", "")
        if fault and how_often != "always":
            file.unlink()
        match fault:
            case "die":
                os._exit(1)
            case "raise":
                raise OSError("no room")
            case "config":
                raise ConfigError("udasa.factual.model: no such model")
            case "hang":
                time.sleep(1000)


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


class Pool:
    """A pool of ``Doubler`` and what was seen of it."""

    def __init__(self, folder: Path, size: int, max_deaths_in_a_row: int = 3, task_timeout_seconds: float = 60.0,
                 **faults: str) -> None:
        import ray

        for name, fault in faults.items():
            (folder / name.removeprefix("task_")).write_text(fault)
        self.events: list[tuple[str, dict[str, Any]]] = []
        doubler = ray.remote(Doubler).options(num_cpus=1)
        self.pool: ActorPool[int, tuple[int, int]] = ActorPool(
            "doubler", size, lambda: doubler.remote(folder), lambda number: f"doubling {number}",
            final_errors=(ConfigError,), start_timeout_seconds=60.0, task_timeout_seconds=task_timeout_seconds,
            max_deaths_in_a_row=max_deaths_in_a_row, on_event=lambda *event: self.events.append(event))
        self.results: list[tuple[int, tuple[int, int]]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def run(self, *numbers: int) -> list[tuple[int, int]]:
        """(number, double) of all that was finished, by number."""
        for number in numbers:
            self.pool.submit(number)
        while self.pool.is_busy:
            self.results += self.pool.collect()
            wait_for_any([self.pool])
        return self.doubles()

    def doubles(self) -> list[tuple[int, int]]:
        return sorted((number, double) for number, (double, _) in self.results)

    def reasons(self) -> list[str]:
        return [details["reason"] for event, details in self.events if event == "worker_died"]


def test_every_task_once_whatever_happens_to_its_actor(ray_handle: RayHandle, tmp_path: Path) -> None:
    faults = {"task_1": "die", "task_3": "raise", "task_4": "hang"}
    with Pool(tmp_path, 2, max_deaths_in_a_row=9, task_timeout_seconds=3.0, **faults) as pool:
        assert pool.run(*range(7)) == [(number, 2 * number) for number in range(7)]
        reasons = pool.reasons()
        for expected in ("while doubling 1: its process ended: .+", "while doubling 3: OSError: no room",
                         "while doubling 4: not done within 3 s"):
            assert sum(re.fullmatch(expected, reason) is not None for reason in reasons) >= 1, reasons
        started = [details["worker"] for event, details in pool.events if event == "worker_started"]
        assert len(started) == len(set(started)) and {"doubler-0", "doubler-1"} <= set(started)
        assert pool.run(7, 8) == [(number, 2 * number) for number in range(9)]  # they work on
        pids = {pid for _, (_, pid) in pool.results[-2:]}
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the end of the actors")


def test_a_task_that_always_fails_ends_the_work_with_the_last_reasons(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Pool(tmp_path, 1, max_deaths_in_a_row=1, task_1="raise always") as pool:
        with pytest.raises(RolloutFailure, match=(
                r"every doubler died 1 times in a row without finishing anything\. The last reasons: "
                r"doubler-0, while doubling 1: OSError: no room")):
            pool.run(0, 1, 2)
        assert pool.doubles() == [(0, 0)]  # an actor that has done something does not count among deaths in a row
        assert [event for event, _ in pool.events] == [
            "worker_started", "worker_died", "worker_started", "worker_died", "worker_given_up"]
        assert pool.reasons() == ["while doubling 1: OSError: no room"] * 2


def test_actors_start_when_there_is_work_and_those_that_cannot_are_given_up(
        ray_handle: RayHandle, tmp_path: Path) -> None:
    with Pool(tmp_path, 1, max_deaths_in_a_row=1, start="raise always") as pool:
        assert pool.pool.collect() == [] and pool.events == []
        with pytest.raises(RolloutFailure, match=r"The last reasons: doubler-0, while starting: OSError: no room"):
            pool.run(0)


def test_a_final_error_ends_the_work_at_once_but_first_comes_what_is_finished(
        ray_handle: RayHandle, tmp_path: Path) -> None:
    import ray

    with Pool(tmp_path, 2, task_1="config") as pool:
        pool.run(4)
        assert pool.events == [("worker_started", {"worker": "doubler-0"})]  # no more actors than tasks
        while len({pid for _, (_, pid) in pool.results}) < 2:
            pool.run(5, 6)
        pool.pool.submit(0)
        pool.pool.submit(1)
        assert pool.pool.collect() == []
        ray.wait(pool.pool.calls, num_returns=2, timeout=60)
        assert [task for task, _ in pool.pool.collect()] == [0]
        with pytest.raises(ConfigError, match=r"^udasa\.factual\.model: no such model$"):
            pool.pool.collect()

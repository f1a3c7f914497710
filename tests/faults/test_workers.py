"""Rollout processes that die, stop, hang or answer nonsense: real processes, real signals.

    fault                                      what happens
    worker: kill -9                            replaced; its groups come from another one, bit for bit the same
    worker: stopped for a moment               nothing
    worker: stopped beyond its heartbeat       replaced; what it delivers later is refused
    worker: hangs in an engine call            writes its stacks and ends; replaced
    worker: NaN log-probs                      loads its weights again; replaced if that does not help, at last given up
    weights: shard corrupt in the store        never served; the ranks publish again; three times: the run ends
    coordinator: kill -9                       every wait of every rank ends with an error
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout import weights
from asa_dist.rollout.calls import RolloutTimeout, wait_for
from asa_dist.rollout.cluster import RayHandle
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from tests.rollout.ray_run import Run, local_ray, wait_until

pytestmark = pytest.mark.ray

ROLLOUT = RolloutConfig(prompts_per_step=4, responses_per_prompt=3, max_new_tokens=6, timeout_seconds=60.0)


class FaultyEngine(HfEngine):
    """A real engine; a file in the model's folder asks whichever process calls it next for one fault.

    pause     the call begins when there is a file `go`; the file becomes `paused-<pid>`
    error     the call raises
    nan       log-probs are NaN until weights are loaded again
    """

    def __init__(self, config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> None:
        super().__init__(config_folder, model, sampling, "cpu")
        self._folder = Path(config_folder)
        self._is_sick = False

    def load(self, *arguments: Any) -> None:
        super().load(*arguments)
        self._is_sick = False

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        if self._asked_for("pause"):
            while not (self._folder / "go").exists():
                time.sleep(0.05)
        if self._asked_for("error"):
            raise OSError("the engine is on fire")
        self._is_sick = self._asked_for("nan") or self._is_sick
        responses = super().generate(prompts)
        return [tuple(nonsense(r) for r in siblings) for siblings in responses] if self._is_sick else responses

    def _asked_for(self, fault: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            (self._folder / fault).rename(self._folder / f"{fault}d-{os.getpid()}")
            return True
        return False


def nonsense(response: Response) -> Response:
    return dataclasses.replace(response, logprob_T=np.full_like(response.logprob_T, np.nan))


class SickEngine(HfEngine):
    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        return [tuple(nonsense(r) for r in siblings) for siblings in super().generate(prompts)]


def build_faulty_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
    return FaultyEngine(config_folder, model, sampling)


def build_sick_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
    return SickEngine(config_folder, model, sampling, "cpu")


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


def rollout(**changes: Any) -> RolloutConfig:
    return ROLLOUT.model_copy(update=changes)


def step_with_a_paused_call(run: Run, step: int) -> psutil.Process:
    """Begins a step; returns the worker process that holds a lease of it and does not get on."""
    (run.folder / "go").unlink(missing_ok=True)
    for old in run.folder.glob("paused-*"):
        old.unlink()
    (run.folder / "pause").touch()
    run.publish(step)
    run.submit(step)
    (paused,) = wait_until(lambda: list(run.folder.glob("paused-*")), "an engine call")
    return psutil.Process(int(paused.name.partition("-")[2]))


def test_a_worker_stopped_for_a_moment_and_a_worker_killed(ray_handle: RayHandle, tmp_path: Path) -> None:
    config = rollout(workers=2, heartbeat_timeout_seconds=300.0)
    with Run(ray_handle, "killed", tmp_path, config, build_faulty_engine) as run:
        stopped = step_with_a_paused_call(run, 0)
        stopped.suspend()
        time.sleep(1.5)
        stopped.resume()
        (run.folder / "go").touch()
        run.assert_undisturbed(0, run.take(0))
        assert run.details_of("worker_died") == []

        killed = step_with_a_paused_call(run, 1)
        killed.kill()
        wait_until(lambda: len(run.details_of("worker_started")) == 3, "a new worker")  # before a heartbeat is missed
        run.assert_undisturbed(1, run.take(1))
        run.step(2)
        (died,) = run.details_of("worker_died")
        assert died["reason"].startswith("its process ended: ")
        assert [event["worker"] for event in run.details_of("worker_started")] == [
            "worker-0", "worker-1", f"{died['worker']}.1"]
        assert not (run.stacks / f"{died['worker']}.txt").exists()
    assert list(run.stacks.iterdir()) == []


def test_a_worker_stopped_too_long(ray_handle: RayHandle, tmp_path: Path) -> None:
    config = rollout(workers=2, heartbeat_timeout_seconds=3.0, max_deaths_in_a_row=9)
    with Run(ray_handle, "stopped", tmp_path, config, build_faulty_engine) as run:
        process = step_with_a_paused_call(run, 0)
        wait_until(lambda: "generating step 0" in run.clients[0]._status(), "a heartbeat of the paused call")
        process.suspend()
        try:
            groups = run.take(0)  # from the other worker: the lease was given to it when the heartbeat was missed
            run.assert_undisturbed(0, groups)
        finally:
            (run.folder / "go").touch()
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        reason = "no heartbeat for .* s, allowed are 3 s; its last phase: generating step 0 from group . with version 0"
        (died,) = wait_until(lambda: [event for event in run.details_of("worker_died")
                                      if re.fullmatch(reason, event["reason"])], "the stopped worker's death")
        late = run.clients[0]._coordinator.deliver.remote(died["worker"], 0, groups[:1])
        assert wait_for(late, 60.0, "this test", "a refusal").late
        wait_until(lambda: len(run.details_of("worker_started")) >= 3, "a new worker")
        run.step(1)
        run.step(2)


def test_a_worker_that_hangs_leaves_its_stacks(ray_handle: RayHandle, tmp_path: Path) -> None:
    config = rollout(lease_timeout_seconds=3.0, max_deaths_in_a_row=9)
    with Run(ray_handle, "hangs", tmp_path, config, build_faulty_engine) as run:
        process = step_with_a_paused_call(run, 0)
        run.assert_undisturbed(0, run.take(0))
        (file,) = [file for file in run.stacks.iterdir() if 'test_workers.py", line' in file.read_text()]
        headline = rf"host .*, {file.stem}, while generating step 0 from group . with version 0, deadline 3 s:\n"
        assert re.match(headline + r"Timeout \(0:00:0[23][.0-9]*\)!\n", file.read_text())
        wait_until(lambda: run.reasons_of(file.stem), "the death of the worker")
        assert f", deadline 3 s; its stacks: {file}" in run.reasons_of(file.stem)[0]
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        run.step(1)


def test_an_engine_that_raises_and_one_that_returns_nan_once(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Run(ray_handle, "once", tmp_path, ROLLOUT, build_faulty_engine) as run:
        (run.folder / "nan").touch()
        run.step(0)
        assert list(run.folder.glob("nand-*")) and run.details_of("worker_died") == []
        (run.folder / "error").touch()
        run.step(1)
        (reason,) = run.reasons_of("worker-0")
        assert re.fullmatch("host .*, while generating step 1 from group . with version 1: OSError: the engine is on "
                            "fire", reason)
    assert list(run.stacks.iterdir()) == []


def test_an_engine_that_always_returns_nan(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Run(ray_handle, "nan", tmp_path, rollout(max_deaths_in_a_row=2), build_sick_engine) as run:
        run.publish(0)
        run.submit(0)
        for client in run.clients:
            with pytest.raises(RolloutFailure, match=(
                    r"rollout failed: every worker died 2 times in a row without delivering anything. The last reasons:"
                    r" worker-0: host .*, while delivering step 0 from group 0: RuntimeError: delivery refused: .*"
                    r"group 0 \(prompt 0\), response 0: log-probs that are not finite")):
                client.take(0)
    assert [event["worker"] for event in run.details_of("worker_given_up")] == ["worker-0.1"]


def test_a_corrupt_shard_is_never_served(
        ray_handle: RayHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that arrive are not those whose checksum the rank published."""
    honest, times = weights.shard_record, {0: 1, 1: 10**9}  # how often: by version, counted down

    def record_of_other_bytes(rank: int, shard: np.ndarray) -> Any:
        if rank == 1 and times[run.publishing] > 0:
            times[run.publishing] -= 1
            shard = shard.copy()
            shard[len(shard) // 2] ^= 1
        return honest(rank, shard)

    monkeypatch.setattr(weights, "shard_record", record_of_other_bytes)
    with Run(ray_handle, "corrupt", tmp_path, ROLLOUT) as run:
        run.publishing = 0
        run.step(0)
        for event in run.details_of("version_corrupt"):
            assert event["version"] == 0
            assert re.fullmatch("worker-0, host .*: version 0, shard of rank 1: checksum .*, its rank published .*",
                                event["reason"])
        assert len(run.details_of("version_corrupt")) == 2  # told to both ranks
        run.publishing = 1
        with pytest.raises(RolloutFailure, match=r"worker-0 failed: version 1 arrived corrupt 3 times, .* rank 1"):
            run.step(1)
        assert run.details_of("worker_died") == []


def test_the_coordinator_stopped_and_killed(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Run(ray_handle, "headless", tmp_path, ROLLOUT) as run, ThreadPoolExecutor(1) as rank:
        run.step(0)
        (coordinator,) = run.processes("Coordinator")
        impatient = run.client(1, timeout_seconds=0.5)
        coordinator.suspend()
        with pytest.raises(RolloutTimeout, match=r"rank 1 of 2, host .*: waited 0.5 s for the rollouts of step 1. "
                                                 r"Coordinator: does not answer"):
            impatient.take(1)
        coordinator.resume()
        impatient.close()

        waiting = rank.submit(run.clients[0].take, 1)
        wait_until(lambda: "heartbeats: worker-0" in run.clients[0]._status(), "the coordinator's answer")
        coordinator.kill()
        with pytest.raises(RolloutFailure, match=r"rank 0 of 2, host .*: lost, while waiting for the rollouts of"):
            waiting.result(timeout=60)
        run.publish(1)
        for client in run.clients:
            wait_until(client._publishing[-1][1].done, "the end of publishing")
            with pytest.raises(RolloutFailure, match="the coordinator to accept its shard of version 1"):
                client.take(1)
        wait_until(lambda: not run.system._supervisor._thread.is_alive(), "the supervisor's end")
        assert run.details_of("worker_died") == []

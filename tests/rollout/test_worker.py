"""A worker and its engine: what it takes on beside what is under way, and in whose turn. Real processes, a real Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout.cluster import RayHandle
from asa_dist.rollout.engine import EngineStartError, SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.worker import build_engine
from tests.rollout.ray_run import Run, local_ray, wait_until
from tests.rollout.tiny_model import EOS

pytestmark = pytest.mark.ray

ROLLOUT = RolloutConfig(prompts_per_step=4, responses_per_prompt=3, max_new_tokens=6, timeout_seconds=60.0)


class ContinuousEngine(HfEngine):
    """Takes on up to three bundles and writes down what it is asked to do; finishes nothing without a file `go`.

    A file `nan` spoils the next bundle.
    """

    def __init__(self, config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> None:
        super().__init__(config_folder, model, sampling, "cpu")
        self._go = Path(config_folder, "go")
        self._nan = Path(config_folder, "nan")
        self._log = Path(config_folder, "calls.txt")
        self._bundles: dict[int, Sequence[Prompt]] = {}

    @property
    def has_room(self) -> bool:
        return len(self._bundles) < 3

    def load(self, version: int, tensors: Any) -> None:
        super().load(version, tensors)
        self._note(f"load {version}")

    def begin(self, bundle_id: int, prompts: Sequence[Prompt]) -> None:
        self._note(f"begin {prompts[0].prompt_id}")
        self._bundles[bundle_id] = prompts

    def advance(self) -> list[tuple[int, list[tuple[Response, ...]]]]:
        if not self._go.exists():
            time.sleep(0.01)
            return []
        bundle_id = next(iter(self._bundles))
        groups = self.generate(self._bundles.pop(bundle_id))
        if self._nan.exists():
            self._nan.unlink()
            groups = [tuple(replace(r, logprob_T=np.full_like(r.logprob_T, np.nan)) for r in group) for group in groups]
        return [(bundle_id, groups)]

    def drop(self) -> None:
        self._bundles.clear()
        self._note("drop")

    def sleep(self) -> None:
        super().sleep()
        self._note("sleep")

    def _note(self, call: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{call}\n")


def build_continuous_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
    return ContinuousEngine(config_folder, model, sampling)


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


def calls(run: Run) -> list[str]:
    log = run.folder / "calls.txt"
    return log.read_text().splitlines() if log.exists() else []


def test_leases_and_weights_come_beside_what_is_under_way(ray_handle: RayHandle, tmp_path: Path) -> None:
    config = ROLLOUT.model_copy(update={"max_policy_age": 1, "prompts_per_step": 2})
    with Run(ray_handle, "continuous", tmp_path, config, build_continuous_engine) as run:
        run.publish(0)
        run.submit(0)
        wait_until(lambda: calls(run) == ["load 0", "begin 0", "begin 1"], "two leases at once")
        run.publish(1)  # nothing is finished, and the engine has room
        wait_until(lambda: calls(run)[3:] == ["load 1"], "the new version")
        for step in (1, 2):
            run.submit(step)
        wait_until(lambda: calls(run)[4:] == ["begin 10"], "a third lease, with which the engine is full")
        assert "generating step 0 from group 0 and 2 more with version 1" in wait_until(
            lambda: status if "and 2 more" in (status := run.clients[0]._status()) else "", "a heartbeat")
        (run.folder / "go").touch()
        for step in range(3):
            for group in run.take(step):
                assert [response.spans for response in group.responses] == [((0, 1),)] * 3
        assert calls(run)[5:] == ["begin 11", "begin 20", "begin 21"]


def test_what_suspect_weights_have_begun_is_begun_again(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Run(ray_handle, "suspect", tmp_path, ROLLOUT, build_continuous_engine) as run:
        run.publish(0)
        run.submit(0)
        wait_until(lambda: len(calls(run)) == 4, "three leases at once")
        (run.folder / "nan").touch()
        (run.folder / "go").touch()
        run.assert_undisturbed(0, run.take(0))
        assert calls(run)[:7] == ["load 0", "begin 0", "begin 1", "begin 2", "drop", "load 0", "begin 1"]
        assert sorted(calls(run)[6:]) == ["begin 0", "begin 1", "begin 2", "begin 3"]
        assert not run.details_of("worker_died")


def test_on_shared_gpus_every_engine_sleeps_when_a_step_is_taken(ray_handle: RayHandle, tmp_path: Path) -> None:
    config = ROLLOUT.model_copy(update={"placement": "shared"})
    with Run(ray_handle, "shared", tmp_path, config, build_continuous_engine) as run:
        (run.folder / "go").touch()
        for step in range(3):
            seen = len(calls(run))
            run.publish(step)
            run.submit(step)
            with ThreadPoolExecutor(2) as ranks:
                taken = [ranks.submit(client.take, step) for client in run.clients]
                groups = [group for share in taken for group in share.result()]
            now = calls(run)[seen:]
            assert (now[0], now[-1]) == (f"load {step}", "sleep") and now.count("sleep") == 1
            run.assert_undisturbed(step, groups)


def test_hf_has_no_use_for_two_gpus() -> None:
    sampling = SamplingConfig(RolloutConfig(gpus_per_worker=2), 0, EOS)
    with pytest.raises(EngineStartError, match=r"gpus_per_worker = 2: engine hf, which rollout\.engine = hf means"):
        build_engine("anywhere", ModelConfig(), sampling)

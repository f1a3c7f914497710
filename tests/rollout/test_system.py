"""The rollouts of a run in a real Ray: two trainer ranks (in this process), a coordinator, workers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.rollout.calls import RolloutTimeout
from asa_dist.rollout.cluster import ClusterError, RayHandle
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.system import RolloutSystem
from tests.rollout.ray_run import Run, local_ray, wait_until
from tests.rollout.tiny_model import EOS

pytestmark = pytest.mark.ray

ROLLOUT = RolloutConfig(prompts_per_step=2, responses_per_prompt=3, max_new_tokens=6, timeout_seconds=60.0)


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


def test_publish_generate_take(ray_handle: RayHandle, tmp_path: Path) -> None:
    with Run(ray_handle, "/runs/good", tmp_path, ROLLOUT) as run:
        for step in range(3):  # max_policy_age 0: version = step
            run.step(step)
        impatient = run.client(1, timeout_seconds=0.5)
        with pytest.raises(RolloutTimeout, match=r"rank 1 of 2, host .*: waited 0.5 s for the rollouts of step 3. "
                                                 r"Coordinator: newest complete version 2; .*open steps: none"):
            impatient.take(3)
        impatient.close()
    assert run.events == [
        ("worker_started", {"worker": "worker-0"}), ("worker_ready", {"worker": "worker-0", "engine": "hf"})]
    assert list(run.stacks.iterdir()) == []


def test_a_snapshot_continues_elsewhere(ray_handle: RayHandle, tmp_path: Path) -> None:
    """Step 0 is finished, step 1 waits for its version: a new system goes on with both, without the prompts."""
    with Run(ray_handle, "before", tmp_path, ROLLOUT) as run:
        run.publish(0)
        for step in range(2):
            run.submit(step)
        wait_until(lambda: len(run.clients[0].snapshot().steps[0].groups) == 2, "two groups")
        snapshot = run.clients[0].snapshot()
    with Run(ray_handle, "after", tmp_path, ROLLOUT) as run:
        run.clients[0].restore(snapshot, next_step=0)
        run.assert_undisturbed(0, run.take(0))  # nobody has published anything here
        run.publish(1)
        run.assert_undisturbed(1, run.take(1))


def test_workers_that_cannot_start_end_every_take(ray_handle: RayHandle, tmp_path: Path) -> None:
    def build_nothing(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> None:
        raise OSError("no such engine on this host")

    rollout = ROLLOUT.model_copy(update={"max_deaths_in_a_row": 2})
    with Run(ray_handle, "bad", tmp_path, rollout, build_nothing) as run:
        for client in run.clients:
            with pytest.raises(RolloutFailure, match=(
                    r"rollout failed: every worker died 2 times in a row without delivering anything. The last reasons:"
                    r" worker-0: host .*, while building the engine: OSError: no such engine on this host")):
                client.take(0)
    reason = run.reasons_of("worker-0.1")[0]
    assert re.fullmatch("host .*, while building the engine: OSError: no such engine on this host", reason)
    assert run.events == [
        ("worker_started", {"worker": "worker-0"}), ("worker_died", {"worker": "worker-0", "reason": reason}),
        ("worker_started", {"worker": "worker-0.1"}), ("worker_died", {"worker": "worker-0.1", "reason": reason}),
        ("worker_given_up", {"worker": "worker-0.1", "reason": reason})]


def test_too_small_a_ray_is_an_error_at_once(ray_handle: RayHandle, tmp_path: Path) -> None:
    sampling = SamplingConfig(RolloutConfig(workers=3), 0, EOS)
    with pytest.raises(ClusterError, match="3 rollout workers x 1 CPU need more than the 2 CPU that Ray has"):
        RolloutSystem.start("large", str(tmp_path), ModelConfig(), sampling, groups_per_lease=1,
                            on_event=lambda event, details: None, stacks_folder=str(tmp_path))

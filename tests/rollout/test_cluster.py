"""The rollouts of a run in a real Ray: two trainer ranks (in this process), a coordinator, a worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.calls import RolloutTimeout
from asa_dist.rollout.client import RolloutClient
from asa_dist.rollout.cluster import (
    LOOPBACK_SWITCH,
    ClusterError,
    RayHandle,
    RolloutSystem,
    connect,
    disconnect,
    start_local_ray,
)
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.weights import piece_of_rank, tensor_specs
from tests.rollout.tiny_model import EOS, make_model

pytestmark = pytest.mark.ray

ROLLOUT = RolloutConfig(prompts_per_step=2, responses_per_prompt=3, groups_per_lease=1, max_new_tokens=6,
                        timeout_seconds=60.0)
SAMPLING = SamplingConfig(ROLLOUT, seed=4, eos_token_id=EOS)


def processes_of(local_ray: RayHandle) -> list[psutil.Process]:
    return session_members(local_ray._head.pid)


def session_members(session: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session:
                found.append(psutil.Process(pid))
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        sigterm_handler = signal.getsignal(signal.SIGTERM)
        handle = start_local_ray(num_cpus=2, num_gpus=0, object_store_bytes=100_000_000)
        for name, value in handle.environment.items():
            patch.setenv(name, value)
        try:
            connect(handle.address)
            assert signal.getsignal(signal.SIGTERM) is sigterm_handler
            yield handle
        finally:
            disconnect()
            folder = handle._owned_folder
            handle.stop()
        assert processes_of(handle) == []
        assert not folder.exists()
        assert not (home / ".ray").exists()  # no token on disk
        handle.stop()  # harmless


def make_clients(run_name: str, model: LlamaForCausalLM, timeout_seconds: float = 60.0) -> list[RolloutClient]:
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    return [RolloutClient(run_name, rank, 2, shapes, "float32", timeout_seconds) for rank in range(2)]


def publish(clients: list[RolloutClient], version: int, model: LlamaForCausalLM) -> None:
    tensors = dict(model.named_parameters())
    specs = tensor_specs([(name, tensor.shape) for name, tensor in tensors.items()], len(clients))
    for rank, client in enumerate(clients):
        client.publish(version, [piece_of_rank(tensors[spec.name], spec, rank) for spec in specs])


def make_prompts(step: int) -> list[Prompt]:
    return [Prompt(10 * step + i, 0, np.arange(4, 7 + i, dtype=np.int32)) for i in range(2)]


def assert_sampled_by(model: LlamaForCausalLM, folder: Path, version: int, groups: list[RolloutGroup]) -> None:
    """The groups are, bit for bit, what an engine with exactly these weights samples."""
    torch.set_num_threads(1)
    engine = HfEngine(str(folder), ModelConfig(), SAMPLING, "cpu")
    engine.load(version, model.named_parameters())
    for group in groups:
        (expected,) = engine.generate([group.prompt])
        for found, response in zip(group.responses, expected, strict=True):
            assert found.spans == ((0, version),)
            assert found.token_ids.tolist() == response.token_ids.tolist()
            assert found.logprob_T.tobytes() == response.logprob_T.tobytes()


def test_ray_listens_on_loopback_only(local_ray: RayHandle) -> None:
    processes = processes_of(local_ray)
    assert any("gcs_server" in process.name() for process in processes)
    hosts = {connection.laddr.ip for process in processes for connection in process.net_connections("inet")
             if connection.status == psutil.CONN_LISTEN}
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1"} and hosts


def test_publish_generate_take_and_a_workers_death(local_ray: RayHandle, tmp_path: Path) -> None:
    models = [make_model(tmp_path, tied=True, seed=seed) for seed in range(2)]
    system = RolloutSystem.start("/runs/good", str(tmp_path), ModelConfig(), SAMPLING, groups_per_lease=1)
    clients = make_clients("/runs/good", models[0])
    try:
        for step, model in enumerate(models):  # max_policy_age 0: version = step
            publish(clients, step, model)
            clients[0].submit_prompts(step, make_prompts(step))
            shares = [client.take(step) for client in clients]
            assert [[group.index for group in share] for share in shares] == [[0], [1]]
            assert [[group.prompt.prompt_id for group in share] for share in shares] == [[10 * step], [10 * step + 1]]
            assert_sampled_by(model, tmp_path, step, shares[0] + shares[1])
        for client in clients:
            client.wait_published()

        impatient = make_clients("/runs/good", models[0], timeout_seconds=0.5)[1]
        with pytest.raises(RolloutTimeout, match=r"host .*: waited 0.5 s for the rollouts of step 2 for rank 1 of 2. "
                                                 r"Coordinator: newest complete version 1; .*open steps: none"):
            impatient.take(2)

        (worker,) = [p for p in processes_of(local_ray) if "RolloutWorker" in " ".join(p.cmdline())]
        worker.kill()
        with pytest.raises(RolloutFailure, match="worker-0 failed: its process ended"):
            clients[0].take(2)
    finally:
        for client in clients:
            client.close()
        system.stop()


def test_errors_of_workers_and_ranks_reach_every_take(local_ray: RayHandle, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    system = RolloutSystem.start("bad", str(tmp_path / "missing"), ModelConfig(), SAMPLING, groups_per_lease=1)
    try:
        for client in make_clients("bad", model):
            with pytest.raises(RolloutFailure, match=r"worker-0 failed: host .*, while building the engine: .*missing"):
                client.take(0)
            client.close()
    finally:
        system.stop()


def test_connect_names_what_is_amiss(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        with pytest.raises(ClusterError, match=f"cannot connect to Ray at {address}: set RAY_AUTH_MODE"):
            connect(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.delenv(LOOPBACK_SWITCH, raising=False)
        with pytest.raises(ClusterError, match=f"set {LOOPBACK_SWITCH}"):
            connect(address)
        monkeypatch.setenv(LOOPBACK_SWITCH, "0")
        with pytest.raises(ClusterError, match=f"cannot connect to Ray at '{address}'.*refused"):
            connect(address)


def test_too_small_a_ray_is_an_error_at_once(local_ray: RayHandle, tmp_path: Path) -> None:
    sampling = SamplingConfig(RolloutConfig(workers=3), 0, EOS)
    with pytest.raises(ClusterError, match="3 rollout workers x 1 CPU need more than the 2 CPU that Ray has"):
        RolloutSystem.start("large", str(tmp_path), ModelConfig(), sampling, groups_per_lease=1)


def test_a_ray_that_cannot_start_says_why(tmp_path: Path) -> None:
    long_folder = tmp_path / ("x" * 100)  # a socket's path has at most 107 bytes
    with pytest.raises(ClusterError, match=r"(?s)Ray did not start: its head process ended. .*107 bytes"):
        start_local_ray(num_cpus=1, num_gpus=0, object_store_bytes=100_000_000, temp_dir=long_folder)


def test_ray_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """kill -9 of the owner: nothing tells Ray's head but its closed standard input."""
    script = ("from asa_dist.rollout.cluster import start_local_ray; import time\n"
              "ray = start_local_ray(1, 0, 100_000_000)\nprint(ray._head.pid, ray._owned_folder, flush=True)\n"
              "time.sleep(600)")
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    head, folder = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while (left := session_members(int(head)) or os.path.exists(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left

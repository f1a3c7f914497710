"""A real local Ray, and a run in it: two trainer ranks in this process, real worker processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.client import RolloutClient
from asa_dist.rollout.cluster import RayHandle, connect, disconnect, start_local_ray
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.system import RolloutSystem
from asa_dist.rollout.weights import piece_of_rank, tensor_specs
from asa_dist.rollout.worker import EngineBuilder, build_engine
from tests.rollout.tiny_model import EOS, make_model

TOKEN = secrets.token_hex(32)  # Ray reads its token once per process: all of this process's Rays have the same
PATIENCE_SECONDS = 60.0  # for what takes a moment on an idle machine


@contextlib.contextmanager
def local_ray(home: Path) -> Iterator[RayHandle]:
    """A Ray of two CPUs, connected; afterwards nothing of it may be left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr("secrets.token_hex", lambda num_bytes: TOKEN)
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
        assert session_members(handle._head.pid) == []
        assert not folder.exists()
        assert not (home / ".ray").exists()  # no token on disk
        handle.stop()  # harmless


def session_members(session: int) -> list[psutil.Process]:
    """Those that live; a zombie has ended, and its parent may take a moment to notice."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
    return value


def make_prompts(step: int, count: int = 2) -> list[Prompt]:
    return [Prompt(10 * step + i, 0, np.arange(4, 7 + i, dtype=np.int32)) for i in range(count)]


@dataclass
class Run:
    """A running system with two ranks, in this process; odd and even versions are the weights of two models."""

    ray: RayHandle
    name: str
    folder: Path
    rollout: RolloutConfig
    build_engine: EngineBuilder = build_engine
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> Run:
        self.models = [make_model(self.folder, seed=seed) for seed in range(2)]
        self.stacks = self.folder / "stacks"
        self.sampling = SamplingConfig(self.rollout, seed=4, eos_token_id=EOS)
        self.system = RolloutSystem.start(
            self.name, str(self.folder), ModelConfig(), self.sampling, groups_per_lease=1,
            on_event=self.on_event, stacks_folder=str(self.stacks), build_engine=self.build_engine)
        self.clients = [self.client(rank, self.rollout.timeout_seconds) for rank in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        for client in self.clients:
            client.close()
        self.system.stop()

    def client(self, rank: int, timeout_seconds: float) -> RolloutClient:
        shapes = [(name, parameter.shape) for name, parameter in self.models[0].named_parameters()]
        return RolloutClient(self.name, rank, 2, shapes, "float32", timeout_seconds, on_event=self.on_event)

    def on_event(self, event: str, details: dict[str, Any]) -> None:
        self.events.append((event, details))

    def publish(self, version: int) -> None:
        tensors = dict(self.models[version % 2].named_parameters())
        specs = tensor_specs([(name, tensor.shape) for name, tensor in tensors.items()], num_ranks=2)
        for rank, client in enumerate(self.clients):
            client.publish(version, [piece_of_rank(tensors[spec.name], spec, rank) for spec in specs])

    def submit(self, step: int) -> None:
        self.clients[0].submit_prompts(step, make_prompts(step, self.rollout.prompts_per_step))

    def take(self, step: int) -> list[RolloutGroup]:
        """All groups of the step; each of its prompts must be there exactly once."""
        with ThreadPoolExecutor(len(self.clients)) as ranks:
            groups = [group for share in ranks.map(lambda client: client.take(step), self.clients) for group in share]
        prompt_ids = [prompt.prompt_id for prompt in make_prompts(step, self.rollout.prompts_per_step)]
        assert [group.prompt.prompt_id for group in groups] == prompt_ids
        return groups

    def step(self, step: int) -> None:
        """Publish, submit, take; the groups are those of an undisturbed run."""
        self.publish(step)
        self.submit(step)
        self.assert_undisturbed(step, self.take(step))

    def assert_undisturbed(self, version: int, groups: list[RolloutGroup]) -> None:
        """The groups are, bit for bit, what one engine with exactly this version samples, one prompt at a time."""
        torch.set_num_threads(1)
        engine = HfEngine(str(self.folder), ModelConfig(), self.sampling, "cpu")
        engine.load(version, self.models[version % 2].named_parameters())
        for group in groups:
            (expected,) = engine.generate([group.prompt])
            for found, response in zip(group.responses, expected, strict=True):
                assert found.spans == ((0, version),)
                assert found.token_ids.tolist() == response.token_ids.tolist()
                assert found.logprob_T.tobytes() == response.logprob_T.tobytes()

    def details_of(self, event: str) -> list[dict[str, Any]]:
        return [details for name, details in list(self.events) if name == event]

    def reasons_of(self, worker_id: str) -> list[str]:
        return [details["reason"] for details in self.details_of("worker_died") if details["worker"] == worker_id]

    def processes(self, actor: str) -> list[psutil.Process]:
        """Those of an actor class in this Ray."""
        return [process for process in session_members(self.ray._head.pid)
                if f"ray::{actor}" in " ".join(process.cmdline())]

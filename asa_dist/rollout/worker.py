"""A rollout worker: one engine, asked in turn to load weights and to generate. `cluster` makes it a Ray actor."""

from __future__ import annotations

import socket
from typing import Any

from asa_dist.config import ModelConfig
from asa_dist.records import Lease, RolloutGroup
from asa_dist.rollout.calls import wait_for
from asa_dist.rollout.coordinator import LoadOrder
from asa_dist.rollout.engine import Engine, SamplingConfig


def build_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> Engine:
    """The engine named by ``rollout.engine``, without weights, on this process's device."""
    from asa_dist.rollout.hf_engine import HfEngine

    engines = {"hf": HfEngine}
    device = "cuda" if sampling.rollout.gpus_per_worker else "cpu"
    return engines[sampling.rollout.engine](config_folder, model, sampling, device)


class RolloutWorker:
    """Consumes leases and load orders; delivers groups.

    Args:
        worker_id: unique among all workers the coordinator has ever seen.
        coordinator: its Ray handle.
        config_folder: folder with the model's transformers ``config.json``, readable on this worker's host.
    """

    def __init__(self, worker_id: str, coordinator: Any, config_folder: str, model: ModelConfig,
                 sampling: SamplingConfig) -> None:
        self._worker_id = worker_id
        self._coordinator = coordinator
        self._config_folder = config_folder
        self._model = model
        self._sampling = sampling
        self._timeout_seconds = sampling.rollout.timeout_seconds
        self._phase = "starting"

    def run(self) -> None:
        """Works until the coordinator says stop; an error is reported to it (host, phase) and raised."""
        try:
            self._work()
        except Exception as error:
            message = f"host {socket.gethostname()}, while {self._phase}: {type(error).__name__}: {error}"
            wait_for(self._coordinator.fail.remote(self._worker_id, message), self._timeout_seconds,
                     "the coordinator to note a failure")
            raise

    def _work(self) -> None:
        import torch

        self._phase = "building the engine"
        torch.set_num_threads(self._sampling.rollout.threads_per_worker)
        engine = build_engine(self._config_folder, self._model, self._sampling)
        while True:
            self._phase = "waiting for a lease"
            # No deadline: an idle worker is no fault. A coordinator that dies ends the wait with an error.
            order = wait_for(self._coordinator.lease.remote(self._worker_id, engine.version), None, "a lease")
            if order is None:
                return
            if isinstance(order, LoadOrder):
                self._load(engine, order)
            else:
                self._generate(engine, order)

    def _load(self, engine: Engine, order: LoadOrder) -> None:
        from asa_dist.rollout.weights import assemble

        version = order.manifest.version
        self._phase = f"loading version {version}"
        shards = wait_for(list(order.shard_refs), self._timeout_seconds, f"the shards of version {version}")
        engine.load(version, assemble(order.manifest, shards))

    def _generate(self, engine: Engine, lease: Lease) -> None:
        self._phase = f"generating step {lease.step} from group {lease.first_index} with version {engine.version}"
        responses = engine.generate(lease.prompts)
        groups = [RolloutGroup(lease.step, lease.first_index + offset, prompt, siblings)
                  for offset, (prompt, siblings) in enumerate(zip(lease.prompts, responses, strict=True))]
        self._phase = f"delivering step {lease.step} from group {lease.first_index}"
        refusal = wait_for(self._coordinator.deliver.remote(self._worker_id, lease.lease_id, groups),
                           self._timeout_seconds, "the coordinator to take the groups")
        if refusal is not None and not refusal.late:
            raise RuntimeError(f"delivery refused: {refusal.reason}")

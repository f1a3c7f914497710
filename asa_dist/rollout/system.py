"""The actors of one run, and their end.

    rank 0: RolloutSystem ──► Coordinator              found by every rank's RolloutClient, under the run's name
                 └──► Supervisor (thread) ──► RolloutWorker × rollout.workers
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from asa_dist.config import ModelConfig
from asa_dist.rollout.calls import RolloutTimeout, wait_for
from asa_dist.rollout.cluster import ClusterError
from asa_dist.rollout.coordinator import Coordinator, RolloutFailure
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.round_trip import shortages
from asa_dist.rollout.supervisor import Supervisor
from asa_dist.rollout.worker import EngineBuilder, RolloutWorker, build_engine

COORDINATOR_NAME = "coordinator"  # within the run's namespace
STOP_GRACE_SECONDS = 10.0


class RolloutSystem:
    """A coordinator and supervised workers. They belong to the process that starts them, and end with it."""

    def __init__(self, coordinator: Any, supervisor: Supervisor, sampling: SamplingConfig,
                 create_worker: Callable[[SamplingConfig, str], Any]) -> None:
        self._coordinator = coordinator
        self._supervisor = supervisor
        self._sampling = sampling
        self._create_worker = create_worker

    @classmethod
    def start(cls, run_name: str, config_folder: str, model: ModelConfig, sampling: SamplingConfig,
              groups_per_lease: int, *, on_event: Callable[[str, dict[str, Any]], None], stacks_folder: str,
              build_engine: EngineBuilder = build_engine) -> RolloutSystem:
        """Creates the actors and returns at once; what goes wrong in them is mended, or raised by every take.

        Args:
            run_name: the Ray namespace of the run.
            config_folder: folder with the model's transformers ``config.json``, readable on all workers' hosts.
            on_event: called with (event, details), from a thread: see :class:`Supervisor`.
            stacks_folder: where a worker that hangs writes the stacks of its threads; made when needed.
            build_engine: a top-level function, called in every worker's process.

        Raises:
            ClusterError: this Ray has too few CPUs or GPUs for the workers.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        rollout = sampling.rollout
        if problems := shortages(rollout):
            raise ClusterError("; ".join(problems))
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = ray.remote(Coordinator).options(  # on this host: the loss of another one is no loss of it
            name=COORDINATOR_NAME, namespace=run_name, num_cpus=0, scheduling_strategy=here,
        ).remote(rollout, groups_per_lease)
        worker_class = ray.remote(RolloutWorker).options(
            num_cpus=rollout.threads_per_worker, num_gpus=rollout.gpus_per_worker)

        def create_worker(sampling: SamplingConfig, worker_id: str) -> Any:
            return worker_class.remote(
                worker_id, coordinator, config_folder, model, sampling, stacks_folder, build_engine)

        create_first = functools.partial(create_worker, sampling)
        supervisor = Supervisor(coordinator, create_first, rollout, stacks_folder, on_event)
        return cls(coordinator, supervisor, sampling, create_worker)

    def fall_back(self, reason: str) -> None:
        """Ends all workers; those that come now have engine ``hf``. Returns when none of the old ones can deliver.

        Raises:
            RolloutFailure: all workers are given up, or the coordinator is lost.
            RolloutTimeout: not so within ``rollout.timeout_seconds``.
        """
        rollout = self._sampling.rollout.model_copy(update={"engine": "hf"})
        self._sampling = dataclasses.replace(self._sampling, rollout=rollout)
        self._supervisor.replace_all(functools.partial(self._create_worker, self._sampling), reason)

    def stop(self) -> None:
        """Lets idle workers end by themselves, ends the others after a short grace, then the coordinator."""
        import ray

        self._supervisor.stop()
        with contextlib.suppress(RolloutFailure, RolloutTimeout):  # it is gone or stuck: all are ended below anyway
            wait_for(self._coordinator.stop.remote(), STOP_GRACE_SECONDS, "rank 0", "the coordinator to stop")
        self._supervisor.end_workers(STOP_GRACE_SECONDS)
        ray.kill(self._coordinator)

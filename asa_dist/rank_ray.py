"""A trainer rank's part in Ray: joining it, or starting one; rank 0 owns the actors of the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from asa_dist.collaborators import RolloutFeed
    from asa_dist.rollout.cluster import RayHandle
    from asa_dist.rollout.system import RolloutSystem
    from asa_dist.runtime.engine import Placement, TrainEngine
    from asa_dist.runtime.watchdog import Watchdog


@contextmanager
def joined_ray(config: Config, placement: Placement, address: str | None, num_parameters: int) -> Iterator[None]:
    """This rank's connection to Ray; without an address rank 0 starts one, tells the others, and ends it."""
    from asa_dist.rollout.cluster import connection

    handle = None
    if address is None:
        handle, address, environment = _start_ray_together(config, placement, num_parameters)
        os.environ.update(environment)
    with connection(address, handle):
        yield


def _start_ray_together(
    config: Config, placement: Placement, num_parameters: int
) -> tuple[RayHandle | None, str, dict[str, str]]:
    """(handle on rank 0, address, environment to connect with); what fails on rank 0 is raised on all ranks."""
    import torch.distributed as dist

    from asa_dist.rollout.cluster import ClusterError, start_local_ray

    launcher_says = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, deepspeed's
    if int(launcher_says or placement.num_ranks) != placement.num_ranks:
        raise ConfigError("ranks on several machines need one Ray across them: start it and pass --ray-address")
    if config.rollout.gpus_per_worker:
        raise ConfigError(
            "rollout.gpus_per_worker: started without `asa train`, the launcher owns the GPUs; "
            "start Ray with the rollout GPUs and pass --ray-address"
        )
    handle = None
    told: list[tuple[str, dict[str, str], str]] = [("", {}, "")]
    if placement.rank == 0:
        num_cpus = config.rollout.workers * config.rollout.threads_per_worker
        try:
            handle = start_local_ray(num_cpus, 0, object_store_bytes(num_parameters, config.model.dtype))
            told = [(handle.address, handle.environment, "")]
        except ClusterError as error:
            told = [("", {}, str(error))]
    dist.broadcast_object_list(told, src=0)
    address, environment, problem = told[0]
    if problem:
        raise ClusterError(problem)
    return handle, address, environment


def object_store_bytes(num_parameters: int, dtype: str) -> int:
    """Room for four versions of the generator (published, being published, held by workers), and for groups."""
    bytes_each = 2 if dtype == "bfloat16" else 4
    return 4 * bytes_each * num_parameters + 256 * 2**20


@contextmanager
def rollout_actors(
    config: Config, run_dir: Path, trunk: Any, eos_token_id: int, on_event: Callable[..., None]
) -> Iterator[RolloutSystem]:
    """Rank 0: coordinator and workers, as long as the context lasts."""
    from asa_dist.rollout.engine import SamplingConfig
    from asa_dist.rollout.system import RolloutSystem

    folder = run_dir / "model"
    trunk.save_pretrained(folder)
    system = RolloutSystem.start(
        run_name=str(run_dir.resolve()),
        config_folder=str(folder.resolve()),
        model=config.model,
        sampling=SamplingConfig(config.rollout, config.seed, eos_token_id),
        groups_per_lease=config.groups_per_lease,
        on_event=lambda event, details: on_event(event, **details),
        stacks_folder=str((run_dir / "stacks").resolve()),
    )
    try:
        yield system
    finally:
        system.stop()


@contextmanager
def rollout_feed(
    config: Config, run_dir: Path, placement: Placement, engine: TrainEngine, watchdog: Watchdog,
    on_event: Callable[..., None], system: RolloutSystem | None,
) -> Iterator[RolloutFeed]:
    """This rank's end of the rollouts; rank 0 also has the prompts and the actors' system."""
    from asa_dist.collaborators import RolloutFeed
    from asa_dist.rollout.client import RolloutClient
    from asa_dist.runtime.data.prompts import PromptStream

    rank, rollout = placement.rank, config.rollout
    client = RolloutClient(
        str(run_dir.resolve()), rank, placement.num_ranks, engine.generator_shapes, config.model.dtype,
        rollout.timeout_seconds, on_event=lambda event, details: on_event(event, **details),
    )
    prompts = PromptStream(run_dir, config.data, rollout, config.seed) if rank == 0 else None
    try:
        yield RolloutFeed(client, prompts, rollout, engine, watchdog, system)
    finally:
        client.close()

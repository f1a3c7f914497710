"""Who runs on which nodes of a SLURM job: nodes that train come first, nodes that only generate last."""

from __future__ import annotations

from dataclasses import dataclass

from asa_dist.config import Config, ConfigError, RolloutConfig


@dataclass(frozen=True)
class JobLayout:
    """Numbers of nodes, and what each kind of them has.

    Attributes:
        num_nodes: of the job, all of them.
        num_rollout_nodes: of these, that only generate; 0 = every node trains and generates.
        gpus_per_node: on every node; 0 = the run is on CPUs.
        ranks_per_node: trainer ranks on each node that trains; they have its first GPUs.
        workers_per_node: rollout workers on each node that generates, at most.
        ray_cpus_per_node, ray_gpus_per_node: what those may use there; the last GPUs, with `rollout.placement` shared
            the first ones.
    """

    num_nodes: int
    num_rollout_nodes: int
    gpus_per_node: int
    ranks_per_node: int
    workers_per_node: int
    ray_cpus_per_node: int
    ray_gpus_per_node: int

    @property
    def num_trainer_nodes(self) -> int:
        return self.num_nodes - self.num_rollout_nodes

    @property
    def num_ranks(self) -> int:
        return self.num_trainer_nodes * self.ranks_per_node


def plan_layout(
    config: Config, origin: str, num_nodes: int, num_rollout_nodes: int = 0, gpus_per_node: int = 0
) -> JobLayout:
    """
    Args:
        config: `train.ranks` are those of one node; with GPUs there is one per GPU that no worker has for itself.
        origin: the config's name in messages.

    Raises:
        ConfigError: it does not fit on these nodes.
    """
    rollout, train = config.rollout, config.train
    _check_nodes(config, origin, num_nodes, num_rollout_nodes, gpus_per_node)
    workers = -(-rollout.workers // (num_rollout_nodes or num_nodes))
    ray_cpus, ray_gpus = workers * rollout.threads_per_worker, workers * rollout.gpus_per_worker
    if config.method == "udasa":  # it starts its stages itself, one after the other on the same GPUs
        return JobLayout(num_nodes, 0, gpus_per_node, config.num_ranks, workers, ray_cpus, 0)
    num_ranks = train.ranks
    is_shared = rollout.placement == "shared"
    if gpus_per_node:
        num_ranks = gpus_per_node if num_rollout_nodes or is_shared else gpus_per_node - ray_gpus
    if ray_gpus > gpus_per_node or num_ranks < 1:
        whose, advice = "of a node, beside one trainer rank at least", "or more --rollout-nodes"
        if num_rollout_nodes:
            whose = "of a node that only generates"
        elif is_shared:
            whose, advice = "of a node, which ranks have, too", "or more --nodes"
        raise ConfigError(
            f"{origin}: rollout.workers = {rollout.workers} x rollout.gpus_per_worker = {rollout.gpus_per_worker} need "
            f"{ray_gpus} GPUs {whose}; --gpus-per-node is {gpus_per_node}: fewer workers, {advice}"
        )
    return JobLayout(num_nodes, num_rollout_nodes, gpus_per_node, num_ranks, workers, ray_cpus, ray_gpus)


def _check_nodes(config: Config, origin: str, num_nodes: int, num_rollout_nodes: int, gpus_per_node: int) -> None:
    workers, gpus = config.rollout.workers, config.train.gpus
    is_shared = config.rollout.placement == "shared"
    if is_shared and num_rollout_nodes:
        raise ConfigError(
            f"{origin}: rollout.placement = 'shared': every node trains and generates, in turns: no --rollout-nodes "
            f"{num_rollout_nodes}, or rollout.placement=separate"
        )
    if config.method == "udasa" and num_nodes > 1:
        raise ConfigError(f"{origin}: method = 'udasa' runs on one node for now: --nodes {num_nodes} is too many")
    if num_rollout_nodes >= num_nodes:
        raise ConfigError(f"--rollout-nodes {num_rollout_nodes} of --nodes {num_nodes} only generate: none trains")
    if num_rollout_nodes > workers:
        raise ConfigError(f"{origin}: rollout.workers = {workers}: --rollout-nodes {num_rollout_nodes} are too many")
    if gpus and not gpus_per_node:
        raise ConfigError(f"{origin}: train.gpus = {gpus}: say how many GPUs a node has, with --gpus-per-node")
    if config.rollout.gpus_per_worker and not num_rollout_nodes and workers % num_nodes:
        elsewhere = "" if is_shared else ", or have nodes of their own by --rollout-nodes"
        raise ConfigError(
            f"{origin}: rollout.workers = {workers} share the GPUs of {num_nodes} nodes with the trainer: must be a "
            f"multiple of {num_nodes}{elsewhere}"
        )


def who_is_where(config: Config, layout: JobLayout) -> list[str]:
    """A line for the nodes that train, one for those that generate; columns are aligned."""
    train, rollout = config.train, config.rollout
    first_generating = layout.num_trainer_nodes + 1 if layout.num_rollout_nodes else 1
    ranks = f"{counted(layout.num_ranks, 'trainer rank')}, {layout.ranks_per_node} per node"
    rank_gpus, worker_gpus = layout.ranks_per_node, layout.ray_gpus_per_node
    if layout.gpus_per_node:
        ranks += f" on {gpu_names(0, rank_gpus)}"
    workers = f"{counted(rollout.workers, 'rollout worker')}, {layout.workers_per_node} per node"
    if worker_gpus:
        first = 0 if rollout.placement == "shared" else layout.gpus_per_node - worker_gpus
        workers += f" on {gpu_names(first, first + worker_gpus)}"
    workers += in_turns(rollout)
    rows = [
        (_nodes(1, layout.num_trainer_nodes), f"{ranks}; ZeRO stage {train.zero_stage}"),
        (_nodes(first_generating, layout.num_nodes), f"{workers}; engine {rollout.engine}"),
    ]
    width = max(len(nodes) for nodes, _ in rows)
    return [f"  {nodes:{width}}  {what}" for nodes, what in rows]


def _nodes(first: int, last: int) -> str:
    return f"node {first}" if first == last else f"nodes {first} to {last}"


def gpu_names(first: int, end: int) -> str:
    """Without the last one."""
    return f"GPU {first}" if end == first + 1 else f"GPUs {first} to {end - 1}"


def in_turns(rollout: RolloutConfig) -> str:
    """Of its workers, for people."""
    return ", in turns with the ranks" if rollout.placement == "shared" else ""


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

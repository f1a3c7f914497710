"""What the deepspeed launcher, torchrun and srun start: builds one rank's parts and runs the loop.

    asa train CONFIG                                   starts Ray and the launcher, which start this
    deepspeed --module asa_dist.train CONFIG           the same without `asa`: rank 0 starts Ray
    torchrun --nproc-per-node N -m asa_dist.train CONFIG

Of UDASA, the training of one round: CONFIG is RUN/round-K/config.yaml, --run-dir RUN/round-K.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from asa_dist.config import Config, ConfigError, build_config, load_config
from asa_dist.runtime.stopping import (
    ENDED_EARLY,
    EXIT_BAD_CONFIG,
    EXIT_ENDED_EARLY,
    EXIT_FAILED,
    EXIT_TAKEN_OVER,
    GO_ON,
    StopRequests,
)

if TYPE_CHECKING:
    from asa_dist.rank import OpenRun, Rank
    from asa_dist.runtime.engine import Placement

END_TIMEOUT_SECONDS = 60.0  # for the parts of a run to end, each of which has a deadline of its own


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asa_dist.train", description="One trainer rank, started by a launcher."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--run-dir", type=Path, help="run folder (default: runs/<config name>), shared by all ranks")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint, if any")
    parser.add_argument(
        "--prepared", action="store_true", help="the run folder is prepared, and held by what starts the ranks"
    )
    parser.add_argument(
        "--started-at", type=float, metavar="SECONDS", default=time.time(),
        help="Unix time at which the run was started (default: now)",
    )
    parser.add_argument("--ray-address", help="host:port of a running Ray; without it rank 0 starts one here")
    # the launcher's; we read LOCAL_RANK
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def find_placement(config: Config) -> Placement:
    """This process's place, from the launcher's environment.

    Raises:
        ConfigError: not started by a launcher, or a device that is not there.
    """
    from asa_dist.runtime.rendezvous import follow_slurm

    follow_slurm()
    try:
        rank, local_rank, num_ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except KeyError as error:
        raise ConfigError(
            f"{error} is not set: start with `asa train`, `deepspeed --module asa_dist.train`, "
            "`torchrun -m asa_dist.train`, or srun with MASTER_ADDR and MASTER_PORT exported"
        ) from None
    import torch

    from asa_dist.runtime.engine import Placement

    if config.train.gpus and torch.cuda.device_count() <= local_rank:
        raise ConfigError(
            f"train.gpus = {config.train.gpus}: local rank {local_rank} finds {torch.cuda.device_count()} CUDA devices"
        )
    return Placement(
        rank, local_rank, num_ranks, torch.device("cuda", local_rank) if config.train.gpus else torch.device("cpu")
    )


def adapt_to_launcher(config: Config, num_ranks: int) -> Config:
    """The launcher decides how many ranks there are; the rules that depend on it are checked again."""
    if num_ranks == config.num_ranks:
        return config
    tree = config.model_dump()
    tree["train"]["gpus" if config.train.gpus else "ranks"] = num_ranks
    return build_config(tree, f"config with the {num_ranks} ranks that the launcher started")


def train(options: argparse.Namespace, config: Config, run_dir: Path, placement: Placement, started: float) -> int:
    """One rank, from the process group to the last checkpoint.

    Args:
        started: ``time.monotonic()`` when the run was started.

    Returns:
        The exit code: 0, or EXIT_ENDED_EARLY.
    """
    import torch
    import torch.distributed as dist

    from asa_dist.rank import Rank
    from asa_dist.run_folder import prepared_together, taken_over_together
    from asa_dist.runtime.engine import describe_lost_peer, is_lost_peer, join_process_group
    from asa_dist.runtime.watchdog import Watchdog

    torch.set_num_threads(config.train.threads_per_rank)
    with ExitStack() as parts:
        stopping = StopRequests(run_dir, placement.rank, config.train.max_wall_time_minutes, started)
        parts.enter_context(stopping)
        join_process_group(placement, config.train.collective_timeout_seconds)
        if not options.prepared:
            parts.enter_context(prepared_together(
                config, run_dir, placement.rank, resume=options.resume, started_at=options.started_at))  # fmt: skip
        ownership = taken_over_together(run_dir, placement.rank)
        watchdog = parts.enter_context(Watchdog(run_dir, placement.rank))
        try:
            code = _train_prepared(Rank(config, run_dir, ownership, placement, options, stopping, watchdog))
        except RuntimeError as error:
            if is_lost_peer(error):
                watchdog.dump(describe_lost_peer(error, placement.rank), error)
            raise
        with watchdog.phase("waiting for the other ranks to end", END_TIMEOUT_SECONDS):
            dist.barrier()  # a launcher ends the other ranks when one leaves with a code: nobody before all are done
            dist.destroy_process_group()
    return code


def _train_prepared(rank: Rank) -> int:
    """Opens the parts, runs the loop, closes the parts; returns the exit code."""
    parts = ExitStack()
    try:
        opened = _open(rank, parts)
        stop, recorder, step = opened.run(), opened.recorder, opened.loop.finished
        is_finished = opened.is_finished()
        if is_finished:
            recorder.event("finished", step=step)
        elif stop != GO_ON:
            recorder.say(f"asa: stopped after step {step}: {rank.stopping.reason()}")
            recorder.event("stopped", step=step, reason=rank.stopping.reason())
    finally:
        # a Ray that stands still keeps whoever leaves it: then this phase is what the user gets to read
        after = f", after: {sys.exception()}" if sys.exception() else ""
        with rank.watchdog.phase(f"ending rollouts and leaving Ray{after}", END_TIMEOUT_SECONDS):
            parts.close()
    return EXIT_ENDED_EARLY if stop == ENDED_EARLY and not is_finished else 0


def _open(rank: Rank, parts: ExitStack) -> OpenRun:
    """The method's parts; ``parts``: is given whatever has to be closed."""
    match rank.config.method:
        case "asa":
            from asa_dist.asa_parts import open_asa

            return open_asa(rank, parts)
        case "udasa":
            from asa_dist.udasa_parts import open_udasa

            return open_udasa(rank, parts)


def _complain(error: Exception) -> None:
    """What all ranks find wrong is said once per host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"asa: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished or stopped by `asa train`, 1 failed, 2 the config cannot be used, 75 ended early,
    76 a later start has taken over."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    started = time.monotonic() - (time.time() - options.started_at)
    try:
        config = load_config(options.config, options.overrides)
        if not config.train.gpus:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by deepspeed at its import
        placement = find_placement(config)
        config = adapt_to_launcher(config, placement.num_ranks)
    except ConfigError as error:
        _complain(error)
        return EXIT_BAD_CONFIG
    from asa_dist.asa.errors import RolloutsUnavailable, TrainingError
    from asa_dist.rollout.cluster import ClusterError
    from asa_dist.rollout.coordinator import RolloutFailure
    from asa_dist.runtime.checkpoint_files import CheckpointError
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.engine import describe_lost_peer, is_lost_peer
    from asa_dist.runtime.model import ModelError
    from asa_dist.runtime.ownership import TakenOver

    run_dir = options.run_dir or Path("runs") / Path(options.config).stem
    try:
        return train(options, config, run_dir, placement, started)
    except (ConfigError, DataError, ModelError, CheckpointError) as error:
        _complain(error)
        return EXIT_BAD_CONFIG
    except TakenOver as error:
        _complain(error)
        return EXIT_TAKEN_OVER
    except (TrainingError, RolloutsUnavailable, RolloutFailure, ClusterError, TimeoutError) as error:
        print(f"asa: rank {placement.rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"asa: {describe_lost_peer(error, placement.rank)}", file=sys.stderr, flush=True)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())

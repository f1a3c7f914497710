"""What the deepspeed launcher, torchrun and srun start: builds one rank's parts and runs the loop.

    asa train CONFIG                                   starts Ray and the launcher, which start this
    deepspeed --module asa_dist.train CONFIG           the same without `asa`: rank 0 starts Ray
    torchrun --nproc-per-node N -m asa_dist.train CONFIG
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError, build_config, load_config

if TYPE_CHECKING:
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.collaborators import PeriodicCheckpoints, RolloutFeed
    from asa_dist.runtime.engine import Placement, TrainEngine
    from asa_dist.runtime.metrics import RunRecorder, SilentRecorder
    from asa_dist.runtime.stopping import StopRequests
    from asa_dist.runtime.watchdog import Watchdog

EXIT_FAILED, EXIT_BAD_CONFIG = 1, 2


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
    parser.add_argument("--ray-address", help="host:port of a running Ray; without it rank 0 starts one here")
    # the launcher's; we read LOCAL_RANK
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def find_placement(config: Config) -> Placement:
    """This process's place, from the launcher's environment.

    Raises:
        ConfigError: not started by a launcher, or a device that is not there.
    """
    try:
        rank, local_rank, num_ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except KeyError as error:
        raise ConfigError(
            f"{error} is not set: start with `asa train`, `deepspeed --module asa_dist.train` or "
            "`torchrun -m asa_dist.train`"
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


def doubtful_settings(config: Config) -> list[str]:
    """What is allowed, but seldom meant."""
    doubts = []
    rollout, warmup_steps, steps = config.rollout, config.optimizer.warmup_steps, config.train.steps
    if config.objective.importance != "none" and (rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0):
        doubts.append(
            f"rollout.top_p = {rollout.top_p}, top_k = {rollout.top_k}, min_p = {rollout.min_p} truncate sampling, but "
            "log-probabilities are those before truncation: the off-policy correction is biased; turn truncation off, "
            "or set objective.importance=none"
        )
    if warmup_steps >= steps:
        doubts.append(
            f"optimizer.warmup_steps = {warmup_steps}, train.steps = {steps}: the run ends within the warm-up, with "
            f"learning rates of {100 * steps / warmup_steps:.3g} % of their peak"
        )
    return doubts


def _headline(config: Config, placement: Placement, counts: dict[str, int]) -> str:
    parameters = f"ψ {counts['psi']:,}, φ {counts['phi']:,}, ξ {counts['xi']:,} parameters"
    attention = config.model.attention_implementation(placement.device.type == "cuda")
    ranks = f"{placement.num_ranks} ranks, ZeRO-{config.train.zero_stage}, {config.model.dtype}, attention {attention}"
    workers = f"{config.rollout.workers} rollout worker(s), engine {config.rollout.engine}"
    return f"{parameters}; {ranks}, device {placement.device.type}; {workers}"


@contextmanager
def _recorder(
    config: Config, run_dir: Path, rank: int, first_step: int, decode: Any
) -> Iterator[RunRecorder | SilentRecorder]:
    """Rank 0 writes and shows, from after ``first_step`` steps on; the others are silent."""
    from asa_dist.runtime.metrics import ProgressLine, RunRecorder, SilentRecorder
    from asa_dist.runtime.run_log import truncate_logs

    if rank != 0:
        yield SilentRecorder()
        return
    truncate_logs(run_dir, first_step)  # what came after will be trained again
    recorder = RunRecorder(run_dir, config.metrics, decode, ProgressLine(config.train.steps, first_step))
    try:
        yield recorder
    finally:
        recorder.close()


def train(options: argparse.Namespace, config: Config, run_dir: Path, placement: Placement, started: float) -> int:
    """One rank, from the process group to the last checkpoint.

    Args:
        started: ``time.monotonic()`` of the process's start.

    Returns:
        The exit code: 0, or EXIT_ENDED_EARLY.
    """
    import torch
    import torch.distributed as dist

    from asa_dist.run_folder import prepared_together
    from asa_dist.runtime.engine import describe_lost_peer, is_lost_peer, join_process_group
    from asa_dist.runtime.stopping import StopRequests
    from asa_dist.runtime.watchdog import Watchdog

    torch.set_num_threads(config.train.threads_per_rank)
    with ExitStack() as parts:
        stopping = parts.enter_context(
            StopRequests(run_dir, placement.rank, config.train.max_wall_time_minutes, started)
        )
        join_process_group(placement, config.train.collective_timeout_seconds)
        if not options.prepared:
            parts.enter_context(prepared_together(config, run_dir, placement.rank, options.resume))
        watchdog = parts.enter_context(Watchdog(run_dir, placement.rank))
        try:
            code = _train_prepared(options, config, run_dir, placement, stopping, watchdog)
        except RuntimeError as error:
            if is_lost_peer(error):
                watchdog.dump(describe_lost_peer(error, placement.rank), error)
            raise
        dist.barrier()  # a launcher ends the other ranks when one leaves with a code: nobody before all are done
        dist.destroy_process_group()
    return code


def _train_prepared(
    options: argparse.Namespace, config: Config, run_dir: Path, placement: Placement, stopping: StopRequests,
    watchdog: Watchdog,
) -> int:
    from asa_dist.asa.loop import GO_ON
    from asa_dist.collaborators import PeriodicCheckpoints, WatchedEngine
    from asa_dist.rank_ray import joined_ray, rollout_actors, rollout_feed
    from asa_dist.runtime.checkpoint import Checkpointer
    from asa_dist.runtime.data.prepare import prepare
    from asa_dist.runtime.data.tokenizer import load_tokenizer
    from asa_dist.runtime.model import build_model, count_parameters
    from asa_dist.runtime.stopping import ENDED_EARLY, EXIT_ENDED_EARLY

    rank = placement.rank
    data = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: None)
    tokenizer = load_tokenizer(run_dir)
    model = build_model(config, data.vocab_size, data.eos_id, placement.device.type == "cuda")
    counts, trunk = count_parameters(model), model.lm.config
    with ExitStack() as parts:
        parts.enter_context(joined_ray(config, placement, options.ray_address, counts["psi"]))
        engine = WatchedEngine(model, config.train, config.optimizer, config.model.dtype, placement, watchdog)
        damaged: dict[str, str] = {}
        checkpointer = Checkpointer(run_dir, config.checkpoint, engine, damaged.__setitem__)
        loaded = checkpointer.load() if options.resume else None
        first_step = loaded.step if loaded else 0
        recorder = parts.enter_context(_recorder(config, run_dir, rank, first_step, tokenizer.decode))
        _announce(recorder, config, placement, counts, first_step, options.resume, damaged)
        if rank == 0:
            parts.enter_context(rollout_actors(config, run_dir, trunk, data.eos_id, recorder.event))
        feed = parts.enter_context(rollout_feed(config, run_dir, placement, engine, watchdog, recorder.event))
        checkpoints = PeriodicCheckpoints(
            checkpointer, config.checkpoint, feed, recorder, stopping, watchdog, first_step
        )
        loop = _build_loop(config, run_dir, placement, engine, feed, recorder, checkpoints, stopping, tokenizer)
        if loaded is not None:
            loop.load_state_dict(loaded.step, loaded.loop_state)
            feed.restore(loaded.rollouts, loaded.step)
        stop = loop.run(config.train.steps)
        if loop.finished == config.train.steps:
            recorder.event("finished", step=loop.finished)
        elif stop != GO_ON:
            recorder.say(f"asa: stopped after step {loop.finished}: {stopping.reason()}")
            recorder.event("stopped", step=loop.finished, reason=stopping.reason())
        engine.close()
    return EXIT_ENDED_EARLY if stop == ENDED_EARLY and loop.finished < config.train.steps else 0


def _announce(
    recorder: RunRecorder | SilentRecorder, config: Config, placement: Placement, counts: dict[str, int],
    first_step: int, resumed: bool, damaged: dict[str, str],
) -> None:
    for name, reason in damaged.items():
        recorder.say(f"asa: warning: checkpoint {name} is damaged and was not used: {reason}")
        recorder.event("checkpoint_damaged", name=name, reason=reason)
    recorder.say(_headline(config, placement, counts))
    for warning in doubtful_settings(config):
        recorder.say(f"asa: warning: {warning}")
    if damaged:
        recorder.say(f"going on after step {first_step} instead")
    layout = {"ranks": placement.num_ranks, "zero_stage": config.train.zero_stage}
    recorder.event("resumed" if resumed else "started", step=first_step, **layout)


def _build_loop(
    config: Config, run_dir: Path, placement: Placement, engine: TrainEngine, feed: RolloutFeed,
    recorder: RunRecorder | SilentRecorder, checkpoints: PeriodicCheckpoints, stopping: StopRequests, tokenizer: Any,
) -> AsaLoop:
    """The loop and its collaborators."""
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.asa.trust import AlignmentState
    from asa_dist.runtime.data.feed import CorpusFeed
    from asa_dist.runtime.data.tokenizer import token_tables
    from asa_dist.runtime.engine import learning_rates

    rank, num_ranks = placement.rank, placement.num_ranks
    model = engine.engine.module
    return AsaLoop(
        config=config, rank=rank, num_ranks=num_ranks, device=placement.device,
        state=AlignmentState(config.evaluator, model.lm.config.hidden_size), engine=engine,
        tables=token_tables(tokenizer, model.vocab_size),
        corpus=CorpusFeed(run_dir, config.data, config.train, config.seed, model.vocab_size, rank, num_ranks,
                          engine.sum_over_ranks),
        rollouts=feed,
        recorder=recorder,
        checkpoints=checkpoints,
        learning_rates=lambda step: learning_rates(step, config.train.steps, config.optimizer),
        stop_code=stopping.code,
    )


def _complain(error: Exception) -> None:
    """What all ranks find wrong is said once per host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"asa: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished or stopped by `asa train`, 1 failed, 2 the config cannot be used, 75 ended early."""
    started = time.monotonic()
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
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

    run_dir = options.run_dir or Path("runs") / Path(options.config).stem
    try:
        return train(options, config, run_dir, placement, started)
    except (ConfigError, DataError, ModelError, CheckpointError) as error:
        _complain(error)
        return EXIT_BAD_CONFIG
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

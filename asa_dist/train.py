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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError, build_config, load_config
from asa_dist.runtime.stopping import ENDED_EARLY, EXIT_BAD_CONFIG, EXIT_ENDED_EARLY, EXIT_FAILED, GO_ON, StopRequests

if TYPE_CHECKING:
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.collaborators import PeriodicCheckpoints, RolloutFeed
    from asa_dist.runtime.engine import Placement, TrainEngine
    from asa_dist.runtime.metrics import RunRecorder, SilentRecorder
    from asa_dist.runtime.watchdog import Watchdog

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
    parser.add_argument("--started-at", type=float, metavar="SECONDS", help="Unix time at which the run was started")
    parser.add_argument("--ray-address", help="host:port of a running Ray; without it rank 0 starts one here")
    # the launcher's; we read LOCAL_RANK
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def find_placement(config: Config) -> Placement:
    """This process's place, from the launcher's environment.

    Raises:
        ConfigError: not started by a launcher, or a device that is not there.
    """
    _follow_slurm()
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


def _follow_slurm() -> None:
    """srun numbers its tasks in variables of its own; deepspeed, too, reads torch's."""
    slurm = os.environ
    if "RANK" not in slurm and "SLURM_PROCID" in slurm:
        num_ranks, num_hosts = int(slurm["SLURM_NTASKS"]), int(slurm["SLURM_NNODES"])
        slurm |= {"RANK": slurm["SLURM_PROCID"], "LOCAL_RANK": slurm["SLURM_LOCALID"], "WORLD_SIZE": str(num_ranks),
                  "LOCAL_WORLD_SIZE": str(num_ranks // num_hosts)}


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


@dataclass(frozen=True)
class Rank:
    """What one rank is told, and who watches over it."""

    config: Config
    run_dir: Path
    placement: Placement
    options: argparse.Namespace
    stopping: StopRequests
    watchdog: Watchdog

    @property
    def is_first(self) -> bool:
        return self.placement.rank == 0


def train(options: argparse.Namespace, config: Config, run_dir: Path, placement: Placement, started: float) -> int:
    """One rank, from the process group to the last checkpoint.

    Args:
        started: ``time.monotonic()`` when the run was started.

    Returns:
        The exit code: 0, or EXIT_ENDED_EARLY.
    """
    import torch
    import torch.distributed as dist

    from asa_dist.run_folder import prepared_together
    from asa_dist.runtime.engine import describe_lost_peer, is_lost_peer, join_process_group
    from asa_dist.runtime.watchdog import Watchdog

    torch.set_num_threads(config.train.threads_per_rank)
    with ExitStack() as parts:
        stopping = StopRequests(run_dir, placement.rank, config.train.max_wall_time_minutes, started)
        parts.enter_context(stopping)
        join_process_group(placement, config.train.collective_timeout_seconds)
        if not options.prepared:
            parts.enter_context(prepared_together(config, run_dir, placement.rank, options.resume))
        watchdog = parts.enter_context(Watchdog(run_dir, placement.rank))
        try:
            code = _train_prepared(Rank(config, run_dir, placement, options, stopping, watchdog))
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
        loop, recorder = _open_parts(rank, parts)
        stop = loop.run(rank.config.train.steps)
        is_finished = loop.finished == rank.config.train.steps
        if is_finished:
            recorder.event("finished", step=loop.finished)
        elif stop != GO_ON:
            recorder.say(f"asa: stopped after step {loop.finished}: {rank.stopping.reason()}")
            recorder.event("stopped", step=loop.finished, reason=rank.stopping.reason())
    finally:
        # a Ray that stands still keeps whoever leaves it: then this phase is what the user gets to read
        after = f", after: {sys.exception()}" if sys.exception() else ""
        with rank.watchdog.phase(f"ending rollouts and leaving Ray{after}", END_TIMEOUT_SECONDS):
            parts.close()
    return EXIT_ENDED_EARLY if stop == ENDED_EARLY and not is_finished else 0


def _open_parts(rank: Rank, parts: ExitStack) -> tuple[AsaLoop, RunRecorder | SilentRecorder]:
    """Ray, the model, what was saved of it, logs, rollouts; and the loop that joins them."""
    from asa_dist.collaborators import PeriodicCheckpoints, WatchedEngine
    from asa_dist.rank_ray import joined_ray, rollout_actors, rollout_feed
    from asa_dist.runtime.checkpoint import Checkpointer
    from asa_dist.runtime.data.prepare import prepare
    from asa_dist.runtime.data.tokenizer import load_tokenizer
    from asa_dist.runtime.model import build_model, count_parameters

    config, run_dir, placement, watchdog = rank.config, rank.run_dir, rank.placement, rank.watchdog
    data = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: None)
    tokenizer = load_tokenizer(run_dir)
    model = build_model(config, data.vocab_size, data.eos_id, placement.device.type == "cuda")
    counts, trunk = count_parameters(model), model.lm.config
    parts.enter_context(joined_ray(config, placement, rank.options.ray_address, counts["psi"]))
    engine = WatchedEngine(model, config.train, config.optimizer, config.model.dtype, placement, watchdog)
    parts.callback(engine.close)
    damaged: dict[str, str] = {}
    checkpointer = Checkpointer(run_dir, config.checkpoint, engine, damaged.__setitem__)
    loaded = checkpointer.load() if rank.options.resume else None
    first_step = loaded.step if loaded else 0
    recorder = parts.enter_context(_recorder(rank, first_step, tokenizer.decode))
    _announce(rank, recorder, counts, first_step, damaged)
    if rank.is_first:
        parts.enter_context(rollout_actors(config, run_dir, trunk, data.eos_id, recorder.event))
    feed = parts.enter_context(rollout_feed(config, run_dir, placement, engine, watchdog, recorder.event))
    checkpoints = PeriodicCheckpoints(
        checkpointer, config.checkpoint, feed, recorder, rank.stopping, watchdog, first_step
    )
    loop = _build_loop(rank, engine, feed, recorder, checkpoints, tokenizer)
    if loaded is not None:
        loop.load_state_dict(loaded.step, loaded.loop_state)
        feed.restore(loaded.rollouts, loaded.step)
    return loop, recorder


@contextmanager
def _recorder(rank: Rank, first_step: int, decode: Any) -> Iterator[RunRecorder | SilentRecorder]:
    """Rank 0 writes and shows, from after ``first_step`` steps on; the others are silent."""
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.metrics import ProgressLine, RunRecorder, SilentRecorder
    from asa_dist.runtime.run_log import truncate_logs

    if not rank.is_first:
        yield SilentRecorder()
        return
    try:
        # what came after will be trained again; from the beginning on, so will the evaluation before it
        truncate_logs(rank.run_dir, first_step or -1)
        progress = ProgressLine(rank.config.train.steps, first_step)
        recorder = RunRecorder(rank.run_dir, rank.config.metrics, decode, progress)
    except (OSError, ValueError) as error:
        raise DataError(f"the logs in {rank.run_dir} cannot be continued: {error}") from None
    try:
        yield recorder
    finally:
        recorder.close()


def _announce(
    rank: Rank, recorder: RunRecorder | SilentRecorder, counts: dict[str, int], first_step: int, damaged: dict[str, str]
) -> None:
    for name, reason in damaged.items():
        recorder.say(f"asa: warning: checkpoint {name} is damaged and was not used: {reason}")
        recorder.event("checkpoint_damaged", name=name, reason=reason)
    if damaged:
        recorder.say(f"going on after step {first_step} instead")
    recorder.say(_headline(rank.config, rank.placement, counts))
    for warning in doubtful_settings(rank.config):
        recorder.say(f"asa: warning: {warning}")
    layout = {"ranks": rank.placement.num_ranks, "zero_stage": rank.config.train.zero_stage}
    recorder.event("resumed" if rank.options.resume else "started", step=first_step, **layout)


def _build_loop(
    rank: Rank, engine: TrainEngine, feed: RolloutFeed, recorder: RunRecorder | SilentRecorder,
    checkpoints: PeriodicCheckpoints, tokenizer: Any,
) -> AsaLoop:
    """The loop and its collaborators."""
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.asa.trust import AlignmentState
    from asa_dist.runtime.data.feed import CorpusFeed
    from asa_dist.runtime.data.tokenizer import token_tables
    from asa_dist.runtime.engine import learning_rates

    config, placement, model = rank.config, rank.placement, engine.engine.module
    return AsaLoop(
        config=config, rank=placement.rank, num_ranks=placement.num_ranks, device=placement.device,
        state=AlignmentState(config.evaluator, model.lm.config.hidden_size, model.vocab_size), engine=engine,
        tables=token_tables(tokenizer, model.vocab_size),
        corpus=CorpusFeed(rank.run_dir, config.data, config.train, config.seed, model.vocab_size, placement.rank,
                          placement.num_ranks, engine.sum_over_ranks),
        rollouts=feed,
        recorder=recorder,
        checkpoints=checkpoints,
        learning_rates=lambda step: learning_rates(step, config.train.steps, config.optimizer),
        stop_code=rank.stopping.code,
    )


def _complain(error: Exception) -> None:
    """What all ranks find wrong is said once per host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"asa: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished or stopped by `asa train`, 1 failed, 2 the config cannot be used, 75 ended early."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    started = time.monotonic() - (time.time() - options.started_at if options.started_at else 0.0)
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

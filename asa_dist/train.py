"""What the deepspeed launcher, torchrun and srun start: builds one rank's parts and runs the loop.

    asa train CONFIG                                   starts Ray and the launcher, which start this
    deepspeed --module asa_dist.train CONFIG           the same without `asa`: rank 0 starts Ray
    torchrun --nproc-per-node N -m asa_dist.train CONFIG
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError, build_config, dump_config, load_config

if TYPE_CHECKING:
    from asa_dist.asa.loop import AsaLoop, Recorder
    from asa_dist.records import RolloutGroup
    from asa_dist.rollout.client import RolloutClient
    from asa_dist.rollout.cluster import RayHandle
    from asa_dist.runtime.data.prepare import DataSummary
    from asa_dist.runtime.data.prompts import PromptStream
    from asa_dist.runtime.engine import Placement, TrainEngine

EXIT_FAILED, EXIT_BAD_CONFIG = 1, 2


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asa_dist.train", description="One trainer rank, started by a launcher."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--run-dir", type=Path, help="run folder (default: runs/<config name>), shared by all ranks")
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


class RolloutFeed:
    """The loop's view of rollouts: rank 0 hands in prompts, every rank takes its groups and publishes its shard."""

    def __init__(self, client: RolloutClient, prompts: PromptStream | None, prompts_per_step: int, engine: TrainEngine):
        self._client, self._prompts, self._per_step, self._engine = client, prompts, prompts_per_step, engine

    def request(self, step: int) -> None:
        if self._prompts is not None:
            ids = range(step * self._per_step, (step + 1) * self._per_step)
            self._client.submit_prompts(step, [self._prompts.prompt(prompt_id) for prompt_id in ids])

    def take(self, step: int) -> list[RolloutGroup]:
        return self._client.take(step)

    def publish(self, version: int) -> None:
        self._client.publish(version, self._engine.generator_shards())


def prepare_run_folder(config: Config, run_dir: Path) -> DataSummary:
    """Data, tokenizer and resolved config in the run folder. Idempotent; one process does it.

    Raises:
        DataError: content or files that cannot be used, or a run folder that belongs to another run. A run folder
            made for this call is removed again.
    """
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.data.prepare import prepare

    is_new = not run_dir.exists()
    try:
        if (run_dir / "metrics.jsonl").exists():
            raise DataError(f"{run_dir} holds a run already: choose another folder with --run-dir")
        summary = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: print(message, flush=True))
        partial = run_dir / ".config.yaml.tmp"
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(run_dir / "config.yaml")
    except (DataError, OSError) as error:
        if is_new:
            shutil.rmtree(run_dir, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(f"{error.filename or run_dir}: {error.strerror or error}") from None
        raise
    return summary


def _prepare_together(config: Config, run_dir: Path, placement: Placement) -> None:
    """Rank 0 prepares the run folder, unless `asa train` has. Raises :class:`DataError` on all ranks if it cannot."""
    import torch.distributed as dist

    from asa_dist.runtime.data.errors import DataError

    # reading a large corpus takes longer than any collective may: a group of its own to wait in
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    problem: list[str | None] = [None]
    if placement.rank == 0:
        try:
            prepare_run_folder(config, run_dir)
        except DataError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=patient)
    dist.destroy_process_group(patient)
    if problem[0] is not None:
        raise DataError(problem[0])


@contextmanager
def _joined_ray(config: Config, placement: Placement, address: str | None, num_parameters: int) -> Iterator[None]:
    """This rank's connection to Ray; without an address rank 0 starts one, tells the others, and ends it."""
    from asa_dist.rollout.cluster import connect, disconnect

    handle = None
    if address is None:
        handle, address, environment = _start_ray_together(config, placement, num_parameters)
        os.environ.update(environment)
    try:
        connect(address)
        yield
    finally:
        disconnect()
        if handle is not None:
            handle.stop()


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
def _rollout_actors(config: Config, run_dir: Path, trunk: Any, eos_token_id: int) -> Iterator[None]:
    """Rank 0: coordinator and workers, as long as the context lasts."""
    from asa_dist.rollout.cluster import RolloutSystem
    from asa_dist.rollout.engine import SamplingConfig

    folder = run_dir / "model"
    trunk.save_pretrained(folder)
    system = RolloutSystem.start(
        run_name=str(run_dir.resolve()),
        config_folder=str(folder.resolve()),
        model=config.model,
        sampling=SamplingConfig(config.rollout, config.seed, eos_token_id),
        groups_per_lease=config.groups_per_lease,
    )
    try:
        yield
    finally:
        system.stop()


@contextmanager
def _recorder(config: Config, run_dir: Path, placement: Placement, headline: str, decode: Any) -> Iterator[Recorder]:
    """Rank 0 writes and shows; the others are silent."""
    from asa_dist.runtime.metrics import ProgressLine, RunRecorder, SilentRecorder

    if placement.rank != 0:
        yield SilentRecorder()
        return
    progress = ProgressLine(config.train.steps, first_step=0)
    progress.say(headline)
    for warning in doubtful_settings(config):
        progress.say(f"asa: warning: {warning}")
    recorder = RunRecorder(run_dir, config.metrics, decode, progress)
    try:
        yield recorder
    finally:
        recorder.close()


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


def train(config: Config, run_dir: Path, placement: Placement, ray_address: str | None) -> None:
    """One rank, from the process group to the last checkpoint."""
    import torch

    from asa_dist.rollout.client import RolloutClient
    from asa_dist.runtime.data.prepare import prepare
    from asa_dist.runtime.data.tokenizer import load_tokenizer
    from asa_dist.runtime.engine import TrainEngine, join_process_group
    from asa_dist.runtime.model import build_model, count_parameters

    torch.set_num_threads(config.train.threads_per_rank)
    join_process_group(placement, config.train.collective_timeout_seconds)
    _prepare_together(config, run_dir, placement)
    data = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: None)
    tokenizer = load_tokenizer(run_dir)
    model = build_model(config, data.vocab_size, data.eos_id, placement.device.type == "cuda")
    counts, trunk = count_parameters(model), model.lm.config
    with ExitStack() as parts:
        parts.enter_context(_joined_ray(config, placement, ray_address, counts["psi"]))
        engine = TrainEngine(model, config.train, config.optimizer, config.model.dtype, placement)
        if placement.rank == 0:
            parts.enter_context(_rollout_actors(config, run_dir, trunk, data.eos_id))
        headline = _headline(config, placement, counts)
        recorder = parts.enter_context(_recorder(config, run_dir, placement, headline, tokenizer.decode))
        client = RolloutClient(
            str(run_dir.resolve()), placement.rank, placement.num_ranks, engine.generator_shapes, config.model.dtype,
            config.rollout.timeout_seconds,
        )
        loop = _build_loop(config, run_dir, placement, engine, client, recorder, tokenizer)
        loop.run(0, config.train.steps)
        client.wait_published()
        client.close()
    engine.close()


def _build_loop(
    config: Config, run_dir: Path, placement: Placement, engine: TrainEngine, client: RolloutClient, recorder: Recorder,
    tokenizer: Any,
) -> AsaLoop:
    """The loop and its collaborators."""
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.asa.trust import AlignmentState
    from asa_dist.runtime.checkpoint import save_checkpoint
    from asa_dist.runtime.data.feed import CorpusFeed
    from asa_dist.runtime.data.prompts import PromptStream
    from asa_dist.runtime.data.tokenizer import token_tables
    from asa_dist.runtime.engine import learning_rates

    rank, num_ranks = placement.rank, placement.num_ranks
    model = engine.engine.module
    state = AlignmentState(config.evaluator, model.lm.config.hidden_size)
    prompts = PromptStream(run_dir, config.data, config.rollout, config.seed) if rank == 0 else None
    return AsaLoop(
        config=config, rank=rank, num_ranks=num_ranks, device=placement.device, state=state, engine=engine,
        tables=token_tables(tokenizer, model.vocab_size),
        corpus=CorpusFeed(run_dir, config.data, config.train, config.seed, model.vocab_size, rank, num_ranks,
                          engine.sum_over_ranks),
        rollouts=RolloutFeed(client, prompts, config.rollout.prompts_per_step, engine),
        recorder=recorder,
        learning_rates=lambda step: learning_rates(step, config.train.steps, config.optimizer),
        save=lambda step: save_checkpoint(engine, state, step, run_dir),
    )


def _complain(error: Exception) -> None:
    """What all ranks find wrong is said once per host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"asa: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 the config cannot be used."""
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
    from asa_dist.asa.errors import TrainingError
    from asa_dist.rollout.cluster import ClusterError
    from asa_dist.rollout.coordinator import RolloutFailure
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.engine import is_lost_peer
    from asa_dist.runtime.model import ModelError

    run_dir = options.run_dir or Path("runs") / Path(options.config).stem
    try:
        train(config, run_dir, placement, options.ray_address)
    except (ConfigError, DataError, ModelError) as error:
        _complain(error)
        return EXIT_BAD_CONFIG
    except (TrainingError, RolloutFailure, ClusterError, TimeoutError) as error:
        print(f"asa: rank {placement.rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"asa: rank {placement.rank}: lost another rank: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())

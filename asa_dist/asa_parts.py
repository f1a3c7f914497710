"""The parts of ASA-LLM's run on one rank: Ray, the model, what was saved of it, logs, rollouts; and the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

from asa_dist.asa.loop import AsaLoop
from asa_dist.asa.trust import AlignmentState
from asa_dist.collaborators import PeriodicCheckpoints, RolloutFeed, StepProfiler, WatchedEngine
from asa_dist.config import Config, RolloutConfig
from asa_dist.rank import OpenRun, Rank, announce, describe_ranks, open_recorder, silence_transformers
from asa_dist.rank_ray import joined_ray, rollout_actors, rollout_feed
from asa_dist.rollout.engine_choice import chosen_engine, describe_engine
from asa_dist.runtime.checkpoint import Checkpointer
from asa_dist.runtime.data.feed import CorpusFeed
from asa_dist.runtime.data.prepare import prepare
from asa_dist.runtime.data.tokenizer import load_tokenizer, token_tables
from asa_dist.runtime.engine import TrainEngine, learning_rates
from asa_dist.runtime.metrics import RunRecorder, SilentRecorder
from asa_dist.runtime.model import build_model, count_parameters


def open_asa(rank: Rank, parts: ExitStack) -> OpenRun:
    """``parts``: is given whatever has to be closed."""
    config, run_dir, placement, watchdog = rank.config, rank.run_dir, rank.placement, rank.watchdog
    data = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: None)
    tokenizer = load_tokenizer(run_dir)
    silence_transformers(is_shown=rank.is_first)
    model = build_model(config, data.vocab_size, data.eos_id, placement.device.type == "cuda")
    counts, trunk = count_parameters(model), model.lm.config
    parts.enter_context(joined_ray(config, placement, rank.options.ray_address, counts["psi"]))
    engine = WatchedEngine(model, config.train, config.optimizer, config.model.dtype, placement, watchdog)
    parts.callback(engine.close)
    damaged: dict[str, str] = {}
    checkpointer = Checkpointer(rank.ownership, config.checkpoint, engine, damaged.__setitem__)
    loaded = checkpointer.load() if rank.options.resume else None
    first_step = loaded.step if loaded else 0
    recorder = parts.enter_context(open_recorder(rank, first_step, config.train.steps, tokenizer.decode))
    announce(rank, recorder, _headline(rank, counts), doubtful_settings(config), first_step, damaged)
    around_step = _profiler(rank, engine, recorder, parts)
    system = None
    if rank.is_first:
        system = parts.enter_context(rollout_actors(config, run_dir, trunk, data.eos_id, recorder.event))
    feed = parts.enter_context(rollout_feed(config, run_dir, placement, engine, watchdog, recorder.event, system))
    checkpoints = PeriodicCheckpoints(
        checkpointer, config.checkpoint, feed, recorder, rank.stopping, watchdog, first_step
    )
    loop = _build_loop(rank, engine, feed, recorder, checkpoints, tokenizer, around_step)
    if loaded is not None:
        loop.load_state_dict(loaded.step, loaded.loop_state)
        feed.restore(loaded.rollouts, loaded.step)
    num_steps = config.train.steps
    return OpenRun(loop, lambda: loop.run(num_steps), lambda: loop.finished == num_steps, recorder)


def _build_loop(
    rank: Rank, engine: TrainEngine, feed: RolloutFeed, recorder: RunRecorder | SilentRecorder,
    checkpoints: PeriodicCheckpoints, tokenizer: Any, around_step: Callable[[int], AbstractContextManager[None]],
) -> AsaLoop:
    """The loop and its collaborators."""
    config, placement, model = rank.config, rank.placement, engine.engine.module
    return AsaLoop(
        config=config, rank=placement.rank, num_ranks=placement.num_ranks, device=placement.device,
        state=AlignmentState(config.evaluator, model.lm.config.hidden_size, model.vocab_size), engine=engine,
        tables=token_tables(tokenizer, model.vocab_size),
        corpus=CorpusFeed(rank.run_dir, config.data, config.train, config.seed, model.vocab_size, placement.rank,
                          placement.num_ranks, engine.sum_over_ranks),
        rollouts=feed,
        rollout_engine=_agreed_engine(config.rollout, engine),
        recorder=recorder,
        checkpoints=checkpoints,
        learning_rates=lambda step: learning_rates(step, config.train.steps, config.optimizer),
        stop_code=rank.stopping.code,
        around_step=around_step,
    )


def _profiler(
    rank: Rank, engine: TrainEngine, recorder: RunRecorder | SilentRecorder, parts: ExitStack
) -> Callable[[int], AbstractContextManager[None]]:
    """What the loop does around each step."""
    if (steps := rank.config.metrics.first_and_last_profiled) is None:
        return lambda step: nullcontext()
    profiler = StepProfiler(rank.run_dir, *steps, engine, recorder)
    parts.callback(profiler.close)
    return profiler.step


def _agreed_engine(rollout: RolloutConfig, engine: TrainEngine) -> Literal["hf", "vllm"]:
    """What `auto` means on any rank's host."""
    return "vllm" if any(engine.max_over_ranks([chosen_engine(rollout) == "vllm"])) else "hf"


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


def _headline(rank: Rank, counts: dict[str, int]) -> str:
    parameters = f"ψ {counts['psi']:,}, φ {counts['phi']:,}, ξ {counts['xi']:,} parameters"
    rollout = rank.config.rollout
    workers = f"{rollout.workers} rollout worker(s), engine {describe_engine(rollout)}"
    return f"{parameters}; {describe_ranks(rank)}; {workers}"

"""The parts of a UDASA round's training on one rank: the pairs, the model, what was saved of it, logs; the loop."""

from __future__ import annotations

from contextlib import ExitStack

from asa_dist.asa.packing import TextTables
from asa_dist.collaborators import PeriodicCheckpoints, WatchedEngine
from asa_dist.rank import OpenRun, Rank, announce, describe_ranks, open_recorder, silence_transformers
from asa_dist.runtime.checkpoint import Checkpointer
from asa_dist.runtime.data.preferences import PreferenceFeed
from asa_dist.runtime.data.tokenizer import load_tokenizer, token_tables
from asa_dist.runtime.engine import TrainEngine
from asa_dist.runtime.model import count_parameters
from asa_dist.runtime.pair_files import RoundPairs, read_pairs
from asa_dist.runtime.preference_model import PreferenceModel
from asa_dist.runtime.trunk import build_trunk
from asa_dist.udasa.curriculum import StagePlan, plan_curriculum
from asa_dist.udasa.loop import UdasaLoop

REFERENCE = "reference"  # folder of the reference's log-probabilities, within the round's


def open_udasa(rank: Rank, parts: ExitStack) -> OpenRun:
    """``parts``: is given whatever has to be closed."""
    config, run_dir, placement, watchdog = rank.config, rank.run_dir, rank.placement, rank.watchdog
    made = read_pairs(run_dir)
    plans = plan_curriculum(made.stage_by_id, config.udasa.curriculum, config.seed, made.round_index)
    tokenizer = load_tokenizer(run_dir)
    silence_transformers(is_shown=rank.is_first)
    lm = build_trunk(config.model, config.seed, len(tokenizer), tokenizer.eos_token_id, config.data.sequence_length,
                     placement.device.type == "cuda")  # fmt: skip
    if rank.is_first:
        lm.config.save_pretrained(run_dir / "model")
    model = PreferenceModel(lm, config.model.logprob_chunk_tokens)
    counts = count_parameters(model)
    engine = WatchedEngine(model, config.train, config.optimizer, config.model.dtype, placement, watchdog)
    parts.callback(engine.close)
    damaged: dict[str, str] = {}
    checkpointer = Checkpointer(rank.ownership, config.checkpoint, engine, damaged.__setitem__)
    loaded = checkpointer.load() if rank.options.resume else None
    first_step = loaded.step if loaded else 0
    num_steps = sum(plan.num_steps for plan in plans)
    recorder = parts.enter_context(open_recorder(rank, first_step, num_steps, tokenizer.decode))
    announce(rank, recorder, _headline(rank, counts, made, plans), [], first_step, damaged)
    checkpoints = PeriodicCheckpoints(
        checkpointer, config.checkpoint, None, recorder, rank.stopping, watchdog, first_step
    )
    loop = UdasaLoop(
        stages=plans, curriculum=config.udasa.curriculum, dpo=config.udasa.dpo,
        max_skipped_steps=config.train.max_skipped_steps, engine=engine,
        pairs=_feed(rank, engine, made, token_tables(tokenizer, model.vocab_size)), recorder=recorder,
        checkpoints=checkpoints, stop_code=rank.stopping.code,
    )  # fmt: skip
    if loaded is not None:
        loop.load_state_dict(loaded.step, loaded.loop_state)
    return OpenRun(loop, loop.run, lambda: loop.is_finished, recorder)


def _feed(rank: Rank, engine: TrainEngine, made: RoundPairs, tables: TextTables) -> PreferenceFeed:
    config, placement = rank.config, rank.placement
    return PreferenceFeed(
        made.pairs, engine, rank.run_dir / REFERENCE, tables, row_length=config.data.sequence_length,
        pairs_per_step=config.udasa.curriculum.pairs_per_step, accumulation_steps=config.train.accumulation_steps,
        rank=placement.rank, num_ranks=placement.num_ranks,
    )  # fmt: skip


def _headline(rank: Rank, counts: dict[str, int], made: RoundPairs, plans: tuple[StagePlan, ...]) -> str:
    stages = ", ".join(
        f"stage {plan.stage + 1}: {len(plan.train_ids)} pairs, {plan.num_steps} steps, {len(plan.heldout_ids)} held out"
        for plan in plans
    )
    return f"ψ {counts['psi']:,} parameters; {describe_ranks(rank)}\nround {made.round_index + 1}: {stages}"

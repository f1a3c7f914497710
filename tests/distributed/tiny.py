"""A tiny training step: model, corpus rows and groups (with an empty response), cut for any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from asa_dist.asa.objective import GlobalCounts, StepCoefficients, StepInputs
from asa_dist.asa.packing import MicroBatch, corpus_batch, join, pack_groups
from asa_dist.config import Config, build_config
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import AsaModel, build_model
from tests.asa import worlds

ROW, NUM_ROWS, NUM_GROUPS, GROUP_SIZE = 48, 4, 4, 3
COEFFICIENTS = StepCoefficients(alpha=0.5, beta=0.4, gamma=0.1, tau=0.6)


def config(stage: int, num_ranks: int = 1, accumulation_steps: int = 1, **changes: Any) -> Config:
    """Several sub-groups and no persistent parameters: ZeRO-3 in earnest. Changes: ``section__field`` or a section."""
    tree: dict[str, Any] = {
        "model": {
            "architecture": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
            },
            "logprob_chunk_tokens": 37,
        },
        "data": {"sequence_length": ROW},
        "rollout": {
            "prompts_per_step": NUM_GROUPS,
            "responses_per_prompt": GROUP_SIZE,
            "min_prompt_tokens": 1,
            "max_prompt_tokens": 12,
            "max_new_tokens": 32,
        },
        "evaluator": {"embedding_size": 16},
        "optimizer": {"clip_norm": 0.0},
        "train": {
            "ranks": num_ranks,
            "accumulation_steps": accumulation_steps,
            "zero_stage": stage,
            "corpus_rows_per_step": NUM_ROWS,
            "zero_persistence_threshold": 0,
            "zero_sub_group_size": 5000,
        },
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            tree[key] = value
            continue
        section, _, name = key.partition("__")
        if name in tree["model"]["architecture"]:
            tree["model"]["architecture"][name] = value
        else:
            tree[section][name] = value
    return build_config(tree, "tiny")


def model(settings: Config) -> AsaModel:
    """Heads away from their initial zeros, so that every gradient is at work."""
    built = build_model(settings, worlds.VOCAB, worlds.EOS, on_cuda=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (*built.evaluator.parameters(), *built.meta.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return built


def engine(built: AsaModel, settings: Config, placement: Placement) -> TrainEngine:
    return TrainEngine(built, settings.train, settings.optimizer, settings.model.dtype, placement)


def micro_batches(num_ranks: int, rank: int, accumulation_steps: int) -> list[MicroBatch]:
    """This rank's share of the same global batch."""
    rng = np.random.default_rng(11)
    groups = worlds.groups(rng, GROUP_SIZE)[:NUM_GROUPS]
    ids = torch.from_numpy(rng.integers(1, worlds.VOCAB, (NUM_ROWS, ROW)))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    positions, segments = torch.arange(ROW).expand(NUM_ROWS, ROW).contiguous(), torch.zeros_like(ids)
    num_batches = num_ranks * accumulation_steps
    batches = []
    for number in range(rank * accumulation_steps, (rank + 1) * accumulation_steps):
        rows = slice(number * NUM_ROWS // num_batches, (number + 1) * NUM_ROWS // num_batches)
        mine = groups[number * NUM_GROUPS // num_batches : (number + 1) * NUM_GROUPS // num_batches]
        corpus = corpus_batch(ids[rows], positions[rows], segments[rows], targets[rows])
        batches.append(join(corpus, pack_groups(mine, ROW, worlds.TABLES, version=0)))
    return batches


def inputs() -> StepInputs:
    """The same for every split of the global batch."""
    counts = GlobalCounts(*GlobalCounts.of(micro_batches(1, 0, 1)[0]).tolist())
    center_H = torch.linspace(-0.3, 0.3, 32)
    progress_F = torch.tensor([0.7, 0.1, -0.2, 0.3, 0.05])
    share_V = torch.rand(worlds.VOCAB, generator=torch.Generator().manual_seed(12))
    token_weight_V = (share_V.clamp(min=1e-3).log() / math.log(1e-3)).square().clamp(min=1e-6)
    return StepInputs(COEFFICIENTS, counts, center_H, 0.8, progress_F, token_weight_V)


def corpus_part(batch: MicroBatch) -> MicroBatch:
    """The corpus rows of a micro-batch alone."""
    rows = batch.is_corpus_RT.all(1)
    return corpus_batch(
        batch.input_ids_RT[rows], batch.position_ids_RT[rows], batch.segment_RT[rows], batch.target_RT[rows]
    )

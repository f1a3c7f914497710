"""What the ranks of test_weights.py run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from asa_dist.asa.packing import join, pack_groups
from asa_dist.records import Prompt, RolloutGroup, WeightManifest
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.weights import ShardBuffer, assemble, shard_record, tensor_specs
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PHI, PSI, XI, named_parts
from tests.asa import worlds
from tests.distributed import tiny

CASES = list(itertools.product((0, 1, 2, 3), ("float32", "bfloat16"), (True, False)))


def all_cases(placement: Placement, folder: str) -> dict[tuple[int, str, bool], dict[str, Any]]:
    return {case: publish_and_sample(placement, folder, *case) for case in CASES}


def publish_and_sample(placement: Placement, folder: str, stage: int, dtype: str, tied: bool) -> dict[str, Any]:
    """One real update, then: is what a worker serves what the trainer holds, and do both score samples alike?"""
    settings = tiny.config(
        stage, placement.num_ranks, model__dtype=dtype, model__tie_word_embeddings=tied, rollout__temperature=0.7
    )
    model = tiny.model(settings)
    model.lm.config.save_pretrained(Path(folder) / f"{tied}-{placement.rank}")
    engine = tiny.engine(model, settings, placement)
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, 1)
    engine.train_step(batches, tiny.inputs(), {PSI: 1e-2, PHI: 1e-2, XI: 1e-2})
    served = published(engine, placement, dtype)
    held = whole_generator(engine, stage)
    same = {name: torch.equal(served[name], held[name]) and served[name].dtype == held[name].dtype for name in held}
    worker = HfEngine(
        str(Path(folder) / f"{tied}-{placement.rank}"),
        settings.model,
        SamplingConfig(settings.rollout, 3, worlds.EOS),
        "cpu",
    )
    worker.load(1, iter(served.items()))
    difference = disagreement(engine, worker, placement, batches)
    engine.engine.destroy()
    return {"same": same, "names_equal": list(served) == list(held), "max_abs_dlogp": difference}


def published(engine: TrainEngine, placement: Placement, dtype: str) -> dict[str, torch.Tensor]:
    """Every rank's shard, put together by the manifest as a worker does it."""
    specs = tensor_specs(engine.generator_shapes, placement.num_ranks)
    shard = np.array(ShardBuffer(specs, dtype, placement.rank).copy_in(1, engine.generator_shards()))
    gathered: list[Any] = [None] * placement.num_ranks
    dist.all_gather_object(gathered, (shard_record(placement.rank, shard), shard))
    manifest = WeightManifest(1, dtype, specs, tuple(record for record, _ in gathered))
    return {name: tensor.clone() for name, tensor in assemble(manifest, [data for _, data in gathered])}


def whole_generator(engine: TrainEngine, stage: int) -> dict[str, torch.Tensor]:
    parameters = {name: p for part, name, p in named_parts(engine.engine.module) if part == PSI}
    if stage < 3:
        return {name: p.detach().clone() for name, p in parameters.items()}
    whole = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    return whole


def disagreement(engine: TrainEngine, worker: HfEngine, placement: Placement, batches: list[Any]) -> float:
    """Largest difference of sampled tokens' log-probabilities between worker and trainer."""
    rng = np.random.default_rng(21)
    prompts = [Prompt(i, 0, rng.integers(1, worlds.VOCAB, 2 + 3 * i).astype(np.int32)) for i in range(tiny.NUM_GROUPS)]
    share = tiny.NUM_GROUPS // placement.num_ranks
    mine = range(placement.rank * share, (placement.rank + 1) * share)
    groups = [
        RolloutGroup(1, i, prompts[i], responses) for i, responses in enumerate(worker.generate(prompts)) if i in mine
    ]
    corpus = tiny.corpus_part(batches[0])
    batch = join(corpus, pack_groups(groups, tiny.ROW, worlds.TABLES, version=1))
    result = engine.train_step([batch], tiny.inputs(), {PSI: 0.0, PHI: 0.0, XI: 0.0})
    return engine.max_over_ranks([float(result.maxima["rollout/max_abs_dlogp"])])[0]

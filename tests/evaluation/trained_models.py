"""What the ranks of test_export.py run: models of several kinds, trained, saved, and asked for their logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asa_dist.asa.loop import COUNTERS
from asa_dist.asa.trust import AlignmentState
from asa_dist.config import Config, dump_config
from asa_dist.runtime.data.tokenizer import train_tokenizer
from asa_dist.runtime.engine import Placement
from tests.asa import worlds
from tests.distributed import tiny
from tests.distributed.checkpoint_cases import checkpointer, train

TOKENS = [[5, 17, 96, 2, 41, 41, 8], [1, 2, 3, 4, 5, 6, 7]]


@dataclass(frozen=True)
class Case:
    stage: int
    dtype: str
    is_tied: bool

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.dtype}-{self.is_tied}"


CASES = [Case(3, "float32", True), Case(3, "float32", False), Case(1, "float32", True), Case(0, "float32", False),
         Case(3, "bfloat16", True)]


def train_and_save(placement: Placement, root: str) -> dict[Case, np.ndarray]:
    """Run folders by ``Case.name``; the logits of TOKENS, float32."""
    logits = {}
    for case in CASES:
        settings = tiny.config(
            case.stage, placement.num_ranks, model__dtype=case.dtype, model__tie_word_embeddings=case.is_tied
        )
        engine = tiny.engine(tiny.model(settings), settings, placement)
        train(engine, 3)
        folder = Path(root) / case.name
        if placement.rank == 0:
            write_run(folder, settings, engine.engine.module.lm.config)
        dist.barrier()
        assert checkpointer(engine, folder).save(3, loop_state(settings), None).ok
        logits[case] = logits_of(engine.engine.module)
        engine.engine.destroy()
    return logits


def write_run(folder: Path, settings: Config, trunk: object) -> None:
    """What a run folder holds beside checkpoints."""
    trunk.save_pretrained(folder / "model")
    train_tokenizer(["a few words"], 260).save_pretrained(folder / "tokenizer")
    (folder / "config.yaml").write_text(dump_config(settings), encoding="utf-8")


def loop_state(settings: Config) -> dict[str, Tensor]:
    state = AlignmentState(settings.evaluator, settings.model.architecture.hidden_size, worlds.VOCAB).state_dict()
    return {f"alignment.{name}": value for name, value in state.items()} | {
        f"counters.{name}": torch.tensor(0.0) for name in COUNTERS}


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> np.ndarray:
    """Of the model where it was trained; a collective."""
    model.eval()
    hidden = model.lm.base_model(input_ids=torch.tensor(TOKENS), use_cache=False).last_hidden_state
    projection = model.lm.get_output_embeddings().weight
    with deepspeed.zero.GatheredParameters([projection]):
        return (hidden @ projection.T).float().numpy().copy()

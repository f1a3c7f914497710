"""What the ranks of test_export.py and test_round.py run: models, trained, saved, and asked for their logits."""

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
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.udasa.curriculum import plan_curriculum
from asa_dist.udasa.loop import UdasaLoop
from tests.asa import worlds
from tests.distributed import preference_cases, tiny
from tests.distributed.checkpoint_cases import checkpointer, train
from tests.udasa.local_run import ListRecorder

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


# --- a round of UDASA ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SavedCheckpoints:
    """Where the loop asks for them: at the end of its stages."""

    engine: TrainEngine
    folder: Path

    def is_due(self, step: int) -> bool:
        return False

    def save(self, step: int, state: dict[str, Tensor]) -> bool:
        return checkpointer(self.engine, self.folder).save(step, state, None).ok


def train_round(placement: Placement, run_dir: str) -> np.ndarray:
    """RUN/round-1, trained by its loop from RUN/base; the logits of TOKENS, float32."""
    base, folder = Path(run_dir) / "base", Path(run_dir) / "round-1"
    settings = preference_cases.config(3, placement.num_ranks)
    engine = TrainEngine(preference_cases.model(), settings.train, settings.optimizer, "float32", placement)
    if placement.rank == 0:
        preference_cases.trunk().save_pretrained(base)
        folder.mkdir()
        write_run(folder, round_config(base), engine.engine.module.lm.config)
    dist.barrier()
    curriculum = round_config(base).udasa.curriculum
    loop = UdasaLoop(
        stages=plan_curriculum({i: i % 2 for i in range(7)}, curriculum, seed=3, round_index=0), curriculum=curriculum,
        dpo=preference_cases.DPO, max_skipped_steps=2, engine=engine,
        pairs=preference_cases.feed(engine, folder / "reference", rank=placement.rank, num_ranks=placement.num_ranks),
        recorder=ListRecorder(), checkpoints=SavedCheckpoints(engine, folder), stop_code=lambda: 0,
    )
    loop.run()
    logits = logits_of(engine.engine.module)
    engine.close()
    return logits


def round_config(base: Path) -> Config:
    return Config.model_validate({
        "method": "udasa", "seed": 3,
        "model": {"name_or_path": str(base)},
        "data": {"sequence_length": tiny.ROW},
        "rollout": {"responses_per_prompt": 3, "max_new_tokens": 6},
        "udasa": {"uncertainties": ["factual", "value"],
                  "value": {"judge": "classifier", "model": "some/classifier", "unsafe_label": "unsafe"},
                  "curriculum": {"pairs_per_step": 2, "learning_rates": [0.3]}},
    })  # fmt: skip

"""Small corpora for these tests, each document telling its own number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from asa_dist.config import DataConfig, RolloutConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from asa_dist.runtime.data.prepare import DataSummary, prepare

WORDS = (
    "river", "stone", "window", "lantern", "harbour", "meadow", "copper", "thread", "winter", "morning",
    "letter", "garden", "bridge", "shadow", "engine", "signal", "mirror", "valley", "candle", "market",
)


def documents(num_documents: int, seed: int = 0) -> list[str]:
    """Distinct documents of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    bodies = (" ".join(rng.choice(WORDS, size=rng.integers(5, 61))) for _ in range(num_documents))
    return [f"No. {number}: {body}." for number, body in enumerate(bodies)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_dataset(folder: Path, texts: list[str]) -> Path:
    """A folder ``datasets`` loads by name. Of jsonl: it ends every shuffled pass over parquet with a sleep of 5 s."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", texts)
    return folder


def data_config(*sources: SourceConfig, **changes: object) -> DataConfig:
    return DataConfig.model_validate({
        "sources": list(sources), "tokenizer": TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300)),
        "sequence_length": 32, "heldout_fraction": 0.1, "max_heldout_rows": 8, "shuffle_buffer_documents": 20,
        **changes})


def rollout_config(**changes: object) -> RolloutConfig:
    return RolloutConfig.model_validate({"min_prompt_tokens": 3, "max_prompt_tokens": 9, **changes})


def prepare_quietly(
    data: DataConfig, run_dir: Path, rollout: RolloutConfig | None = None, seed: int = 0,
) -> DataSummary:
    return prepare(data, rollout or rollout_config(), seed, run_dir, lambda message: None)

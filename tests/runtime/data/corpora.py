"""Small corpora for these tests, each document telling its own number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from asa_dist.config import DataConfig, RolloutConfig, SourceConfig, TokenizerConfig, TrainTokenizerConfig
from asa_dist.runtime.data.prepare import DataSummary, prepare

WORDS = ["river", "stone", "window", "lantern", "harbour", "meadow", "copper", "thread", "winter", "morning", "letter", "garden", "bridge", "shadow", "engine", "signal", "mirror", "valley", "candle", "market"]


def documents(num_documents: int, seed: int = 0) -> list[str]:
    """Distinct documents of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    return [f"No. {number}: {' '.join(rng.choice(WORDS, size=rng.integers(5, 61)))}." for number in range(num_documents)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_dataset(folder: Path, texts: list[str]) -> Path:
    """A folder ``datasets`` loads by name."""
    import datasets

    folder.mkdir()
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "train.parquet")
    return folder


def data_config(*sources: SourceConfig, **changes: object) -> DataConfig:
    return DataConfig.model_validate({
        "sources": list(sources), "tokenizer": TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300)),
        "sequence_length": 32, "heldout_fraction": 0.1, "max_heldout_rows": 8, "shuffle_buffer_documents": 20,
        **changes})


def rollout_config(**changes: object) -> RolloutConfig:
    return RolloutConfig.model_validate({"min_prompt_tokens": 3, "max_prompt_tokens": 9, "max_new_tokens": 8, **changes})


def prepare_quietly(data: DataConfig, run_dir: Path, rollout: RolloutConfig | None = None, seed: int = 0) -> DataSummary:
    return prepare(data, rollout or rollout_config(), seed, run_dir, lambda message: None)

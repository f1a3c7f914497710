"""What `publish.py` measures: the ways to publish, and the loads. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from asa_dist.config import Config, build_config

SEED = 20261123
OURS, THREE_AT_ONCE, MEMCPY = "ours", "ours, three in a row", "memcpy"
PER_PARAMETER, ONE_CONTEXT = "per-parameter gather + broadcast", "one-context gather + broadcast"
WAYS = (OURS, THREE_AT_ONCE, MEMCPY, PER_PARAMETER, ONE_CONTEXT)


@dataclass(frozen=True)
class Case:
    """One model on so many ranks.

    Args:
        link_bits_per_second: of all that goes over the network, where trainer and worker are two hosts (two Rays of
            one machine, in a network of their own); None: one host, and nothing slows the loopback down.
    """

    num_ranks: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    link_bits_per_second: int | None = None
    dtype: str = "bfloat16"
    eos_token_id: int = 0

    @property
    def config(self) -> Config:
        return build_config({
            "seed": SEED,
            "model": {"dtype": self.dtype, "architecture": {
                "hidden_size": self.hidden_size, "intermediate_size": 11 * self.hidden_size // 4,
                "num_layers": self.num_layers, "num_attention_heads": self.hidden_size // 64,
                "num_key_value_heads": self.hidden_size // 64, "tie_word_embeddings": True}},
            "data": {"sequence_length": 256},
            "rollout": {"engine": "hf", "prompts_per_step": self.num_ranks, "max_policy_age": 1024},
            "train": {"ranks": self.num_ranks, "zero_stage": 3, "zero_persistence_threshold": 0,
                      "corpus_rows_per_step": self.num_ranks},
        }, "benchmarks/publish.py")

    @property
    def other_core(self) -> int:
        """For whoever receives: the last one, which a rank shares if there are as many ranks as cores."""
        return max(os.sched_getaffinity(0))


SIZES = {"5 M": (4096, 256, 5), "50 M": (16384, 512, 13), "200 M": (32000, 1024, 13),
         "500 M": (32000, 1280, 23)}  # vocabulary, width, layers
CASES = {f"{size} parameters, {ranks} rank{'s' * (ranks > 1)}": Case(ranks, *shape)
         for size, shape in SIZES.items() for ranks in (1, 2, 4)
         if size != "500 M" or ranks == 1}  # with optimizers, store and worker more are more than 24 GiB
SLOW_LINK = "50 M parameters, 1 rank, 1 Gbit/s to the worker"
SLOW_LINK_CASES = {SLOW_LINK: Case(1, *SIZES["50 M"], link_bits_per_second=10**9)}
SMOKE_CASES = {"smoke": Case(2, *SIZES["5 M"])}


def served_file(folder: Path, version: int) -> Path:
    """Written by the worker when it serves a version: the moment, in seconds of time.monotonic."""
    return folder / f"served-{version}"


def ranks_file(folder: Path) -> Path:
    """What the ranks measured, at the end."""
    return folder / "ranks.json"


def given_up_file(folder: Path) -> Path:
    """Written if no worker will serve anything any more: the reason."""
    return folder / "given-up"

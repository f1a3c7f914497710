"""What `step.py` measures: its variants, and a load of both ranks. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from asa_dist.config import Config, build_config

RANKS, SEED, EOS = 2, 20261123, 0
GROUP_SIZE = 4  # the responses of a group, with their prompts, fill one row
FUSED, PLAIN, WHOLE, UNFUSED = "fused", "plain", "plain, whole logits", "unfused"
VARIANTS = (FUSED, PLAIN, WHOLE, UNFUSED)


@dataclass(frozen=True)
class Case:
    """One load of every rank, and how the model is sharded."""

    zero_stage: int
    row_tokens: int
    corpus_rows: int
    rollout_rows: int
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4

    @property
    def config(self) -> Config:
        """Several sub-groups and no persistent parameters: ZeRO-3 in earnest."""
        length = self.row_tokens // GROUP_SIZE
        prompt_tokens = length // 4
        return build_config({
            "seed": SEED,
            "model": {"architecture": {
                "hidden_size": self.hidden_size, "intermediate_size": 11 * self.hidden_size // 4,
                "num_layers": self.num_layers, "num_attention_heads": 4, "num_key_value_heads": 4,
                "tie_word_embeddings": True}},
            "data": {"sequence_length": self.row_tokens},
            "rollout": {"prompts_per_step": RANKS * self.rollout_rows, "responses_per_prompt": GROUP_SIZE,
                        "min_prompt_tokens": 1, "max_prompt_tokens": prompt_tokens,
                        "max_new_tokens": length - prompt_tokens},
            "train": {"ranks": RANKS, "zero_stage": self.zero_stage, "zero_persistence_threshold": 0,
                      "zero_sub_group_size": 1_000_000, "corpus_rows_per_step": RANKS * self.corpus_rows},
        }, "benchmarks/step.py")

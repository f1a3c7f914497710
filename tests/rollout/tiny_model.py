"""A random two-layer Llama, as a config folder and as a model with weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 61
EOS = 3


def make_model(folder: Path, *, tied: bool = False, key_value_heads: int = 2, seed: int = 0,
               context_tokens: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Saves the config in ``folder``; large weights, so that every token's distribution is far from uniform.

    Heads of 32, the smallest that vLLM has kernels for on CPUs.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        head_dim=32, num_key_value_heads=key_value_heads, max_position_embeddings=context_tokens,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=EOS, initializer_range=0.3)
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)

"""What only the hf engine does; what it has in common with vllm is in test_engine_contract.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asa_dist.config import ModelConfig
from asa_dist.rollout.hf_engine import HfEngine
from tests.rollout.engines import (
    assert_sampled_from,
    commonest_token,
    make_prompts,
    sampling_config,
    with_variants,
)
from tests.rollout.tiny_model import VOCAB_SIZE, make_model


def make_engine(folder: Path, dtype: str = "float32", **sampling: float) -> HfEngine:
    return HfEngine(str(folder), ModelConfig(dtype=dtype), sampling_config(**sampling), "cpu")


def test_rows_that_have_ended_leave_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    prompts = with_variants(make_prompts(), 1)
    endless = make_engine(tmp_path, eos_token_id=VOCAB_SIZE)
    endless.load(0, model.named_parameters())
    end = commonest_token(endless.generate(prompts))
    engine = make_engine(tmp_path, eos_token_id=end)
    engine.load(0, model.named_parameters())
    batch_sizes = []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda batch, token_B, position: (
        batch_sizes.append(len(token_B)), decode(batch, token_B, position))[1])
    groups = engine.generate(prompts)
    assert batch_sizes[0] == 20 and min(batch_sizes) <= 10
    assert_sampled_from(model, prompts, groups, sampling_config(eos_token_id=end))


def test_each_phrasing_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path)
    engine = make_engine(tmp_path, responses_per_prompt=6)
    engine.load(0, model.named_parameters())
    shapes = []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda *args, **inputs: (
        shapes.append(tuple(inputs["input_ids"].shape)), forward(*args, **inputs))[1])
    prompts = with_variants(make_prompts(), 2)
    engine.generate(prompts)
    assert shapes[:2] == [(4 * 3, max(len(tokens) for prompt in prompts for tokens in prompt.phrasings)), (4 * 6, 1)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_is_bit_for_bit_and_in_place(tmp_path: Path, tied: bool, dtype: str) -> None:
    trained = make_model(tmp_path, tied=tied, seed=5, dtype=getattr(torch, dtype))
    engine = make_engine(tmp_path, dtype)
    live = dict(engine._model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in live.items()}
    assert ("lm_head.weight" in live) != tied
    engine.load(7, trained.named_parameters())
    assert engine.version == 7
    for name, parameter in trained.named_parameters():
        assert torch.equal(live[name], parameter) and live[name].data_ptr() == addresses[name]
    assert torch.equal(engine._model.lm_head.weight, trained.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_built_without_drawing_weights_but_else_the_same(
        tmp_path: Path, tied: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers, which no version brings, bit for bit; parameters by name, shape, dtype and which are one."""
    normal = make_model(tmp_path, tied=tied)
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    for rope in (None, scaled):
        config = normal.config
        if rope is not None:
            config.rope_parameters = rope
        config.save_pretrained(tmp_path)
        expected = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        with monkeypatch.context() as patched:
            for name in ("normal_", "uniform_", "kaiming_uniform_"):
                patched.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("weights are drawn"), raising=False)
            built = make_engine(tmp_path, dtype)._model
        buffers = dict(built.named_buffers())
        assert "model.rotary_emb.inv_freq" in buffers and buffers.keys() == dict(expected.named_buffers()).keys()
        for name, buffer in expected.named_buffers():
            assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)
        shapes = [(name, p.shape, p.dtype) for name, p in expected.named_parameters()]
        assert [(name, p.shape, p.dtype) for name, p in built.named_parameters()] == shapes
        assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
        assert not built.training and not any(p.requires_grad for p in built.parameters())

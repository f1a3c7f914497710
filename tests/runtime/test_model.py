"""The module: packed equals unpacked, whatever shares the row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PretrainedConfig,
)

from asa_dist.asa.packing import MicroBatch, corpus_batch, pack_groups
from asa_dist.config import Config
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.runtime.model import build_model, count_parameters, named_parts
from asa_dist.runtime.trunk import ModelError, segment_mask, trunk_config
from tests.asa import worlds
from tests.distributed import tiny


def logprobs(batch: MicroBatch) -> torch.Tensor:
    model = tiny.model(tiny.config(stage=0, model__tie_word_embeddings=False))
    with torch.no_grad():
        _, final_NH = model.trunk_states(batch)
        return model.token_scores(batch, final_NH).logprob_N


@pytest.mark.parametrize("num_variants", [0, 1])
def test_packed_rollouts_equal_one_sequence_per_row(num_variants: int) -> None:
    rng = np.random.default_rng(4)
    groups = worlds.groups(rng, group_size=3)
    for index, group in enumerate(groups):
        variants = tuple(rng.integers(1, worlds.VOCAB, 4 + index).astype(np.int32) for _ in range(num_variants))
        groups[index] = replace(group, prompt=replace(group.prompt, variants=variants))
    packed = pack_groups(groups, 120, worlds.TABLES, version=0)
    assert packed.input_ids_RT.shape[0] < 15 // 2, "several sequences should share a row"
    packed_N = logprobs(packed)
    for index, (group, response) in enumerate((g, r) for g in groups for r in g.responses):
        prompt = Prompt(0, 0, group.prompt.tokens_for(index % 3))
        length = len(prompt.token_ids) + len(response.token_ids)
        alone = pack_groups([RolloutGroup(0, 0, prompt, (response,))], length, worlds.TABLES, version=0)
        assert packed.groups is not None and alone.groups is not None
        torch.testing.assert_close(
            packed_N[packed.groups.predicts_N == index],
            logprobs(alone)[alone.groups.predicts_N == 0],
            atol=1e-5,
            rtol=1e-5,
        )


def test_packed_documents_equal_documents_alone() -> None:
    rng = np.random.default_rng(5)
    documents = [torch.from_numpy(rng.integers(1, worlds.VOCAB, length)) for length in (7, 20, 13)]

    def rows(members: list[torch.Tensor]) -> MicroBatch:
        ids = torch.cat(members).unsqueeze(0)
        positions = torch.cat([torch.arange(len(member)) for member in members]).unsqueeze(0)
        segments = torch.cat([torch.full((len(member),), i) for i, member in enumerate(members)]).unsqueeze(0)
        targets = torch.cat([torch.cat([member[1:], torch.tensor([-100])]) for member in members]).unsqueeze(0)
        return corpus_batch(ids, positions, segments, targets)

    together = logprobs(rows(documents))
    torch.testing.assert_close(
        together, torch.cat([logprobs(rows([document])) for document in documents]), atol=1e-5, rtol=1e-5
    )


def test_segment_mask() -> None:
    mask = segment_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("tied", [True, False])
def test_parts_and_counts(tied: bool) -> None:
    model = tiny.model(tiny.config(stage=0, model__tie_word_embeddings=tied))
    names = [name for part, name, _ in named_parts(model) if part == "psi"]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) is not tied
    assert "model.embed_tokens.weight" in names
    hidden, mlp, layers, head, vocab = 32, 48, 3, 16, worlds.VOCAB
    block = (
        2 * hidden * hidden + 2 * hidden * head + 3 * hidden * mlp + 2 * hidden
    )  # q, o; k, v with one head of two; MLP; norms
    counts = count_parameters(model)
    assert counts["psi"] == layers * block + hidden + vocab * hidden * (1 if tied else 2)
    assert counts["phi"] == 16 * hidden + 2 * 16 + 1 + hidden + 1 + 4 * 16 + 4 + 4
    assert counts["xi"] == 3 * 5 + 3


def of_folder(folder: Path) -> Config:
    """The tiny config around a pretrained model."""
    settings = tiny.config(stage=0)
    return settings.model_copy(update={"model": settings.model.model_copy(update={"name_or_path": str(folder)})})


def test_logits_that_are_no_plain_product_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    Gemma2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        build_model(of_folder(tmp_path), 64, 0, on_cuda=False)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("model_type", "settings", "window_tokens"),
    [
        ("mistral", {"sliding_window": tiny.ROW - 1}, tiny.ROW - 1),
        ("mistral", {"sliding_window": tiny.ROW}, None),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": LAYERS}, 8),
        ("ministral", {"sliding_window": None, "layer_types": LAYERS}, 0),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"], "attention_chunk_size": 32}, 32),
    ],
)
def test_attention_windows_shorter_than_a_row_are_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], window_tokens: int | None
) -> None:
    """Under our mask the trainer would see the whole segment, a worker only the window."""
    AutoConfig.for_model(model_type, **SMALL, **settings).save_pretrained(tmp_path)
    model = of_folder(tmp_path).model
    if window_tokens is None:
        assert trunk_config(model, 64, 0, tiny.ROW).model_type == model_type
        return
    with pytest.raises(ModelError, match=f"sees {window_tokens} tokens back.*data.sequence_length = {tiny.ROW}"):
        trunk_config(model, 64, 0, tiny.ROW)


@pytest.mark.parametrize(
    "trunk",
    [
        GPT2Config(vocab_size=worlds.VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=2, initializer_range=0.2),
        LlamaConfig(**SMALL | {"vocab_size": worlds.VOCAB}, attention_dropout=0.3, initializer_range=0.3),
    ],
    ids=["GPT-2", "Llama"],
)
def test_pretrained_dropout_is_off_and_workers_agree(tmp_path: Path, trunk: PretrainedConfig) -> None:
    """GPT-2 drops a tenth of everything, in modules of its own; Llama's attention passes a number of the config."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(trunk).save_pretrained(tmp_path)
    settings = of_folder(tmp_path)
    model = build_model(settings, worlds.VOCAB, worlds.EOS, on_cuda=False).train()
    model.lm.config.save_pretrained(tmp_path / "served")
    engine = HfEngine(
        str(tmp_path / "served"), settings.model, SamplingConfig(settings.rollout, 3, worlds.EOS), "cpu"
    )
    engine.load(0, ((name, p.detach()) for part, name, p in named_parts(model) if part == "psi"))
    rng = np.random.default_rng(2)
    prompts = [Prompt(i, 0, rng.integers(1, worlds.VOCAB, 2 + 3 * i).astype(np.int32)) for i in range(4)]
    groups = [RolloutGroup(0, i, prompts[i], responses) for i, responses in enumerate(engine.generate(prompts))]
    batch = pack_groups(groups, 60, worlds.TABLES, version=0)
    assert batch.groups is not None

    def logprob_N() -> torch.Tensor:
        _, final_NH = model.trunk_states(batch)
        return model.token_scores(batch, final_NH).logprob_N.detach()

    found_N = logprob_N()
    torch.testing.assert_close(logprob_N(), found_N, atol=0, rtol=0)
    scored_N = batch.groups.predicts_N >= 0
    torch.testing.assert_close(found_N[scored_N], batch.groups.sampled_logprob_N[scored_N], atol=1e-4, rtol=0)


def test_dropout_that_no_config_mentions_is_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a rate written into the model's code."""
    from transformers.models.gpt2 import modeling_gpt2

    class Stubborn(modeling_gpt2.GPT2MLP):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.dropout = nn.Dropout(0.3)

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_gpt2, "GPT2MLP", Stubborn)
    model = build_model(of_folder(tmp_path), 64, 0, on_cuda=False)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(rates) > 3 and not any(rates)
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")
    assert [getattr(model.lm.config, name) for name in dropouts] == [0.0] * 4

"""The hf engine against plain full forwards: no cache, no padding, no batch, no compaction."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout.engine import SamplingConfig, WeightLoadError
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.sampling import choose_tokens, gumbel_noise, sampling_keys
from tests.rollout.tiny_model import EOS, VOCAB_SIZE, make_model

SEED = 11


def make_prompts(lengths: tuple[int, ...] = (1, 4, 9, 5)) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(20 + i, 2, rng.integers(4, VOCAB_SIZE, n).astype(np.int32)) for i, n in enumerate(lengths)]


def with_variants(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Every prompt in ``count`` more phrasings, of other lengths."""
    rng = np.random.default_rng(1)
    return [replace(prompt, variants=tuple(
        rng.integers(4, VOCAB_SIZE, rng.integers(1, 12)).astype(np.int32) for _ in range(count)))
        for prompt in prompts]


def make_engine(folder: Path, dtype: str = "float32", *, seed: int = SEED, eos_token_id: int = EOS,
                **sampling: float) -> HfEngine:
    rollout = RolloutConfig(**{"responses_per_prompt": 5, "max_new_tokens": 20, **sampling})
    return HfEngine(str(folder), ModelConfig(dtype=dtype), SamplingConfig(rollout, seed, eos_token_id), "cpu")


def commonest_token(groups: list[tuple[Response, ...]]) -> int:
    """The token that occurs in most responses."""
    counts = Counter(token for responses in groups for r in responses for token in set(r.token_ids.tolist()))
    return counts.most_common(1)[0][0]


def slow_response(model: torch.nn.Module, prompt: Prompt, sibling: int, sampling: SamplingConfig) -> Response:
    """One response, token by token, each from a full forward of one row: the sibling's own phrasing."""
    rollout, end = sampling.rollout, sampling.eos_token_id
    tokens, logprobs, behaviours = [], [], []
    key_B = sampling_keys(SEED, *(torch.tensor([x]) for x in (prompt.epoch, prompt.prompt_id, sibling)))
    while len(tokens) < rollout.max_new_tokens and end not in tokens:
        logits_BV = model(torch.tensor([[*prompt.tokens_for(sibling).tolist(), *tokens]])).logits[:, -1]
        token_B, logprob_B, behaviour_B = choose_tokens(
            logits_BV, gumbel_noise(key_B, torch.tensor(len(tokens)), VOCAB_SIZE), temperature=rollout.temperature,
            top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p)
        tokens.append(int(token_B))
        logprobs.append(float(logprob_B))
        behaviours.append(float(behaviour_B))
    return Response(np.array(tokens), np.array(logprobs), np.array(behaviours), end in tokens, ((0, 0),))


@pytest.mark.parametrize(("tied", "key_value_heads", "num_variants", "sampling"), [
    (False, 4, 0, {}), (True, 2, 0, {"temperature": 0.7}), (True, 4, 0, {"min_p": 0.05}),
    (False, 1, 0, {"temperature": 1.4, "top_p": 0.9, "top_k": 20}), (False, 2, 1, {}),
    (True, 4, 2, {"temperature": 0.7}),
])
def test_tokens_and_logprobs_equal_plain_forwards(
        tmp_path: Path, tied: bool, key_value_heads: int, num_variants: int, sampling: dict[str, float],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Compaction included: the rows of this model end at different times, and the batch is seen to shrink."""
    model = make_model(tmp_path, tied=tied, key_value_heads=key_value_heads)
    endless = make_engine(tmp_path, eos_token_id=VOCAB_SIZE, **sampling)
    endless.load(0, model.named_parameters())
    prompts = with_variants(make_prompts(), num_variants)
    engine = make_engine(tmp_path, eos_token_id=commonest_token(endless.generate(prompts)), **sampling)
    engine.load(0, model.named_parameters())
    batch_sizes = []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda batch, token_B, position: (
        batch_sizes.append(len(token_B)), decode(batch, token_B, position))[1])
    groups = engine.generate(prompts)
    assert min(batch_sizes) <= 10
    ends = set()
    for prompt, responses in zip(prompts, groups, strict=True):
        assert len(responses) == 5
        for sibling, found in enumerate(responses):
            expected = slow_response(model, prompt, sibling, engine._sampling)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.finished == expected.finished == (found.token_ids[-1] == engine._sampling.eos_token_id)
            np.testing.assert_allclose(found.logprob_T, expected.logprob_T, atol=1e-4, rtol=0)
            np.testing.assert_allclose(found.behaviour_logprob_T, expected.behaviour_logprob_T, atol=1e-4, rtol=0)
            assert found.spans == ((0, 0),)
            ends.add((len(found.token_ids), found.finished))
    assert (20, False) in ends and len(ends) > 3, ends  # truncated ones and several lengths were seen


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


def test_phrasing_0_is_answered_as_if_there_were_no_other(tmp_path: Path) -> None:
    """The phrasing is no part of a sampling key."""
    model = make_model(tmp_path)
    engine = make_engine(tmp_path)
    engine.load(0, model.named_parameters())
    prompts = make_prompts()
    plain, varied = engine.generate(prompts), engine.generate(with_variants(prompts, 1))
    for responses, others in zip(plain, varied, strict=True):
        same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(responses, others, strict=True)]
        assert same[0] and same[2] and same[4] and not all(same)


def test_record_dtypes(tmp_path: Path) -> None:
    model = make_model(tmp_path, dtype=torch.bfloat16)
    engine = make_engine(tmp_path, "bfloat16")
    engine.load(4, model.named_parameters())
    response = engine.generate(make_prompts())[0][0]
    assert (response.token_ids.dtype, response.logprob_T.dtype, response.behaviour_logprob_T.dtype) == (
        np.int32, np.float32, np.float32)
    assert response.oldest_version == 4


def test_end_of_text_first_is_one_token(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.lm_head.weight.zero_()
    # All logits are 0, so a token is the argument of its noise's maximum: take sibling 2's first one as end-of-text.
    keys = sampling_keys(SEED, torch.full((5,), 2), torch.full((5,), 20), torch.arange(5))
    first = gumbel_noise(keys, torch.tensor(0), VOCAB_SIZE).argmax(-1)
    engine = make_engine(tmp_path, eos_token_id=int(first[2]))
    engine.load(0, model.named_parameters())
    response = engine.generate(make_prompts((3,)))[0][2]
    assert response.token_ids.tolist() == [int(first[2])] and response.finished
    assert response.logprob_T == pytest.approx(-np.log(VOCAB_SIZE), abs=1e-5)


def test_same_bundle_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path) -> None:
    model = make_model(tmp_path)

    def sampled(engine: HfEngine) -> list[bytes]:
        groups = engine.generate(make_prompts())
        return [array.tobytes() for group in groups for r in group for array in (r.token_ids, r.logprob_T)]

    engines = [make_engine(tmp_path), make_engine(tmp_path), make_engine(tmp_path, seed=SEED + 1)]
    for engine in engines:
        engine.load(0, model.named_parameters())
    first = sampled(engines[0])
    torch.manual_seed(99)
    assert sampled(engines[0]) == first == sampled(engines[1])
    assert sampled(engines[2]) != first


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


Tensors = dict[str, torch.Tensor]


def without_norm(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


@pytest.mark.parametrize(("change", "message"), [
    (without_norm, "version 2: 1 of 21 parameters are missing: model.norm.weight"),
    (lambda t: {**t, "model.extra": torch.zeros(1)}, "the model has no parameter 'model.extra'"),
    (lambda t: {**t, "model.norm.weight": torch.zeros(31)}, "model.norm.weight is torch.float32 .31,., the model"),
    (lambda t: {**t, "model.norm.weight": torch.zeros(32).bfloat16()}, "model.norm.weight is torch.bfloat16"),
])
def test_load_refuses_before_it_touches_anything(
        tmp_path: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    model = make_model(tmp_path)
    engine = make_engine(tmp_path)
    engine.load(1, model.named_parameters())
    before = {name: parameter.clone() for name, parameter in engine._model.named_parameters()}
    with pytest.raises(WeightLoadError, match=message):
        engine.load(2, change(dict(make_model(tmp_path, seed=5).named_parameters())).items())
    assert engine.version == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine._model.named_parameters())


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


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_in_a_model_folder_is_never_run(
        tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": model_type,
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    if model_type == "llama":
        assert type(make_engine(tmp_path)._model).__module__.startswith("transformers.")
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            make_engine(tmp_path)
    assert not questions and not (tmp_path / "was_run").exists()


def test_generate_needs_weights(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(RuntimeError, match="no weights"):
        make_engine(tmp_path).generate(make_prompts())

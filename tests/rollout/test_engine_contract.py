"""What every engine does alike, each against plain full forwards: no cache, no padding, no batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asa_dist.rollout.engine import NO_VERSION, EngineStartError, WeightLoadError
from asa_dist.rollout.sampling import exponential_noise, sampling_keys
from tests.rollout.engines import (
    NEEDS_VLLM,
    SEED,
    BuildEngine,
    RemoteEngine,
    assert_sampled_from,
    assert_sampled_from_versions,
    commonest_token,
    engine_builder,
    make_prompts,
    sampling_config,
    slow_response,
    with_variants,
)
from tests.rollout.tiny_model import VOCAB_SIZE, make_model


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=[NEEDS_VLLM, pytest.mark.slow])])
def build(request: pytest.FixtureRequest) -> Iterator[BuildEngine]:
    with engine_builder(request.param) as build_engine:
        yield build_engine


# --- sampling -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tied", "key_value_heads", "num_variants", "sampling"), [
    (False, 4, 0, {}), (True, 2, 0, {"temperature": 0.7}), (True, 4, 0, {"min_p": 0.05}), (False, 2, 0, {"top_p": 0.6}),
    (False, 1, 0, {"temperature": 1.4, "top_p": 0.9, "top_k": 20}), (False, 2, 1, {}),
    (True, 4, 2, {"temperature": 0.7}),
])
def test_tokens_and_logprobs_equal_plain_forwards(
        tmp_path: Path, build: BuildEngine, tied: bool, key_value_heads: int, num_variants: int,
        sampling: dict[str, float]) -> None:
    """Responses that end at different times, and some that are cut off."""
    model = make_model(tmp_path, tied=tied, key_value_heads=key_value_heads)
    prompts = with_variants(make_prompts(), num_variants)
    endless = sampling_config(eos_token_id=VOCAB_SIZE, **sampling)
    unended = [[slow_response(model, prompt, sibling, endless) for sibling in range(5)] for prompt in prompts]
    config = sampling_config(eos_token_id=commonest_token(unended), **sampling)
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    groups = engine.generate(prompts)
    assert_sampled_from(model, prompts, groups, config)
    ends = {(len(found.token_ids), found.finished) for responses in groups for found in responses}
    assert (20, False) in ends and len(ends) > 3, ends
    for found in (found for responses in groups for found in responses):
        assert found.finished == (found.token_ids[-1] == config.eos_token_id)


def test_all_tokens_alike(tmp_path: Path, build: BuildEngine) -> None:
    """Every token is drawn, the first three of the vocabulary too, by which vLLM reports log-probabilities."""
    model = make_model(tmp_path)
    model.lm_head.weight.zero_()
    config = sampling_config(responses_per_prompt=64, temperature=2.0)
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    groups = engine.generate(make_prompts((3,)))
    assert_sampled_from(model, make_prompts((3,)), groups, config)
    assert {token for found in groups[0] for token in found.token_ids.tolist()} == set(range(VOCAB_SIZE))


def test_one_token_nearly_certain(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)
    config = sampling_config(temperature=0.01)
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    groups = engine.generate(make_prompts())
    assert_sampled_from(model, make_prompts(), groups, config)
    assert max(found.behaviour_logprob_T.max() for found in groups[0]) > -1e-6


def test_end_of_text_first_is_one_token(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)
    model.lm_head.weight.zero_()
    # All logits are 0, so a token is the argument of its noise's minimum: take sibling 2's first one as end-of-text.
    keys = sampling_keys(SEED, torch.full((5,), 2), torch.full((5,), 20), torch.arange(5))
    first = exponential_noise(keys, torch.tensor(0), VOCAB_SIZE).argmin(-1)
    engine = build(tmp_path, sampling_config(eos_token_id=int(first[2])))
    engine.load(0, model.named_parameters())
    response = engine.generate(make_prompts((3,)))[0][2]
    assert response.token_ids.tolist() == [int(first[2])] and response.finished
    assert response.logprob_T == pytest.approx(-np.log(VOCAB_SIZE), abs=1e-5)


def test_one_token_is_all_there_is_room_for(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)
    config = sampling_config(max_new_tokens=1)
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    assert_sampled_from(model, make_prompts(), engine.generate(make_prompts()), config)


def test_same_bundle_gives_the_same_bits_and_another_seed_does_not(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)

    def sampled(seed: int, times: int = 1) -> list[bytes]:
        engine = build(tmp_path, sampling_config(seed=seed))
        engine.load(0, model.named_parameters())
        for _ in range(times):
            torch.manual_seed(99)
            groups = engine.generate(make_prompts())
        return [array.tobytes() for group in groups for r in group for array in (r.token_ids, r.logprob_T)]

    first = sampled(SEED)
    assert sampled(SEED, times=2) == first
    assert sampled(SEED + 1) != first


def test_a_response_is_the_same_in_any_batch_and_siblings_differ(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)
    engine = build(tmp_path, sampling_config())
    engine.load(0, model.named_parameters())
    prompts = make_prompts()
    together = engine.generate(prompts)
    alone = [engine.generate([prompt])[0] for prompt in prompts]
    again = engine.generate(prompts[::-1])[::-1]
    for found in (alone, again):
        assert [[r.token_ids.tolist() for r in group] for group in found] == [
            [r.token_ids.tolist() for r in group] for group in together]
    for group in together:
        assert len({tuple(r.token_ids) for r in group}) == len(group)


def test_phrasing_0_is_answered_as_if_there_were_no_other(tmp_path: Path, build: BuildEngine) -> None:
    """The phrasing is no part of a sampling key."""
    model = make_model(tmp_path)
    engine = build(tmp_path, sampling_config())
    engine.load(0, model.named_parameters())
    prompts = make_prompts()
    plain, varied = engine.generate(prompts), engine.generate(with_variants(prompts, 1))
    for responses, others in zip(plain, varied, strict=True):
        same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(responses, others, strict=True)]
        assert same[0] and same[2] and same[4] and not all(same)


def test_record_dtypes(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path, dtype=torch.bfloat16)
    engine = build(tmp_path, sampling_config(), "bfloat16")
    engine.load(4, model.named_parameters())
    response = engine.generate(make_prompts())[0][0]
    assert (response.token_ids.dtype, response.logprob_T.dtype, response.behaviour_logprob_T.dtype) == (
        np.int32, np.float32, np.float32)
    assert response.oldest_version == 4


# --- weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_every_version_is_served_as_it_came(tmp_path: Path, build: BuildEngine, tied: bool) -> None:
    """Prompts are longer than a block of vLLM's cache (128 tokens on CPUs): nothing of an older version is read."""
    config = sampling_config(responses_per_prompt=2, max_new_tokens=6)
    make_model(tmp_path, tied=tied, context_tokens=256)
    engine = build(tmp_path, config)
    assert engine.version == NO_VERSION
    prompts = make_prompts((150, 3, 140))
    for version, seed in ((3, 0), (4, 1), (9, 2), (10, 0)):
        model = make_model(tmp_path, tied=tied, seed=seed, context_tokens=256)
        engine.load(version, model.named_parameters())
        assert engine.version == version
        for _ in range(2):  # the second time from the cache
            assert_sampled_from(model, prompts, engine.generate(prompts), config, version)


def test_bundles_that_come_while_others_are_under_way(tmp_path: Path, build: BuildEngine) -> None:
    """A bundle is begun as soon as there is room, beside others or not; each is answered as if it were alone."""
    model = make_model(tmp_path, context_tokens=256)
    config = sampling_config(max_new_tokens=60)
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    bundles = [make_prompts((1, 4)), make_prompts((9,)), make_prompts((5, 2, 8)), make_prompts((3,))]
    finished, waiting = {}, dict(enumerate(bundles))
    while len(finished) < len(bundles):
        if waiting and engine.has_room:
            bundle_id = min(waiting)
            engine.begin(bundle_id, waiting.pop(bundle_id))
        finished |= dict(engine.advance())
    for bundle_id, prompts in enumerate(bundles):
        assert_sampled_from(model, prompts, finished[bundle_id], config)


def test_weights_are_swapped_under_load(tmp_path: Path, build: BuildEngine) -> None:
    """Each token is that of the version its span names: nothing that older weights computed is read any more.

    The prompts fill a block of vLLM's cache, and so do their responses. `hf` has finished what it began.
    """
    config = sampling_config(responses_per_prompt=4, max_new_tokens=160)
    models = {version: make_model(tmp_path, seed=version, context_tokens=320) for version in (1, 2, 3)}
    engine = build(tmp_path, config)
    engine.load(1, models[1].named_parameters())
    early, late = make_prompts((150, 3, 129)), make_prompts((2, 140))
    engine.begin(0, early)
    finished = dict(engine.advance())
    engine.load(2, models[2].named_parameters())
    engine.load(3, models[3].named_parameters())  # before version 2 has sampled anything
    engine.begin(1, late)
    while len(finished) < 2:
        finished |= dict(engine.advance())
    assert_sampled_from_versions(models, early, finished[0], config)
    assert_sampled_from(models[3], late, finished[1], config, version=3)
    versions = {tuple(version for _, version in found.spans) for group in finished[0] for found in group}
    assert versions <= {(1,), (1, 3)}  # finished before, or not
    assert ((1, 3) in versions) == isinstance(engine, RemoteEngine)


def test_what_is_dropped_leaves_nothing_behind(tmp_path: Path, build: BuildEngine) -> None:
    model = make_model(tmp_path)
    config = sampling_config()
    engine = build(tmp_path, config)
    engine.load(0, model.named_parameters())
    engine.begin(0, make_prompts())
    engine.drop()
    assert engine.has_room
    engine.begin(0, make_prompts()[1:])  # with the ids and siblings of what was dropped
    finished = dict(engine.advance())
    while not finished:
        finished = dict(engine.advance())
    assert finished.keys() == {0}
    assert_sampled_from(model, make_prompts()[1:], finished[0], config)


def test_what_sleeps_wakes_with_the_next_weights(tmp_path: Path, build: BuildEngine) -> None:
    config = sampling_config(responses_per_prompt=2)
    models = [make_model(tmp_path, seed=seed, tied=True) for seed in range(2)]
    engine = build(tmp_path, config)
    for version, model in enumerate(models):
        engine.load(version, model.named_parameters())
        assert_sampled_from(model, make_prompts(), engine.generate(make_prompts()), config, version)
        engine.sleep()
        assert engine.version == NO_VERSION
        with pytest.raises(RuntimeError, match="no weights"):
            engine.generate(make_prompts())


Tensors = dict[str, torch.Tensor]


def without_norm(tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if name != "model.norm.weight"]


@pytest.mark.parametrize(("change", "message"), [
    (without_norm, "version 2: 1 of 21 parameters are missing: model.norm.weight"),
    (lambda t: [*t.items(), ("model.extra", torch.zeros(1))], "version 2: the model has no parameter 'model.extra'"),
    (lambda t: [*t.items(), *list(t.items())[:1]], "version 2: parameter 'model.embed_tokens.weight' arrived twice"),
    (lambda t: [*without_norm(t), ("model.norm.weight", torch.zeros(31))],
     "model.norm.weight is torch.float32 .31,., the model has torch.float32 .32,."),
    (lambda t: [*without_norm(t), ("model.norm.weight", torch.zeros(32).bfloat16())],
     "model.norm.weight is torch.bfloat16"),
])
def test_refused_weights_leave_the_old_ones_served(
        tmp_path: Path, build: BuildEngine, change: Callable[[Tensors], list[tuple[str, torch.Tensor]]],
        message: str) -> None:
    model = make_model(tmp_path)
    config = sampling_config(responses_per_prompt=2, max_new_tokens=4)
    engine = build(tmp_path, config)
    engine.load(1, model.named_parameters())
    with pytest.raises(WeightLoadError, match=message):
        engine.load(2, change(dict(make_model(tmp_path, seed=5).named_parameters())))
    assert engine.version == 1
    assert_sampled_from(model, make_prompts(), engine.generate(make_prompts()), config, version=1)


def test_generate_needs_weights(tmp_path: Path, build: BuildEngine) -> None:
    make_model(tmp_path)
    with pytest.raises(RuntimeError, match="no weights"):
        build(tmp_path, sampling_config()).generate(make_prompts())


# --- model folders ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_in_a_model_folder_is_never_run(tmp_path: Path, build: BuildEngine, model_type: str) -> None:
    model = make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": model_type,
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    if model_type == "llama":
        engine = build(tmp_path, sampling_config())
        engine.load(0, model.named_parameters())
        assert_sampled_from(model, make_prompts(), engine.generate(make_prompts()), sampling_config())
    else:
        with pytest.raises((ValueError, EngineStartError), match="trust_remote_code"):
            build(tmp_path, sampling_config())
    assert not (tmp_path / "was_run").exists()

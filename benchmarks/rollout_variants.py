"""What `rollout.py` measures: each kind in a process of its own, that serves its variants by name, in turns.

    bare       vllm.LLM.generate, asked for tokens only; asked for a seed per request and log-probabilities, too
    engine     VllmEngine.generate
    worker     Ray, coordinator and one RolloutWorker, with engine `vllm` or `hf`; all groups in one lease, or in four
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from asa_dist.config import ModelConfig, RolloutConfig
from asa_dist.records import Prompt
from asa_dist.rollout.engine import Engine, SamplingConfig
from asa_dist.rollout.vllm_engine import SETTINGS, VllmEngine
from asa_dist.rollout.worker import build_engine

CORE, OTHER_CORE = 0, 1  # the first one samples, alone; the second one has everything else
GROUPS = 32
GROUP_SIZE = 8
MIN_NEW_TOKENS = 8
CANDIDATES = 96  # prompts; with an end-of-text of probability 1/100 half of them will do
PROMPT_TOKENS = 32
CACHE_BYTES = 2**29
SEED = 3
TIMEOUT_SECONDS = 300.0
KINDS = ("bare", "engine", "worker vllm", "worker hf")


@dataclass(frozen=True)
class Load:
    """One kind of work: 256 responses to 32 prompts.

    Args:
        end_probability: of the end-of-text, about the same at every token.
        prompt_ids: of all there could be.
        lengths: tokens of every response, which the bare engine is told.
    """

    vocab_size: int
    max_new_tokens: int
    end_probability: float
    prompt_ids: tuple[int, ...] = tuple(range(GROUPS))
    lengths: tuple[int, ...] = ()

    @property
    def eos_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def sampling(self) -> SamplingConfig:
        rollout = RolloutConfig(
            prompts_per_step=GROUPS, responses_per_prompt=GROUP_SIZE, max_new_tokens=self.max_new_tokens,
            cpu_cache_bytes=CACHE_BYTES, max_policy_age=1024, timeout_seconds=TIMEOUT_SECONDS,
            lease_timeout_seconds=TIMEOUT_SECONDS)
        return SamplingConfig(rollout, SEED, self.eos_token_id)

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(number, 0, np.random.default_rng((SEED, number)).integers(
            0, self.vocab_size, PROMPT_TOKENS).astype(np.int32)) for number in self.prompt_ids]


@dataclass(frozen=True)
class Turn:
    """What one turn of a variant took and gave."""

    seconds: float
    lengths: tuple[int, ...]  # tokens of every response


Variants = dict[str, Callable[[], Turn]]


def make_model(folder: Path, load: Load) -> Any:
    """Four layers, 256 wide; its config is saved in ``folder``.

    One feature of every token's state is the same, and it alone is what the end-of-text's logit reads.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=load.vocab_size, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        initializer_range=0.06)
    config.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = model.lm_head.weight[load.eos_token_id] = 0.0
    token_PN = torch.tensor(np.stack([prompt.token_ids for prompt in load.prompts]), dtype=torch.int64)
    mass = model(token_PN).logits[:, -1].logsumexp(-1).mean()
    feature = model.model(token_PN).last_hidden_state[:, -1, 0].mean()
    model.lm_head.weight[load.eos_token_id, 0] = (mass + math.log(load.end_probability)) / feature
    return model


def with_enough_to_say(load: Load) -> Load:
    """The load with the first prompts to which all responses have at least ``MIN_NEW_TOKENS`` tokens."""
    from asa_dist.rollout.hf_engine import HfEngine

    few = replace(load, max_new_tokens=MIN_NEW_TOKENS - 1, prompt_ids=tuple(range(CANDIDATES)))
    with tempfile.TemporaryDirectory(prefix="asa-rollout-") as folder:
        model = make_model(Path(folder), load)
        engine = HfEngine(folder, ModelConfig(), few.sampling, "cpu")
    engine.load(0, model.named_parameters())
    groups = engine.generate(few.prompts)
    enough = [number for number, group in enumerate(groups) if not any(response.finished for response in group)]
    return replace(load, prompt_ids=tuple(enough[:GROUPS]))


def serve(connection: Connection, kind: str, load: Load) -> None:
    """Answers the names of variants with their turns, until the other side closes."""
    os.sched_setaffinity(0, {CORE if kind in ("bare", "engine") else OTHER_CORE})
    start = {"bare": bare, "engine": in_process}.get(kind, worker_with(kind.removeprefix("worker ")))
    with tempfile.TemporaryDirectory(prefix="asa-rollout-") as folder, start(Path(folder), load) as variants:
        connection.send(list(variants))
        with suppress(EOFError):  # it has closed
            while True:
                connection.send(variants[connection.recv()]())


def timed(sample: Callable[[], Sequence[Any]], length: Callable[[Any], int]) -> Turn:
    begin = time.perf_counter()
    responses = sample()
    seconds = time.perf_counter() - begin
    return Turn(seconds, tuple(map(length, responses)))


@contextmanager
def bare(folder: Path, load: Load) -> Iterator[Variants]:
    os.environ |= SETTINGS
    import torch
    from vllm import LLM, SamplingParams

    make_model(folder, load)
    torch.set_num_threads(1)
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype="float32", load_format="dummy", enforce_eager=True,
              generation_config="vllm", disable_log_stats=True, kv_cache_memory_bytes=CACHE_BYTES)
    asked = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in load.prompts for _ in range(GROUP_SIZE)]

    def generate(options: Callable[[int], dict[str, Any]]) -> Turn:
        params = [SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False, **options(row))
                  for row, length in enumerate(load.lengths)]
        return timed(lambda: llm.generate(asked, params, use_tqdm=False), lambda found: len(found.outputs[0].token_ids))

    yield {"bare": lambda: generate(lambda row: {}),
           "bare, seeds and log-probs": lambda: generate(lambda row: {"seed": row, "logprobs": 0})}


@contextmanager
def in_process(folder: Path, load: Load) -> Iterator[Variants]:
    import torch

    model = make_model(folder, load)
    torch.set_num_threads(1)
    engine = VllmEngine(str(folder), ModelConfig(), load.sampling, "cpu")
    engine.load(0, model.named_parameters())
    yield {"engine": lambda: timed(
        lambda: [response for group in engine.generate(load.prompts) for response in group],
        lambda response: len(response.token_ids))}


def build_pinned_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> Engine:
    """In the worker: this thread, and all that it starts, on one core."""
    os.sched_setaffinity(0, {CORE})
    return build_engine(config_folder, model, sampling)


def worker_with(engine: str) -> Callable[[Path, Load], Any]:
    @contextmanager
    def worker(folder: Path, load: Load) -> Iterator[Variants]:
        from asa_dist.rollout.cluster import connect, disconnect, start_local_ray

        model = make_model(folder, load)
        sampling = replace(load.sampling, rollout=load.sampling.rollout.model_copy(update={"engine": engine}))
        with ExitStack() as stack:
            ray = start_local_ray(num_cpus=2, num_gpus=0, object_store_bytes=2**28)
            stack.callback(ray.stop)
            os.environ |= ray.environment
            connect(ray.address)
            stack.callback(disconnect)
            yield {f"worker {engine}, {leases} lease{'s' * (leases > 1)}": stack.enter_context(
                steps(f"leases-{leases}", folder, load, model, sampling, GROUPS // leases)) for leases in (1, 4)}

    return worker


@contextmanager
def steps(name: str, folder: Path, load: Load, model: Any, sampling: SamplingConfig, groups_per_lease: int,
          ) -> Iterator[Callable[[], Turn]]:
    """A running system; each call is one step of it, from the prompts to the groups."""
    from asa_dist.rollout.client import RolloutClient
    from asa_dist.rollout.system import RolloutSystem
    from asa_dist.rollout.weights import piece_of_rank, tensor_specs

    system = RolloutSystem.start(
        name, str(folder), ModelConfig(), sampling, groups_per_lease, on_event=lambda event, details: None,
        stacks_folder=str(folder / "stacks"), build_engine=build_pinned_engine)
    tensors = dict(model.named_parameters())
    shapes = [(key, tensor.shape) for key, tensor in tensors.items()]
    client = RolloutClient(name, 0, 1, shapes, "float32", TIMEOUT_SECONDS)
    client.publish(0, [piece_of_rank(tensors[spec.name], spec, 0) for spec in tensor_specs(shapes, 1)])
    step = iter(range(1024))

    def sample() -> list[Any]:
        client.submit_prompts(now := next(step), load.prompts)
        return [response for group in client.take(now) for response in group.responses]

    try:
        yield lambda: timed(sample, lambda response: len(response.token_ids))
    finally:
        client.close()
        system.stop()

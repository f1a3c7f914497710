"""The `vllm` engine: vLLM in this process, fed with weights in place, sampling with the noise of `hf`.

    start      the model without weights, the KV cache, the sampler of `vllm_sampling`
    load       all tensors checked, then streamed into the live model; what is cached of older weights is forgotten
    begin      one request per response
    advance    vLLM batches requests of all bundles as it sees fit, and reads each phrasing's full blocks once
    sleep      weights and KV cache leave the GPU

Noise depends on (seed, epoch, prompt id, sibling, position) alone, so a response is the same in any batch and from
either engine, as far as logits are: in their last bits they depend on the batch, and on which blocks of the prompt were
cached. Where two tokens are as close as that, the responses part.

Shapes: P prompts, G responses per prompt, R = P·G requests, T tokens of a response.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asa_dist.config import ModelConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout.engine import NO_VERSION, EngineStartError, SamplingConfig, fitting_weights
from asa_dist.rollout.engine_choice import INSTALL_VLLM, installed_vllm
from asa_dist.rollout.sampling import sampling_keys
from asa_dist.rollout.vllm_worker import shared_weights
from asa_dist.rollout.weights import DTYPES

SUPPORTED = "0.32"  # the model runner's interfaces that are used here change between minor versions

SETTINGS = {  # which vLLM takes from the environment only, when it is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and scheduler in this process: they end with it
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the interface that `vllm_sampling` has; on GPUs version 2 is vLLM's default
    "VLLM_HOST_IP": "127.0.0.1",  # of its process group of one
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads and cores are those that Ray gave this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # below, it writes several lines for every version
}


SAMPLER = "asa_dist.rollout.vllm_sampling:CounterSampling"  # by name: worker processes import it
EXTENSION = "asa_dist.rollout.vllm_worker.WorkerExtension"
STEPS_PER_ADVANCE = 16  # often enough to take in what comes, seldom enough to cost nothing


class VllmEngine:
    """See :class:`asa_dist.rollout.engine.Engine`.

    Args:
        config_folder: folder with the model's transformers ``config.json``; weights come by :meth:`load` only.
        model: dtype of the trunk; vLLM picks its own attention.
        device: "cpu" or "cuda": that for which vLLM was built.
        num_parts: over which the model is split, each a process with a GPU of its own (tensor parallel).

    Raises:
        EngineStartError: vLLM is missing, of another version or for another device, it does not know the model, or
            memory does not suffice.
    """

    def __init__(self, config_folder: str, model: ModelConfig, sampling: SamplingConfig, device: str,
                 num_parts: int = 1) -> None:
        self.version = NO_VERSION
        self._sampling = sampling
        _check_installation()
        os.environ |= SETTINGS
        self._parameters = _parameters(config_folder, model.dtype)
        self._llm = _start(config_folder, model.dtype, sampling, device, num_parts)
        self._num_parts = num_parts
        self._is_asleep = False
        self._bundles: dict[int, _Bundle] = {}  # that are under way
        self._running: dict[str, _Running] = {}  # by the request's name
        self._num_waiting = 0  # requests that found no room in the cache
        self._free_slots: list[int] = []  # below the number of those that were ever in use
        self._num_slots = 0

    @property
    def has_room(self) -> bool:
        if not self._running:
            return True
        is_below = len(self._running) < self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        return is_below and not self._num_waiting

    def load(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        weights = fitting_weights(version, tensors, self._parameters)
        self.version = NO_VERSION  # until all of it is there
        if self._is_asleep:
            self._llm.wake_up(["weights"])
        self._send(weights)
        self._llm.apply_model(_repack_heads)
        if self._is_asleep:
            self._llm.wake_up(["kv_cache"])
            self._is_asleep = False
        # What is running will be read again by the new weights, the tokens sampled so far too.
        if not self._llm.llm_engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError(f"version {version}: vLLM kept cached states of older weights")
        for response in self._running.values():
            response.goes_on_with(version, self._num_sampled(response))
        self.version = version

    def begin(self, bundle_id: int, prompts: Sequence[Prompt]) -> None:
        from asa_dist.rollout.vllm_sampling import request_params

        if self.version == NO_VERSION:
            raise RuntimeError("begin() before load(): the engine has no weights")
        rollout = self._sampling.rollout
        asked = [(prompt, sibling) for prompt in prompts for sibling in range(rollout.responses_per_prompt)]
        epoch_R, prompt_id_R, sibling_R = torch.tensor([(p.epoch, p.prompt_id, sibling) for p, sibling in asked]).T
        key_R = sampling_keys(self._sampling.seed, epoch_R, prompt_id_R, sibling_R)
        self._bundles[bundle_id] = _Bundle(len(asked))
        for place, ((prompt, sibling), key) in enumerate(zip(asked, key_R.tolist(), strict=True)):
            name, slot = f"{bundle_id}.{place}", self._free_slot()
            internal_id = self._llm.llm_engine.add_request(
                name, {"prompt_token_ids": prompt.tokens_for(sibling).tolist()},
                request_params(key, slot, self._sampling.eos_token_id, rollout.max_new_tokens))
            self._running[name] = _Running(bundle_id, place, slot, internal_id, [(0, self.version)])

    def advance(self) -> list[tuple[int, list[tuple[Response, ...]]]]:
        """Until a bundle is finished, or :data:`STEPS_PER_ADVANCE` tokens of each response."""
        ended: list[tuple[_Running, Any]] = []
        finished: list[int] = []
        for _ in range(STEPS_PER_ADVANCE):
            for output in self._llm.llm_engine.step():  # those that end with this token
                ended.append((running := self._running.pop(output.request_id), output.outputs[0]))
                bundle = self._bundles[running.bundle_id]
                bundle.num_running -= 1
                if bundle.num_running == 0:
                    finished.append(running.bundle_id)
            if finished or not self._running:
                break
        self._keep_responses(ended)
        _, self._num_waiting = self._llm.llm_engine.engine_core.engine_core.scheduler.get_request_counts()
        group_size = self._sampling.rollout.responses_per_prompt
        return [(bundle_id, self._bundles.pop(bundle_id).groups(group_size)) for bundle_id in finished]

    def drop(self) -> None:
        self._llm.llm_engine.abort_request([running.internal_id for running in self._running.values()], internal=True)
        self._free_slots += [running.slot for running in self._running.values()]
        self._running.clear()
        self._bundles.clear()

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        self.begin(0, prompts)
        while not (finished := self.advance()):
            pass
        return finished[0][1]

    def sleep(self) -> None:
        """On CPUs vLLM keeps what it has: then only the version is forgotten."""
        self.version = NO_VERSION
        self._llm.sleep(level=2)  # weights are dropped, not kept in main memory: the next ones come anyway
        self._is_asleep = True

    def _send(self, weights: Mapping[str, Tensor]) -> None:
        if self._num_parts == 1:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
            return
        with shared_weights(weights) as shared:
            self._llm.collective_rpc("receive_weights", args=(shared,))

    def _num_sampled(self, running: _Running) -> int:
        states = self._llm.llm_engine.output_processor.request_states
        return states[running.internal_id].detokenizer.num_output_tokens()

    def _free_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def _keep_responses(self, ended: Sequence[tuple[_Running, Any]]) -> None:
        """In their bundles, with their log-probabilities, whose slots are free then."""
        if not ended:
            return
        slots, longest = [running.slot for running, _ in ended], max(len(found.token_ids) for _, found in ended)
        logprob_RT2 = self._llm.collective_rpc("logprobs_of", args=(slots, longest))[0]  # every worker has them
        self._free_slots += slots
        for (running, completion), logprob_T2 in zip(ended, logprob_RT2, strict=True):
            response = _response(completion, logprob_T2, running.spans)
            self._bundles[running.bundle_id].responses[running.place] = response


def _response(completion: Any, logprob_T2: np.ndarray, spans: Sequence[tuple[int, int]]) -> Response:
    token_ids = np.array(completion.token_ids, np.int32)
    logprob_T, behaviour_T = logprob_T2[:len(token_ids)].T.copy()
    return Response(token_ids, logprob_T, behaviour_T, completion.finish_reason == "stop", tuple(spans))


@dataclass
class _Bundle:
    num_running: int
    responses: dict[int, Response] = field(default_factory=dict)  # finished ones, by place

    def groups(self, group_size: int) -> list[tuple[Response, ...]]:
        in_order = [self.responses[place] for place in sorted(self.responses)]
        return [tuple(in_order[first:first + group_size]) for first in range(0, len(in_order), group_size)]


@dataclass
class _Running:
    """A response that is under way."""

    bundle_id: int
    place: int  # in its bundle
    slot: int  # where its log-probabilities are kept
    internal_id: str  # vLLM's
    spans: list[tuple[int, int]]  # as in Response

    def goes_on_with(self, version: int, num_sampled: int) -> None:
        if self.spans[-1][0] == num_sampled:  # nothing has been sampled since the last version came
            self.spans.pop()
        self.spans.append((num_sampled, version))


def _check_installation() -> None:
    found = installed_vllm()
    if found is None:
        raise EngineStartError(
            f"rollout.engine vllm: vLLM is not installed here; {INSTALL_VLLM}, or set rollout.engine=hf")
    if not found.partition(" ")[2].startswith(f"{SUPPORTED}."):
        raise EngineStartError(f"rollout.engine vllm needs vLLM {SUPPORTED}, installed is {found}; {INSTALL_VLLM}")


def _parameters(config_folder: str, dtype: str) -> dict[str, Tensor]:
    """The names, shapes and dtypes of a version, which are those of transformers: vLLM fuses some of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(config_folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
    return dict(model.named_parameters())


def _repack_heads(model: Any) -> None:
    """On CPUs every layer keeps a packed copy; reloading forgets that of a head whose weight is the embedding's."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _start(config_folder: str, dtype: str, sampling: SamplingConfig, device: str, num_parts: int) -> Any:
    """A ``vllm.LLM`` with random weights."""
    try:
        from vllm import LLM
        from vllm.platforms import current_platform

        from asa_dist.rollout.vllm_sampling import MAX_NEW_TOKENS, TRUNCATION, request_params
    except ImportError as error:
        raise EngineStartError(
            f"rollout.engine vllm: {installed_vllm()} does not load: {error}; {INSTALL_VLLM}") from error
    if current_platform.is_cpu() != (device == "cpu"):
        raise EngineStartError(f"rollout.engine vllm: {installed_vllm()} runs on {current_platform.device_type}, this "
                               f"worker is to run on {device}: set rollout.gpus_per_worker, or {INSTALL_VLLM}")
    rollout = sampling.rollout
    option, key = (("kv_cache_memory_bytes", "cpu_cache_bytes") if device == "cpu"
                   else ("gpu_memory_utilization", "gpu_memory_fraction"))
    memory = getattr(rollout, key)
    try:
        llm = LLM(
            config_folder, runner="generate", skip_tokenizer_init=True, trust_remote_code=False, dtype=dtype,
            load_format="dummy", seed=0, enforce_eager=device == "cpu", max_model_len=-1, generation_config="vllm",
            logits_processors=[SAMPLER], disable_log_stats=True,
            additional_config={MAX_NEW_TOKENS: rollout.max_new_tokens, TRUNCATION: {
                name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k", "min_p")}},
            tensor_parallel_size=num_parts, distributed_executor_backend="mp" if num_parts > 1 else None,
            worker_extension_cls=EXTENSION, async_scheduling=False,
            enable_sleep_mode=rollout.placement == "shared" and device != "cpu", **{option: memory})
        # Some models are refused by the first forward only, as by their size of a head.
        params = request_params(0, 0, sampling.eos_token_id, min(2, rollout.max_new_tokens))
        llm.generate({"prompt_token_ids": [0]}, params, use_tqdm=False)
        return llm
    except (ValueError, RuntimeError, MemoryError) as error:
        raise EngineStartError(f"rollout.engine vllm: {installed_vllm()} did not start with {config_folder} and "
                               f"rollout.{key} = {memory}, vLLM's {option}: {error}") from error

"""The `hf` engine: batched decoding with a KV cache around any transformers causal language model.

    prefill        every phrasing once, left-padded           cache of Q = P·K rows
    repeat         the row that each response continues       cache of B = P·G rows, row b = prompt b // G
    decode         one token per row and step                 record token and two log-probs, never [B, steps, V]
    compact        when half of the rows have ended, drop those from the batch

Shapes: P prompts of K phrasings, Q = P·K, N longest phrasing, G responses per prompt, B rows still in the batch,
V vocabulary, R = P·G responses, T = max_new_tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asa_dist.config import ModelConfig
from asa_dist.records import Prompt, Response
from asa_dist.rollout.engine import NO_VERSION, BundleEngine, SamplingConfig, fitting_weights
from asa_dist.rollout.sampling import choose_tokens, sampling_keys
from asa_dist.rollout.weights import DTYPES
from asa_kernels.cpu_linear import use_cpu_linear


@dataclass
class _Batch:
    """The rows that are still decoding, all at the same position of their response."""

    row_B: Tensor  # int64: which response, p·G + g
    key_B: Tensor  # int64: its sampling key
    prompt_length_B: Tensor  # int64
    mask_BN: Tensor  # int64: 1 = token, 0 = left padding; grows by one column per step
    finished_B: Tensor  # bool
    cache: Any  # transformers DynamicCache of B rows

    def keep(self, index_B: Tensor) -> None:
        for name in ("row_B", "key_B", "prompt_length_B", "mask_BN", "finished_B"):
            setattr(self, name, getattr(self, name)[index_B])
        self.cache.batch_select_indices(index_B)


class HfEngine(BundleEngine):
    """See :class:`asa_dist.rollout.engine.Engine`.

    Args:
        config_folder: folder with the model's transformers ``config.json``; weights come by :meth:`load` only.
        model: dtype and attention of the trunk.
        device: "cpu" or "cuda".
    """

    def __init__(self, config_folder: str, model: ModelConfig, sampling: SamplingConfig, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        self.version = NO_VERSION
        self._sampling = sampling
        self._device = torch.device(device)
        with no_init_weights():  # drawing billions of numbers that `load` replaces takes minutes
            built = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(config_folder, trust_remote_code=False), dtype=DTYPES[model.dtype],
                attn_implementation=model.attention_implementation(device != "cpu"), trust_remote_code=False)
        built.tie_weights()  # which initialisation would have done
        if self._device.type == "cpu":
            use_cpu_linear(built)
        self._model = built.to(self._device).eval().requires_grad_(False)

    def load(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        # A tied weight is listed once, under its first name.
        weights = fitting_weights(version, tensors, dict(self._model.named_parameters()))
        self._model.to(self._device)  # if it was asleep
        live = dict(self._model.named_parameters())
        for name, tensor in weights.items():
            live[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        self.version = NO_VERSION
        self._model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        if self.version == NO_VERSION:
            raise RuntimeError("generate() before load(): the engine has no weights")
        rollout = self._sampling.rollout
        batch, logits_BV = self._prefill(prompts)
        num_rows, steps = len(prompts) * rollout.responses_per_prompt, rollout.max_new_tokens
        token_RT = torch.zeros(num_rows, steps, dtype=torch.int32, device=self._device)
        logprob_RT = torch.zeros(num_rows, steps, dtype=torch.float32, device=self._device)
        behaviour_RT = torch.zeros_like(logprob_RT)
        for position in range(steps):
            token_B, logprob_B, behaviour_B = choose_tokens(
                logits_BV, batch.key_B, torch.tensor(position, device=self._device), temperature=rollout.temperature,
                top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p)
            # Rows that have ended go on until compaction; what they write lies behind their end-of-text.
            token_RT[batch.row_B, position] = token_B.int()
            logprob_RT[batch.row_B, position] = logprob_B
            behaviour_RT[batch.row_B, position] = behaviour_B
            batch.finished_B |= token_B == self._sampling.eos_token_id
            num_finished = int(batch.finished_B.sum())
            if num_finished == len(batch.row_B) or position + 1 == steps:
                break
            if 2 * num_finished >= len(batch.row_B):
                alive_B = (~batch.finished_B).nonzero()[:, 0]
                batch.keep(alive_B)
                token_B = token_B[alive_B]
            logits_BV = self._decode(batch, token_B, position)
        return self._responses(len(prompts), token_RT, logprob_RT, behaviour_RT)

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[_Batch, Tensor]:
        """One forward over the left-padded phrasings; then a row per response. Returns float logits [B, V] as well."""
        from transformers import DynamicCache

        repeats = self._sampling.rollout.responses_per_prompt
        phrasings = [token_ids for prompt in prompts for token_ids in prompt.phrasings]
        longest = max(map(len, phrasings))
        token_QN = torch.zeros(len(phrasings), longest, dtype=torch.int64)
        mask_QN = torch.zeros_like(token_QN)
        for row, token_ids in enumerate(phrasings):
            token_QN[row, longest - len(token_ids):] = torch.tensor(token_ids, dtype=torch.int64)
            mask_QN[row, longest - len(token_ids):] = 1
        token_QN, mask_QN = token_QN.to(self._device), mask_QN.to(self._device)
        cache = DynamicCache(config=self._model.config)
        logits_QV = self._model(
            input_ids=token_QN, attention_mask=mask_QN, position_ids=(mask_QN.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        phrasing_B = torch.tensor(_phrasing_of_each_response(prompts, repeats), device=self._device)
        cache.batch_select_indices(phrasing_B)
        mask_BN = mask_QN[phrasing_B]
        epoch_P, prompt_id_P = (torch.tensor([getattr(prompt, name) for prompt in prompts], device=self._device)
                                for name in ("epoch", "prompt_id"))
        key_B = sampling_keys(self._sampling.seed, epoch_P.repeat_interleave(repeats),
                              prompt_id_P.repeat_interleave(repeats),
                              torch.arange(repeats, device=self._device).repeat(len(prompts)))
        row_B = torch.arange(len(mask_BN), device=self._device)
        batch = _Batch(row_B, key_B, mask_BN.sum(-1), mask_BN, torch.zeros_like(row_B, dtype=torch.bool), cache)
        return batch, logits_QV[phrasing_B]

    def _decode(self, batch: _Batch, token_B: Tensor, position: int) -> Tensor:
        """Feeds the token at ``position`` of every response; returns the logits [B, V] of the next one."""
        batch.mask_BN = torch.cat([batch.mask_BN, torch.ones_like(batch.mask_BN[:, :1])], dim=1)
        return self._model(
            input_ids=token_B[:, None], attention_mask=batch.mask_BN,
            position_ids=(batch.prompt_length_B + position)[:, None], past_key_values=batch.cache,
            use_cache=True).logits[:, -1]

    def _responses(self, num_prompts: int, token_RT: Tensor, logprob_RT: Tensor, behaviour_RT: Tensor,
                   ) -> list[tuple[Response, ...]]:
        """Cuts every row behind its first end-of-text."""
        repeats = self._sampling.rollout.responses_per_prompt
        responses = []
        rows = zip(*(x_RT.cpu().numpy() for x_RT in (token_RT, logprob_RT, behaviour_RT)), strict=True)
        for token_T, logprob_T, behaviour_T in rows:
            ends = (token_T == self._sampling.eos_token_id).nonzero()[0]
            length = int(ends[0]) + 1 if len(ends) else len(token_T)
            responses.append(Response(
                token_ids=token_T[:length].copy(), logprob_T=logprob_T[:length].copy(),
                behaviour_logprob_T=behaviour_T[:length].copy(), finished=len(ends) > 0,
                spans=((0, self.version),)))
        return [tuple(responses[p * repeats:(p + 1) * repeats]) for p in range(num_prompts)]


def _phrasing_of_each_response(prompts: Sequence[Prompt], num_responses: int) -> list[int]:
    """Place, in the list of all prompts' phrasings, of the one that each of their responses continues."""
    places: list[int] = []
    first = 0
    for prompt in prompts:
        places += [first + prompt.variant_of(sibling) for sibling in range(num_responses)]
        first += len(prompt.phrasings)
    return places

"""How vLLM is made to sample as `hf` does: the counter-based sampler of `sampling.py` as a logits processor.

vLLM's own sampler draws from generators, whose state depends on what else was sampled, and reports either raw or
processed log-probabilities, of which a response needs both. So the draw is made here; vLLM takes the largest logit,
which is that of the token drawn. Both log-probabilities wait here, too, until the response is finished: in one tensor
on the device, a row for every response that is under way, so that a step costs one write and no copy to the host.

This is the interface of vLLM's V1 model runner. Shapes: B rows of vLLM's batch, V vocabulary, S slots, T largest number
of tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from asa_dist.rollout.sampling import choose_tokens

KEY, SLOT = "sampling_key", "slot"  # among a request's extra_args: int64 of `sampling_keys`; its row of log-probs
TRUNCATION, MAX_NEW_TOKENS = "truncation", "max_new_tokens"  # in the engine's additional_config: see the class


def request_params(key: int, slot: int, eos_token_id: int, max_new_tokens: int) -> SamplingParams:
    """One response: greedy, for the processor has drawn already; the end-of-text stays in ``token_ids``."""
    return SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=[eos_token_id], ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, extra_args={KEY: key, SLOT: slot})


class CounterSampling(LogitsProcessor):
    """See the module. vLLM makes it, one per worker process, and tells it which request is in which row.

    The engine's additional_config has ``truncation``, keyword arguments of `choose_tokens`, and ``max_new_tokens``, T.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._choose = vllm_config.additional_config[TRUNCATION]
        self._device = device
        self._requests: dict[int, tuple[int, int, list[int]]] = {}  # by row: key, slot, tokens so far (vLLM's own list)
        self._tokens_B: list[list[int]] = []  # of these requests, in their order; below, too
        self._key_B = self._slot_B = torch.empty(0, dtype=torch.int64, device=device)
        self._logprob_ST2 = torch.empty(0, vllm_config.additional_config[MAX_NEW_TOKENS], 2, device=device)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, lambda params, prompt, output: (
            params.extra_args[KEY], params.extra_args[SLOT], output))
        if batch_update is None or not self._requests:
            return
        keys, slots, tokens = zip(*(self._requests[row] for row in range(len(self._requests))), strict=True)
        self._tokens_B = [*tokens]
        self._key_B, self._slot_B = (torch.tensor(of_rows, device=self._device) for of_rows in (keys, slots))
        if (num_slots := 1 + max(slots)) > len(self._logprob_ST2):
            more_ST2 = self._logprob_ST2.new_empty(2 * num_slots, *self._logprob_ST2.shape[1:])
            more_ST2[:len(self._logprob_ST2)] = self._logprob_ST2
            self._logprob_ST2 = more_ST2

    def apply(self, logits: Tensor) -> Tensor:
        """Draws one token per row, from float32 [B, V], in which it then has the largest value."""
        position_B = torch.tensor([*map(len, self._tokens_B)], device=self._device)
        token_B, logprob_B, behaviour_B = choose_tokens(logits, self._key_B, position_B, **self._choose)
        # A row whose prompt is not yet read to its end comes again, at the same position.
        self._logprob_ST2[self._slot_B, position_B] = torch.stack([logprob_B, behaviour_B], dim=-1)
        return logits.scatter_(-1, token_B[:, None], float("inf"))

    def logprobs(self, slots: Sequence[int], num_tokens: int) -> np.ndarray:
        """Of the first tokens of these slots' responses: float32 [slots, tokens, 2], ``logprob`` and ``behaviour``."""
        slot_R = torch.tensor(slots, device=self._device)
        return self._logprob_ST2[slot_R, :num_tokens].cpu().numpy()

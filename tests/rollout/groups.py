"""Prompts, and answers to them, small enough to be made up by hand."""

from __future__ import annotations

import numpy as np

from asa_dist.records import Lease, Prompt, Response, RolloutGroup

G = 2  # responses per prompt


def make_prompts(step: int, count: int = 4) -> list[Prompt]:
    return [Prompt(100 * step + i, 0, np.array([1, 2], np.int32)) for i in range(count)]


def make_response(version: int, logprob: float = -1.0, num_tokens: int = 1) -> Response:
    logprob_T = np.full(num_tokens, logprob, np.float32)
    return Response(np.full(num_tokens, 5, np.int32), logprob_T, logprob_T, False, ((0, version),))


def answer(lease: Lease, version: int, logprob: float = -1.0) -> list[RolloutGroup]:
    """What a worker delivers; the longer, the larger the prompt's id (and empty, if that is a multiple of 3)."""
    return [RolloutGroup(lease.step, lease.first_index + i, prompt,
                         (make_response(version, logprob, prompt.prompt_id % 3),) * G)
            for i, prompt in enumerate(lease.prompts)]


def identities(groups: list[RolloutGroup]) -> list[tuple[int, int, int]]:
    """What makes two groups the same for training: (step, index, prompt id)."""
    return [(group.step, group.index, group.prompt.prompt_id) for group in groups]

"""Measured prompts, as the first stage of UDASA leaves them."""

from __future__ import annotations

import numpy as np

from asa_dist.records import MeasuredPrompt, MeasuredResponse, unmeasured


def prompt_of(*texts: str, prompt_id: int = 3) -> MeasuredPrompt:
    """These responses, nothing measured yet."""
    responses = tuple(unmeasured(text, np.array([4], np.int32), finished=True) for text in texts)
    return MeasuredPrompt(prompt_id, "w8", np.array([8], np.int32), policy_version=7, seed=4, responses=responses)


def random_prompts(count: int) -> list[MeasuredPrompt]:
    """Three responses each, of any length; the value uncertainty is not always known, and every fifth prompt ties."""
    rng = np.random.default_rng(6)

    def response(text: str, u_total: float) -> MeasuredResponse:
        token_ids = rng.integers(0, 2**31, rng.integers(0, 6), dtype=np.int32)
        semantic, factual, value = rng.random(3).tolist()
        return MeasuredResponse(text, token_ids, bool(rng.integers(2)), semantic, factual,
                                None if value < 0.3 else value, u_total)

    prompts = []
    for place in range(count):
        totals = [0.5] * 3 if place % 5 == 4 else rng.random(3).tolist()
        responses = tuple(response(f"answer {n} to {place}:\n\tä “\0” ", u_total) for n, u_total in enumerate(totals))
        token_ids = np.arange(1 + place, dtype=np.int32)
        prompts.append(MeasuredPrompt(3 * place, f"question {place}?\n", token_ids, 1, 2**31 - 1, responses))
    return prompts

"""Prompts as UDASA measures them: each a text of its own, in the tokenizer's chat template if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asa_dist.config import RolloutConfig
from asa_dist.records import TextPrompt
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.prompts import read_prompt_file
from asa_dist.runtime.data.tokenizer import encode_prompts
from asa_dist.udasa.one_prompt import instruction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text_prompts(
    tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig, first: int | None, *,
    max_instruction_tokens: int | None = None,
) -> tuple[list[TextPrompt], dict[int, str]]:
    """The prompts of ``rollout.prompt_file`` in order, and why others are left out, by prompt id.

    Args:
        first: only so many; None = all.
        max_instruction_tokens: with their :func:`asa_dist.udasa.one_prompt.instruction`, too, so long at most. It may
            be longer than ``max_prompt_tokens``: nothing is trained behind it. None = without.

    Raises:
        DataError: a file that cannot be read; nothing is left.
    """
    assert rollout.prompt_file is not None  # a rule of the config
    path = Path(rollout.prompt_file)
    prompts: list[TextPrompt] = []
    left_out: dict[int, str] = {}
    for prompt_id, (_, [text, *_]) in enumerate(read_prompt_file(path)[:first]):
        token_ids = encode_turn(tokenizer, text)
        if not len(token_ids):
            left_out[prompt_id] = "no token is left of it"
        elif len(token_ids) > rollout.max_prompt_tokens:
            left_out[prompt_id] = f"longer than rollout.max_prompt_tokens {rollout.max_prompt_tokens}"
        elif max_instruction_tokens is None:
            prompts.append(TextPrompt(prompt_id, text, token_ids))
        else:
            asked = encode_turn(tokenizer, instruction(text, rollout.responses_per_prompt))
            if len(asked) > max_instruction_tokens:
                left_out[prompt_id] = (
                    f"asking for {rollout.responses_per_prompt} responses at once takes {len(asked)} tokens: beside as "
                    f"many answers the model has room for {max_instruction_tokens}"
                )
            else:
                prompts.append(TextPrompt(prompt_id, text, token_ids, asked))
    if not prompts:
        raise DataError(f"{path}: none of its {len(left_out)} prompts can be used: prompt 0 is {left_out[0]}")
    return prompts, left_out


def encode_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Int32 [T]: what the user says, up to where the model is to answer; plain text without a chat template."""
    if tokenizer.chat_template is None:
        [token_ids] = encode_prompts(tokenizer, [text])
        return token_ids
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(rendered, add_special_tokens=False).input_ids, np.int32)

"""UDASA's prompts: as the model reads them, with and without a chat template; which are left out, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from asa_dist.config import RolloutConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.text_prompts import encode_turn, read_text_prompts
from asa_dist.runtime.data.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = ["What is gold?", "", "Why is the sky blue, and not green?", "Who?"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a text of some words"] * 3, 260)  # a token per byte, but for a few merges


def rollout(folder: Path, lines: list[str], **settings: int) -> RolloutConfig:
    path = folder / "prompts.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return RolloutConfig(prompt_file=str(path), **{"max_prompt_tokens": 20, **settings})


def test_ids_count_prompts_and_long_ones_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, left_out = read_text_prompts(tokenizer, rollout(tmp_path, LINES), None)
    assert [(prompt.prompt_id, prompt.text) for prompt in prompts] == [(0, LINES[0]), (2, LINES[3])]
    assert left_out == {1: "longer than rollout.max_prompt_tokens 20"}
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [LINES[0], LINES[3]]
    assert all(prompt.instruction_token_ids is None for prompt in prompts)


def test_only_the_first_ones(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, left_out = read_text_prompts(tokenizer, rollout(tmp_path, LINES), 1)
    assert [prompt.prompt_id for prompt in prompts] == [0] and left_out == {}


def test_nothing_is_left(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    short = rollout(tmp_path, LINES, min_prompt_tokens=1, max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"prompts.txt: none of its 3 prompts can be used: prompt 0 is longer than"):
        read_text_prompts(tokenizer, short, None)


def test_the_instruction_names_question_and_number_and_may_be_long(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = rollout(tmp_path, LINES, responses_per_prompt=5)
    [first, _], _ = read_text_prompts(tokenizer, settings, None, max_instruction_tokens=1000)
    assert first.instruction_token_ids is not None and len(first.instruction_token_ids) > 20
    said = tokenizer.decode(first.instruction_token_ids)
    assert "5 distinct responses" in said and said.endswith(f"Question: {LINES[0]}")
    assert tokenizer.decode(first.token_ids) == LINES[0]  # what is trained on stands behind the prompt itself


def test_an_instruction_without_room_is_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = rollout(tmp_path, LINES, responses_per_prompt=5)
    [_, last], _ = read_text_prompts(tokenizer, settings, None, max_instruction_tokens=1000)
    assert last.instruction_token_ids is not None
    room = len(last.instruction_token_ids)
    prompts, left_out = read_text_prompts(tokenizer, settings, None, max_instruction_tokens=room)
    assert [prompt.prompt_id for prompt in prompts] == [2]
    assert left_out[0].endswith(f"beside as many answers the model has room for {room}")


def test_a_chat_template_puts_the_prompt_into_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    chatty = train_tokenizer(["a text of some words"] * 3, 260)
    chatty.chat_template = TEMPLATE
    token_ids = encode_turn(chatty, "Who?")
    assert chatty.decode(token_ids) == "<|user|>Who?<|endoftext|><|assistant|>"
    assert list(token_ids).count(chatty.eos_token_id) == 1  # spelled out by the template, it is the token
    assert tokenizer.eos_token_id not in encode_turn(tokenizer, "Who?<|endoftext|>")  # and by a person it is text

"""The model as its own judge: against one context at a time through the plain model; tokens of yes and no."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import normalizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from asa_dist.config import ConfigError
from asa_dist.estimators.self_judge import SPELLINGS, SelfJudge, answer_tokens, plain_conversation
from asa_dist.runtime.data.tokenizer import train_tokenizer
from tests.estimators import tiny_models
from tests.estimators.tiny_models import BATCHES, QUESTION, QUESTIONS, load, plain


def judged_by_loop(folder: Path, contexts: list[str]) -> Tensor:
    model, tokenizer = plain(AutoModelForCausalLM, folder)
    first = {
        answer: {tokenizer(spelling).input_ids[0] for spelling in spellings} for answer, spellings in SPELLINGS.items()
    }
    space = tokenizer(" ").input_ids[0]
    u = []
    for context in contexts:
        probability_V = model(torch.tensor([tokenizer(context).input_ids])).logits[0, -1].double().softmax(-1)
        yes, no = (
            sum(probability_V[token] for token in first[answer] - first[other] - {space})
            for answer, other in (("yes", "no"), ("no", "yes"))
        )
        u.append(no / (yes + no))
    return torch.stack(u)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_self_judge_without_chat_template(tmp_path: Path, batch: int, tied: bool) -> None:
    tiny_models.save_causal(tmp_path, tiny_models.byte_tokenizer(), tied=tied)
    u_S = SelfJudge(load(AutoModelForCausalLM, tmp_path, batch, causal=True), QUESTION).uncertainty(QUESTIONS)
    contexts = [plain_conversation(*question, QUESTION) for question in QUESTIONS]
    torch.testing.assert_close(u_S, judged_by_loop(tmp_path, contexts), atol=1e-5, rtol=0)
    assert u_S.max() - u_S.min() > 0.1
    assert u_S[0] == pytest.approx(float(u_S[5]), abs=1e-6), "equal responses"


def test_self_judge_with_absolute_positions(tmp_path: Path) -> None:
    tiny_models.save_gpt2(tmp_path, tiny_models.byte_tokenizer())
    u_S = SelfJudge(load(AutoModelForCausalLM, tmp_path, 64, causal=True), QUESTION).uncertainty(QUESTIONS)
    contexts = [plain_conversation(*question, QUESTION) for question in QUESTIONS]
    torch.testing.assert_close(u_S, judged_by_loop(tmp_path, contexts), atol=1e-5, rtol=0)


def test_a_chat_template_brings_its_own_special_tokens(tmp_path: Path) -> None:
    """Llama's template spells out the beginning-of-text that its tokenizer would add as well."""
    tokenizer = tiny_models.byte_tokenizer("{{ eos_token }}" + tiny_models.CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    text_model = load(AutoModelForCausalLM, tiny_models.save_causal(tmp_path, tokenizer), causal=True)
    (columns,) = text_model.encode([f"{tokenizer.eos_token}<user>a"], rendered=True)
    assert columns["input_ids"].count(tokenizer.eos_token_id) == 1
    (columns,) = text_model.encode(["a"])
    assert columns["input_ids"].count(tokenizer.eos_token_id) == 1


def test_self_judge_in_the_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer(tiny_models.CHAT_TEMPLATE)
    tiny_models.save_causal(tmp_path, tokenizer)
    u_S = SelfJudge(load(AutoModelForCausalLM, tmp_path, causal=True), QUESTION).uncertainty(QUESTIONS)
    eos = tokenizer.eos_token
    contexts = [
        f"<user>{prompt}{eos}<assistant>{response}{eos}<user>{QUESTION}{eos}<assistant>"
        for prompt, response in QUESTIONS
    ]
    torch.testing.assert_close(u_S, judged_by_loop(tmp_path, contexts), atol=1e-5, rtol=0)


def test_end_of_text_spelled_out_in_a_response_ends_nothing(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    tiny_models.save_causal(tmp_path, tokenizer)
    text_model = load(AutoModelForCausalLM, tmp_path, causal=True)
    (columns,) = text_model.encode([f"a{tokenizer.eos_token}"])
    assert tokenizer.eos_token_id not in columns["input_ids"]


def test_tokenizer_that_ends_every_text_itself(tmp_path: Path) -> None:
    """The end-of-text behind the question would hide the answer."""
    tokenizer = tiny_models.byte_tokenizer()
    plain_folder = tiny_models.save_causal(tmp_path / "plain", tokenizer)
    expected_S = SelfJudge(load(AutoModelForCausalLM, plain_folder, causal=True), QUESTION).uncertainty(QUESTIONS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    folder = tiny_models.save_causal(tmp_path / "ends", tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[-1] == tokenizer.eos_token_id
    u_S = SelfJudge(load(AutoModelForCausalLM, folder, causal=True), QUESTION).uncertainty(QUESTIONS)
    torch.testing.assert_close(u_S, expected_S, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("prompt", "response", "expected"), [
    ("Which metal?", " Iron.", "Which metal? Iron.\nTrue?"),
    ("Which metal?", "Iron. ", "Which metal? Iron.\nTrue?"),
    ("It is ", "iron", "It is iron\nTrue?"),
    ("It is iron", ", they say", "It is iron, they say\nTrue?"),
    ("Which metal?", "", "Which metal?\nTrue?"),
])  # fmt: skip
def test_plain_conversation(prompt: str, response: str, expected: str) -> None:
    assert plain_conversation(prompt, response, "True?") == expected


def test_answer_tokens_are_the_beginnings_of_yes_and_no() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    answers = answer_tokens(tokenizer)
    assert not set(answers.yes) & set(answers.no)
    for tokens, answer in zip(answers, ("yes", "no"), strict=True):
        pieces = [tokenizer.decode([token]).strip().lower() for token in tokens]
        assert pieces and all(piece and answer.startswith(piece) for piece in pieces)


def test_a_space_alone_is_no_answer() -> None:
    """Here " yes" begins with one and " no" does not: half of all texts would count as yes."""
    tokenizer = train_tokenizer(["yes no No\n", "Yes no No\n"] * 9, 300)
    assert [tokenizer.tokenize(spelling)[0] for spelling in (" yes", " no", " No")] == ["Ġ", "Ġno", "ĠNo"]
    assert tokenizer.convert_tokens_to_ids("Ġ") not in answer_tokens(tokenizer).yes


def test_yes_and_no_that_begin_with_the_same_token() -> None:
    """As in a tokenizer that writes a mark before every word."""
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("#")
    with pytest.raises(ConfigError, match=r"both begin with \['#'\], and yes and no with nothing else"):
        answer_tokens(tokenizer)


def test_a_causal_model_reads_the_end_of_what_is_too_long(tmp_path: Path) -> None:
    tiny_models.save_causal(tmp_path, tiny_models.byte_tokenizer())
    told: list[str] = []
    judge = SelfJudge(load(AutoModelForCausalLM, tmp_path, causal=True, told=told), QUESTION)
    u_S = judge.uncertainty([("plum " * 100, "gold"), ("more plum " + "plum " * 100, "gold"), ("plum " * 100, "iron")])
    assert len(told) == 1 and "their end only" in told[0]
    assert u_S[0] == pytest.approx(float(u_S[1]), abs=1e-6) and abs(u_S[0] - u_S[2]) > 1e-3

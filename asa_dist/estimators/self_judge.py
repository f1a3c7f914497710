"""The embedded judge: the measured model answers a yes/no question about each of its own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from asa_dist.config import ConfigError
from asa_dist.estimators.estimator import Question, checked
from asa_dist.estimators.text_model import TextModel
from asa_dist.udasa.uncertainty import self_judge_uncertainty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELLINGS = {"yes": ("yes", " yes", "Yes", " Yes"), "no": ("no", " no", "No", " No")}


class AnswerTokens(NamedTuple):
    """Tokens that yes, and no, begin with in their spellings; none is in both."""

    yes: list[int]
    no: list[int]


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
    """A token that stands for both answers, or for a space alone, tells nothing and is left out.

    Raises:
        ConfigError: no token is left for one of the answers.
    """
    begins = {
        answer: {ids[0] for ids in tokenizer(list(spellings), add_special_tokens=False).input_ids if ids}
        for answer, spellings in SPELLINGS.items()
    }
    shared = begins["yes"] & begins["no"]
    tokens = {
        answer: sorted(token for token in ids - shared if tokenizer.decode([token]).strip())
        for answer, ids in begins.items()
    }
    if lacking := [answer for answer, ids in tokens.items() if not ids]:
        raise ConfigError(
            "self_judge needs a tokenizer with which yes and no begin with different tokens; here both begin with "
            f"{tokenizer.convert_ids_to_tokens(sorted(shared))}, and {' and '.join(lacking)} with nothing else. "
            "Choose another judge under udasa.factual and udasa.value, or another tokenizer"
        )
    return AnswerTokens(tokens["yes"], tokens["no"])


def plain_conversation(prompt: str, response: str, question: str) -> str:
    """What a model without a chat template is asked to continue: prompt and response as one text, then the question.

    A response whose leading space was lost in decoding, or in splitting, gets one.
    """
    gap = " " if response[:1].isalnum() and not prompt[-1:].isspace() else ""
    return f"{prompt}{gap}{response.rstrip()}\n{question}"


class SelfJudge:
    """P(no) / (P(yes) + P(no)) as the next token behind prompt, response and question.

    In the tokenizer's chat template, if it has one: the user asks the prompt, the assistant responds, the user asks the
    question. Otherwise :func:`plain_conversation`.

    Raises:
        ConfigError: :func:`answer_tokens`.
    """

    def __init__(self, text_model: TextModel, question: str) -> None:
        self._text_model, self._question = text_model, question
        self._answers = answer_tokens(text_model.tokenizer)

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        tokenizer = self._text_model.tokenizer
        has_template = tokenizer.chat_template is not None
        render = self._in_template if has_template else self._plain
        encoded = self._text_model.encode([render(*question) for question in questions], rendered=has_template)
        for columns in encoded:
            if columns["input_ids"][-1] == tokenizer.eos_token_id:  # some tokenizers end every text themselves
                columns["input_ids"].pop()
        u_S = torch.full((len(questions),), torch.nan, dtype=torch.float64)
        return checked(self._text_model.fill(u_S, encoded, self._judge), self._text_model.name, self._text_model.notify)

    def _in_template(self, prompt: str, response: str) -> str:
        turns = [("user", prompt), ("assistant", response), ("user", self._question)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return self._text_model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _plain(self, prompt: str, response: str) -> str:
        return plain_conversation(prompt, response, self._question)

    def _judge(self, inputs: Any) -> Tensor:
        logits_BV = self._text_model.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        logprob_BV = logits_BV.float().log_softmax(-1)
        yes_B, no_B = (logprob_BV[:, tokens].logsumexp(-1) for tokens in self._answers)
        return self_judge_uncertainty(yes_B, no_B)

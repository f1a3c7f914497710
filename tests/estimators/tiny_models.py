"""Tiny random models with their tokenizers, saved in folders as any pretrained one is, and what they are asked."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from asa_dist.estimators.text_model import TextModel, load_text_model
from asa_dist.runtime.data.tokenizer import train_tokenizer

MAX_TOKENS = 48
NLI_LABELS = ("contradiction", "entailment", "neutral")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = 0.5  # standard deviation of the weights, so that outputs differ visibly

TEXTS = ["a plum", "iron is what they say of bravok.", "", "x", "lead, zinc, gold!", "a plum", "the metal is cobalt?"]
QUESTIONS = [("what is it?", text) for text in TEXTS] + [("and the metal of bravok, which is it?", "no 1 knows")]
QUESTION = "Is it true?"
BATCHES = [1, 3, 64]


def word_tokenizer() -> BertTokenizer:
    """Letters and digits, with [CLS] and [SEP]."""
    letters = [*string.ascii_lowercase, *string.digits, *".,?!"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: place for place, token in enumerate(tokens)})


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, initializer_range=WIDE, pad_token_id=0, **SIZES
    )
    return save(BertModel(config), tokenizer, folder)


def save_classifier(folder: Path, labels: Sequence[str] | None, num_labels: int = 3, **settings: object) -> Path:
    """With ``labels``, or with those that transformers gives to ``num_labels`` unnamed ones."""
    tokenizer = word_tokenizer()
    named = {"num_labels": num_labels} if labels is None else {"id2label": dict(enumerate(labels))}
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        initializer_range=WIDE,
        pad_token_id=0,
        **SIZES,
        **named,
        **settings,
    )
    return save(BertForSequenceClassification(config), tokenizer, folder)


def save_roberta(folder: Path, labels: Sequence[str]) -> Path:
    """Its positions begin behind that of the padding: two fewer tokens than ``max_position_embeddings``."""
    tokenizer = word_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS + 2,
        pad_token_id=1,
        type_vocab_size=2,
        id2label=dict(enumerate(labels)),
        **SIZES,
    )
    return save(RobertaForSequenceClassification(config), tokenizer, folder)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(["Is it true? yes no yes no Yes No\n"] * 5, 300)
    tokenizer.chat_template = chat_template
    return tokenizer


def save_causal(folder: Path, tokenizer: PreTrainedTokenizerBase, *, tied: bool = True) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS * 4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=WIDE,
        tie_word_embeddings=tied,
        **SIZES,
    )
    return save(LlamaForCausalLM(config), tokenizer, folder)


def save_gpt2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """With absolute positions: padding on the left must not move the text."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_TOKENS * 4,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=WIDE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return save(GPT2LMHeadModel(config), tokenizer, folder)


def load(kind: Any, folder: Path, batch: int = 3, *, causal: bool = False, told: list[str] | None = None) -> TextModel:
    """As the estimators do. What they notify goes to ``told``; without it, it fails the test."""
    notify = pytest.fail if told is None else told.append
    return load_text_model(kind, str(folder), "some.key", device="cpu", batch=batch, notify=notify, causal=causal)


def plain(kind: Any, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As a reference does."""
    model = kind.from_pretrained(folder).float().eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)

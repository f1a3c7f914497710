from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    encode_prompts,
    load_pretrained_tokenizer,
    load_tokenizer,
    token_tables,
    train_tokenizer,
)
from tests.runtime.data.corpora import documents

TEXTS = ["Plain words.", "naïve café — 日本語 🙂\n\tindented", f"before {END_OF_TEXT} after", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(documents(200), 300)


def with_bos(folder: Path) -> Any:
    """A tokenizer that prefixes ``<s>`` by itself, as Llama's does."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fast = train_tokenizer(documents(50), 280)
    fast.add_special_tokens({"bos_token": "<s>"})
    backend = fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", fast.bos_token_id)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token="<s>").save_pretrained(folder)
    return load_pretrained_tokenizer(str(folder))


def test_saved_and_loaded_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path)
    assert (len(loaded), loaded.eos_token, loaded.eos_token_id) == (300, END_OF_TEXT, 0)
    for before, after in zip(encode_documents(tokenizer, TEXTS), encode_documents(loaded, TEXTS), strict=True):
        np.testing.assert_array_equal(before, after)


def test_documents_end_with_end_of_text_and_nothing_else_is_special(tokenizer: Any) -> None:
    encoded = list(encode_documents(tokenizer, TEXTS))
    assert len(encoded) == len(TEXTS)
    for text, tokens in zip(TEXTS, encoded, strict=True):
        assert tokens.dtype == np.int32
        assert np.flatnonzero(tokens == tokenizer.eos_token_id).tolist() == [len(tokens) - 1]
        assert tokenizer.decode(tokens[:-1].tolist()) == text


def test_many_documents_stay_in_order(tokenizer: Any) -> None:
    texts = documents(1000)  # several calls of the tokenizer
    assert [tokenizer.decode(tokens.tolist()) for tokens in encode_prompts(tokenizer, texts)] == texts


def test_beginning_of_text_only_if_the_tokenizer_adds_it(tokenizer: Any, tmp_path: Path) -> None:
    adding = with_bos(tmp_path / "bos")
    tokens, = encode_documents(adding, ["river stone"])
    assert (tokens[0], tokens[-1]) == (adding.bos_token_id, adding.eos_token_id)
    assert (tokens[1:-1] > 0).all() and adding.decode(tokens[1:-1].tolist()) == "river stone"
    silent = train_tokenizer(documents(50), 280)
    silent.add_special_tokens({"bos_token": "<s>"})
    prompt, = encode_prompts(silent, ["river stone"])
    assert silent.bos_token_id not in prompt


def test_training_is_deterministic() -> None:
    saved = [train_tokenizer(documents(300), 500).backend_tokenizer.to_str() for _ in range(2)]
    assert saved[0] == saved[1]


def test_token_tables(tokenizer: Any) -> None:
    tables = token_tables(tokenizer, len(tokenizer))
    assert tables.claim_end_V.shape == tables.sentence_end_V.shape == tables.blank_V.shape == (len(tokenizer),)

    def row(text: str) -> tuple[bool, bool, bool]:
        token, = tokenizer(text).input_ids
        return bool(tables.claim_end_V[token]), bool(tables.sentence_end_V[token]), bool(tables.blank_V[token])

    assert [row(text) for text in (".", "!", "?")] == [(True, True, False)] * 3
    assert row(";") == (True, False, False)
    assert row("\n") == (True, False, True)
    assert row(" ") == (False, False, True)
    assert row(",") == (False, False, False)
    eos = tokenizer.eos_token_id
    assert (tables.claim_end_V[eos], tables.blank_V[eos]) == (False, True)
    pieces = tokenizer("é").input_ids  # two bytes, neither a character
    assert len(pieces) == 2
    assert not tables.blank_V[pieces].any() and not tables.claim_end_V[pieces].any()


def test_token_tables_look_through_trailing_blanks() -> None:
    tokenizer = train_tokenizer([". \n\n. \n\n"], 400)
    tokenizer.add_tokens(["end.  ", "end.\n", "end.\t", ";\n", "a\nb", "!  x"])
    tables = token_tables(tokenizer, len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(["end.  ", "end.\n", "end.\t", ";\n", "a\nb", "!  x"])
    assert tables.claim_end_V[ids].tolist() == [True, True, False, True, True, False]
    assert tables.sentence_end_V[ids].tolist() == [True, True, True, False, False, False]


def test_unusable_tokenizers_are_named(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(DataError, match=r"no_eos' has no end-of-text token: set eos_token"):
        load_pretrained_tokenizer(str(tmp_path / "no_eos"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty' cannot be loaded"):
        load_pretrained_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="was not prepared"):
        load_tokenizer(tmp_path)


def test_a_model_may_have_more_ids_than_its_tokenizer(tokenizer: Any) -> None:
    tables = token_tables(tokenizer, len(tokenizer) + 5)
    assert tables.blank_V.shape == (len(tokenizer) + 5,)
    assert tables.blank_V[-5:].all()
    assert not tables.claim_end_V[-5:].any()
    assert not tables.sentence_end_V[-5:].any()


@pytest.mark.parametrize("tokenizer_class", ["OwnTokenizer", "PreTrainedTokenizerFast"])
def test_code_in_a_tokenizer_folder_is_never_run(
    tokenizer: Any, tmp_path: Path, tokenizer_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n", encoding="utf-8")
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "y")
    if tokenizer_class == "OwnTokenizer":
        with pytest.raises(DataError, match="cannot be loaded"):
            load_pretrained_tokenizer(str(folder))
    else:
        assert len(load_pretrained_tokenizer(str(folder))) == 300
    assert not questions and not (tmp_path / "was_run").exists()

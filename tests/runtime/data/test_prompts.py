from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from asa_dist.config import SourceConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.prompts import PromptStream
from asa_dist.runtime.data.sources import is_heldout
from asa_dist.runtime.data.tokenizer import encode_documents, load_tokenizer
from tests.runtime.data.corpora import (
    data_config,
    documents,
    prepare_quietly,
    rollout_config,
    write_dataset,
    write_jsonl,
)


@pytest.fixture(params=["jsonl", "stream"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SourceConfig:
    texts = [*documents(80), "short", "tiny"]
    if request.param == "jsonl":
        return SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", texts)))
    return SourceConfig(kind="dataset", name=str(write_dataset(tmp_path / "d", texts)), streaming=True)


def test_prompts_are_prefixes_of_training_documents(source: SourceConfig, tmp_path: Path) -> None:
    data, rollout = data_config(source), rollout_config()
    prepare_quietly(data, tmp_path / "run")
    training = [text for text in documents(80) if not is_heldout(text, data.heldout_fraction)]
    encoded = [tokens.tolist() for tokens in encode_documents(load_tokenizer(tmp_path / "run"), training)]
    stream = PromptStream(tmp_path / "run", data, rollout, seed=5)
    prompts = [stream.prompt(i) for i in range(3 * len(training))]
    origins: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for number, prompt in enumerate(prompts):
        assert (prompt.prompt_id, prompt.epoch) == (number, number // len(training))
        assert prompt.token_ids.dtype == np.int32
        length = len(prompt.token_ids)
        matching = [i for i, tokens in enumerate(encoded) if tokens[:length] == prompt.token_ids.tolist()]
        assert matching
        assert all(len(encoded[i]) - 1 > length for i in matching)  # something is left to continue
        if len(matching) == 1:
            origins[prompt.epoch][matching[0]] += 1
    assert all(count == 1 for epoch in origins.values() for count in epoch.values())
    assert {len(prompt.token_ids) for prompt in prompts} == set(range(3, 10))
    assert list(origins[0]) != list(origins[1])  # shuffled anew


def test_prompts_are_a_function_of_config_seed_and_id(source: SourceConfig, tmp_path: Path) -> None:
    data, rollout = data_config(source), rollout_config()
    prepare_quietly(data, tmp_path / "run")
    forward = PromptStream(tmp_path / "run", data, rollout, seed=5)
    prompts = [forward.prompt(i).token_ids.tolist() for i in range(200)]
    jumping = PromptStream(tmp_path / "run", data, rollout, seed=5)
    for i in (199, 3, 100, 0):
        assert jumping.prompt(i).token_ids.tolist() == prompts[i]
    other = PromptStream(tmp_path / "run", data, rollout, seed=6)
    assert [other.prompt(i).token_ids.tolist() for i in range(20)] != prompts[:20]


def test_sources_give_prompts_by_weight(tmp_path: Path) -> None:
    for letter in "qz":
        write_jsonl(tmp_path / f"{letter}.jsonl", [f"{letter} {number} " * 20 for number in range(60)])
    data = data_config(SourceConfig(kind="jsonl", path=str(tmp_path / "q.jsonl"), weight=1.0),
                       SourceConfig(kind="jsonl", path=str(tmp_path / "z.jsonl"), weight=4.0))
    rollout = rollout_config()
    prepare_quietly(data, tmp_path / "run")
    stream, tokenizer = PromptStream(tmp_path / "run", data, rollout, seed=0), load_tokenizer(tmp_path / "run")
    firsts = Counter(tokenizer.decode(stream.prompt(i).token_ids.tolist())[0] for i in range(100))
    assert firsts == {"q": 20, "z": 80}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompt_file(suffix: str, tmp_path: Path) -> None:
    questions = [f"river {number}?" for number in range(12)]
    path = tmp_path / f"prompts{suffix}"
    lines = questions if suffix == ".txt" else [json.dumps({"prompt": question}) for question in questions]
    path.write_text("\n\n".join(lines) + "\n")
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    rollout = rollout_config(prompt_file=str(path), max_prompt_tokens=16)
    prepare_quietly(data, tmp_path / "run", rollout)
    path.unlink()  # the run keeps its own copy
    stream, tokenizer = PromptStream(tmp_path / "run", data, rollout, seed=0), load_tokenizer(tmp_path / "run")
    prompts = [stream.prompt(i) for i in range(36)]
    texts = [tokenizer.decode(prompt.token_ids.tolist()) for prompt in prompts]
    for epoch in range(3):
        assert sorted(texts[12 * epoch:12 * epoch + 12]) == sorted(questions)
        assert {prompt.epoch for prompt in prompts[12 * epoch:12 * epoch + 12]} == {epoch}
    assert texts[:12] != texts[12:24]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", "fine\n\n" + "river " * 20, r"p\.txt:3: a prompt of \d+ tokens; allowed .* rollout\.max_prompt_tokens 9"),
    ("p.txt", "\n \n", r"p\.txt: no prompt in this file"),
    ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"p\.jsonl:2: no field 'prompt'; fields: text"),
    ("p.jsonl", '{"prompt": ""}\n', r"p\.jsonl:1: a prompt of 0 tokens"),
    ("p.csv", "a\n", r"p\.csv: prompt files end in \.txt .* or \.jsonl, not '\.csv'"),
])
def test_bad_prompt_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    with pytest.raises(DataError, match=message):
        prepare_quietly(data, tmp_path / "run", rollout_config(prompt_file=str(tmp_path / name)))
    assert not (tmp_path / "run" / "data").exists()

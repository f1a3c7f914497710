from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from asa_dist.config import DataConfig, RolloutConfig, SourceConfig
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
    ("p.txt", "fine\n\n" + "river " * 20, r"p\.txt:3: the prompt has \d+ tokens; allowed .*max_prompt_tokens 9"),
    ("p.txt", "\n \n", r"p\.txt: no prompt in this file"),
    ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"p\.jsonl:2: no field 'prompt'; fields: text"),
    ("p.jsonl", '{"prompt": ""}\n', r"p\.jsonl:1: the prompt has 0 tokens"),
    ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b", "variants": ["c", "' + "river " * 20 + '"]}\n',
     r"p\.jsonl:3: variant 2 has \d+ tokens; allowed are 1 to rollout\.max_prompt_tokens 9"),
    ("p.jsonl", '{"prompt": "a", "variants": [""]}\n', r"p\.jsonl:1: variant 1 has 0 tokens"),
    ("p.jsonl", '{"prompt": "a", "variants": "b"}\n', r"p\.jsonl:1: field 'variants' must be a list of texts"),
    ("p.jsonl", '{"prompt": "a", "variants": ["b", 3]}\n', r"p\.jsonl:1: variant 2 must be text, not int"),
    ("p.jsonl", '{"prompt": "a", "variants": ["\\ud800"]}\n', r"p\.jsonl:1: variant 1: half a surrogate pair"),
    ("p.jsonl", '{"prompt": "a", "variants": ["b", "a"]}\n', r"p\.jsonl:1: variant 2 says the same as a phrasing"),
    ("p.csv", "a\n", r"p\.csv: prompt files end in \.txt .* or \.jsonl, not '\.csv'"),
])
def test_bad_prompt_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    with pytest.raises(DataError, match=message):
        prepare_quietly(data, tmp_path / "run", rollout_config(prompt_file=str(tmp_path / name)))
    assert not (tmp_path / "run" / "data").exists()


def write_phrasings(path: Path, num_prompts: int, num_phrasings: int) -> Path:
    """Prompt i in the phrasings "i.0?", "i.1?", …"""
    lines = ([f"{i}.{k}?" for k in range(num_phrasings)] for i in range(num_prompts))
    path.write_text("".join(json.dumps({"prompt": first, "variants": rest, "answer": 42}) + "\n"
                            for first, *rest in lines))
    return path


def read_phrasings(run_dir: Path, data: DataConfig, rollout: RolloutConfig, ids: Sequence[int], seed: int = 0,
                   ) -> list[tuple[str, ...]]:
    stream, tokenizer = PromptStream(run_dir, data, rollout, seed), load_tokenizer(run_dir)
    return [tuple(tokenizer.decode(tokens.tolist()) for tokens in stream.prompt(i).phrasings) for i in ids]


@pytest.mark.parametrize("num_drawn", [1, 2, 3])
def test_phrasings_of_a_prompt_file(num_drawn: int, tmp_path: Path) -> None:
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    rollout = rollout_config(prompt_file=str(write_phrasings(tmp_path / "p.jsonl", 5, 3)), prompt_variants=num_drawn)
    prepare_quietly(data, tmp_path / "run", rollout)
    prompts = read_phrasings(tmp_path / "run", data, rollout, range(40 * 5))
    drawn: Counter[tuple[int, str]] = Counter()
    for epoch in range(40):
        of_epoch = prompts[5 * epoch:5 * epoch + 5]
        assert sorted(phrasings[0][0] for phrasings in of_epoch) == list("01234")
        for phrasings in of_epoch:
            assert len(set(phrasings)) == num_drawn and {text[0] for text in phrasings} == {phrasings[0][0]}
            drawn.update(enumerate(phrasings))
    assert drawn.keys() == {(place, f"{i}.{k}?") for place in range(num_drawn) for i in range(5) for k in range(3)}
    again = read_phrasings(tmp_path / "run", data, rollout, (150, 3, 77))
    assert again == [prompts[150], prompts[3], prompts[77]]  # a function of the id, whatever was read before
    other_seed = read_phrasings(tmp_path / "run", data, rollout, range(20), seed=1)
    assert other_seed != prompts[:20]


def test_every_line_needs_enough_phrasings(tmp_path: Path) -> None:
    path = write_phrasings(tmp_path / "p.jsonl", 3, 4)
    path.write_text(path.read_text() + '{"prompt": "a", "variants": ["b"]}\n')
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    with pytest.raises(DataError, match=r"p\.jsonl:4: 2 of 3 phrasings, .*: rollout\.prompt_variants asks"):
        prepare_quietly(data, tmp_path / "run", rollout_config(prompt_file=str(path), prompt_variants=3))
    rollout = rollout_config(prompt_file=str(path), prompt_variants=2)
    prepare_quietly(data, tmp_path / "run", rollout)
    assert {"a", "b"} in map(set, read_phrasings(tmp_path / "run", data, rollout, range(4)))
    with pytest.raises(DataError, match=r"rollout\.prompt_variants: 2 then, 1 now"):
        prepare_quietly(data, tmp_path / "run", rollout_config(prompt_file=str(path)))


def test_damaged_prompts_are_named(tmp_path: Path) -> None:
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))
    rollout = rollout_config(prompt_file=str(write_phrasings(tmp_path / "p.jsonl", 3, 2)))
    prepare_quietly(data, tmp_path / "run", rollout)
    (tmp_path / "run" / "data" / "prompts" / "prompts.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"data/prompts: prepared data cannot be read .* delete .*run/data to prepare"):
        PromptStream(tmp_path / "run", data, rollout, seed=0)

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asa_dist.config import DataConfig, SourceConfig, TokenizerConfig
from asa_dist.runtime.data import corpus
from asa_dist.runtime.data import prepare as prepare_module
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.prepare import prepare
from asa_dist.runtime.data.rows import CorpusRows
from asa_dist.runtime.data.sources import is_heldout
from asa_dist.runtime.data.tokenizer import train_tokenizer
from tests.runtime.data.corpora import (
    data_config,
    documents,
    prepare_quietly,
    rollout_config,
    write_dataset,
    write_jsonl,
)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", documents(80)))))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_call_only_reads_the_summary(data: DataConfig, tmp_path: Path) -> None:
    first = prepare_quietly(data, tmp_path / "run")
    before = files(tmp_path / "run")
    assert {name.split("/")[0] for name in before} == {"tokenizer", "data"}
    Path(str(data.sources[0].path)).unlink()
    messages: list[str] = []
    assert prepare(data, rollout_config(), 0, tmp_path / "run", messages.append) == first
    assert (messages, files(tmp_path / "run")) == ([], before)


def test_the_summary_counts_what_is_there(data: DataConfig, tmp_path: Path) -> None:
    summary = prepare_quietly(data, tmp_path / "run")
    source, = summary.sources
    assert summary.documents == source.train_documents + source.heldout_documents == 80
    assert summary.tokens == (tmp_path / "run/data/source_0/tokens.bin").stat().st_size // 4
    assert (summary.vocab_size, summary.eos_id) == (300, 0)
    other = prepare_quietly(data.model_copy(update={"max_documents": 79}), tmp_path / "other")
    assert other.corpus_hash != summary.corpus_hash


def test_another_config_in_the_same_run_folder_is_refused(data: DataConfig, tmp_path: Path) -> None:
    prepare_quietly(data, tmp_path / "run")
    with pytest.raises(DataError, match=r"other data \(data\.sequence_length: 32 then, 64 now; seed: 0 then, 1 now\)"):
        prepare_quietly(data.model_copy(update={"sequence_length": 64}), tmp_path / "run", seed=1)
    with pytest.raises(DataError, match=r"rollout\.max_prompt_tokens: 9 then, 10 now"):
        prepare_quietly(data, tmp_path / "run", rollout_config(max_prompt_tokens=10))
    prepare_quietly(data, tmp_path / "run", rollout_config(temperature=0.5))  # no matter of data


def test_a_smaller_vocabulary_than_asked_for_is_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [f"ab {number} cd " * 12 for number in range(50)])
    data = data_config(SourceConfig(kind="jsonl", path=str(path)), tokenizer={"train": {"vocab_size": 5000}})
    messages: list[str] = []
    summary = prepare(data, rollout_config(), 0, tmp_path / "run", messages.append)
    assert 257 < summary.vocab_size < 400
    assert any(f"has {summary.vocab_size} tokens rather than 5,000" in message for message in messages)


def test_the_tokenizer_never_saw_held_out_text(tmp_path: Path) -> None:
    texts = documents(80)
    heldout = [text for text in texts if is_heldout(text, 0.1)]
    assert heldout
    for name, kept in (("all", texts), ("training", [text for text in texts if text not in heldout])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", kept)
        tokenizer = corpus.make_tokenizer(data_config(SourceConfig(kind="jsonl", path=str(path))), print)
        tokenizer.save_pretrained(tmp_path / name)
    assert (tmp_path / "all/tokenizer.json").read_bytes() == (tmp_path / "training/tokenizer.json").read_bytes()


def test_a_tokenizer_folder_is_copied_into_the_run(data: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(documents(10), 280).save_pretrained(tmp_path / "given")
    given = data.model_copy(update={"tokenizer": TokenizerConfig(path=str(tmp_path / "given"))})
    assert prepare_quietly(given, tmp_path / "run").vocab_size == 280
    assert (tmp_path / "run/tokenizer/tokenizer.json").is_file()


def test_of_a_stream_only_held_out_documents_are_stored(tmp_path: Path) -> None:
    name = str(write_dataset(tmp_path / "d", documents(200)))
    data = data_config(SourceConfig(kind="dataset", name=name, streaming=True), max_heldout_rows=2)
    source, = prepare_quietly(data, tmp_path / "run").sources
    assert source.heldout_tokens >= 2 * data.sequence_length
    assert source.train_documents + source.heldout_documents < 200  # read no further than needed
    assert (tmp_path / "run/data/source_0/tokens.bin").stat().st_size == 4 * source.heldout_tokens


@pytest.mark.parametrize(("texts", "changes", "message"), [
    (["", " \n"], {}, r"data\.sources\.0 \(jsonl .*\): no document in it"),
    (["a b c"] * 3, {}, r"\d+ training tokens do not fill one row of data\.sequence_length 32"),
    (["a few"] * 40, {}, r"none of 40 training documents is longer than rollout\.max_prompt_tokens 9"),
    ([documents(1)[0]] * 10, {"heldout_fraction": 1e-9}, r"held-out split is empty: none of 10 documents fell into"),
])
def test_unusable_content_is_explained(
    tmp_path: Path, texts: list[str], changes: dict[str, object], message: str,
) -> None:
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(tmp_path / "d.jsonl", texts))), **changes)
    with pytest.raises(DataError, match=message):
        prepare_quietly(data, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("moment", ["write_source", "check_sources", "_publish", "os.rename 1", "os.rename 2"])
def test_a_crash_at_any_moment_is_repaired_by_the_next_call(
    moment: str, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The crash is a kill: no clean-up of this process runs."""
    expected = prepare_quietly(data, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        try:
            name, _, call = moment.partition(" ")
            _kill_at(monkeypatch, name, int(call or 1))
            prepare_quietly(data, tmp_path / "run")
        finally:
            os._exit(0)  # never back into pytest
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child was to die on the way"
    assert not (tmp_path / "run" / "data").exists()
    assert (tmp_path / "run" / ".prepare").exists()
    assert prepare_quietly(data, tmp_path / "run") == expected
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def _kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Ends this process at the ``call``-th call of a function of the module under test."""
    owner = os if name == "os.rename" else prepare_module
    function, calls = getattr(owner, name.removeprefix("os.")), []

    def deadly(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    monkeypatch.setattr(owner, name.removeprefix("os."), deadly)


def test_heavy_libraries_stay_out_until_needed() -> None:
    code = ("import sys, asa_dist.runtime.data.prepare, asa_dist.runtime.data.rows, asa_dist.runtime.data.prompts\n"
            "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers'}\n"
            "print(sorted(heavy & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_two_kinds_of_sources_together(data: DataConfig, tmp_path: Path) -> None:
    name = str(write_dataset(tmp_path / "d", documents(100, seed=1)))
    both = data.model_copy(update={"sources": [*data.sources, SourceConfig(kind="dataset", name=name, streaming=True)]})
    prepare_quietly(both, tmp_path / "run")
    rows = CorpusRows(tmp_path / "run", both, seed=0)
    assert rows.rows(0, 40).input_ids_RT.shape == (40, 32)
    assert rows.heldout_rows(8).input_ids_RT.shape[0] > 1


def test_preparing_twice_gives_the_same_bytes(data: DataConfig, tmp_path: Path) -> None:
    assert prepare_quietly(data, tmp_path / "a") == prepare_quietly(data, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")

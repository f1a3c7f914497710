from __future__ import annotations

import json
from pathlib import Path

import pytest

from asa_dist.config import SourceConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.sources import is_heldout, read_documents, shuffled_documents
from tests.runtime.data.corpora import data_config, documents, write_dataset, write_jsonl


def read(source: SourceConfig, **changes: object) -> list[str]:
    return list(read_documents(data_config(source, **changes), 0))


def test_text_is_divided_where_two_lines_are_blank(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffChapter é\r\n\r\nsecond paragraph\n\n\n\n  indented\nchapter\n \n\t\n   \n\n\n".encode())
    assert read(SourceConfig(kind="text", path=str(path))) == ["Chapter é\n\nsecond paragraph", "  indented\nchapter"]


def test_folders_are_read_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.txt", "b/z.txt", "a.txt", "ignored.md"):
        (tmp_path / name).write_text(name)
    assert read(SourceConfig(kind="text", path=str(tmp_path))) == ["a.txt", "b/z.txt", "c.txt"]


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ["one", " \n", "", "two"], field="body")
    with path.open("a") as file:
        file.write("\n" + json.dumps({"body": "three", "other": 1}) + "\n")
    assert read(SourceConfig(kind="jsonl", path=str(path), text_field="body")) == ["one", "two", "three"]
    assert read(SourceConfig(kind="jsonl", path=str(path), text_field="body"), max_documents=2) == ["one", "two"]


def test_parquet_and_dataset_folders_give_the_same_documents(tmp_path: Path) -> None:
    import datasets

    texts = documents(30)
    write_dataset(tmp_path / "loaded", texts)
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "parquet" / "train.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "saved_splits")
    assert read(SourceConfig(kind="parquet", path=str(tmp_path / "parquet"))) == texts
    for name in ("loaded", "parquet", "saved", "saved_splits"):
        for streaming in (False, True):
            assert read(SourceConfig(kind="dataset", name=str(tmp_path / name), streaming=streaming)) == texts


def test_streams_are_shuffled_by_their_seed(tmp_path: Path) -> None:
    texts = documents(60)
    data = data_config(SourceConfig(kind="dataset", name=str(write_dataset(tmp_path / "d", texts)), streaming=True))
    first = list(shuffled_documents(data, 0, seed=1))
    assert first == list(shuffled_documents(data, 0, seed=1))
    assert first != texts
    assert first != list(shuffled_documents(data, 0, seed=2))
    assert sorted(first) == sorted(texts)


def test_heldout_share_is_the_fraction_and_grows_with_it() -> None:
    texts = documents(4000)
    small, large = ({text for text in texts if is_heldout(text, fraction)} for fraction in (0.02, 0.2))
    assert small < large
    assert 45 <= len(small) <= 120  # binomial: 80 ± 4.5 standard deviations
    assert 690 <= len(large) <= 910


@pytest.mark.parametrize(("line", "message"), [
    ('{"body": "x"}', "no field 'text'; fields: body"),
    ('{"text": 3}', "field 'text' must be text, not int"),
    ('{"text": "x"', "not valid JSON"),
    ('["x"]', "a JSON list; each line must be one JSON object"),
    ('{"text": "\\ud800"}', "half a surrogate pair at character 0"),
])
def test_bad_jsonl_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read(SourceConfig(kind="jsonl", path=str(path)))
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8 .*byte 3"):
        read(SourceConfig(kind="text", path=str(path)))


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = write_dataset(tmp_path / "d", documents(3))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "fine.parquet")
    (tmp_path / "empty").mkdir()
    cases = [
        (SourceConfig(kind="dataset", name=str(folder), split="nope"), r"data\.sources\.0 \(dataset .*split 'nope'"),
        (SourceConfig(kind="dataset", name=str(folder), split="nope", streaming=True), "split 'nope' cannot be loaded"),
        (SourceConfig(kind="dataset", name=str(folder), text_field="body"), "record 0: no field 'body'; fields: text"),
        (SourceConfig(kind="parquet", path=str(tmp_path / "fine.parquet"), text_field="body"),
         "no column 'body'; columns: text"),
        (SourceConfig(kind="parquet", path=str(tmp_path / "broken.parquet")), r"broken\.parquet: cannot be read"),
        (SourceConfig(kind="jsonl", path=str(tmp_path / "empty")), r"no \*\.jsonl file"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            read(source)

"""Documents, as text, out of every kind of source."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from asa_dist.config import DataConfig, SourceConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.python_docs import python_documents


def describe(source: SourceConfig, index: int) -> str:
    """How messages name a source: its config key, kind and location."""
    return f"data.sources.{index} ({' '.join(filter(None, (source.kind, source.path, source.name)))})"


def is_heldout(text: str, fraction: float) -> bool:
    """Held-out by content: the same text is on the same side in every run, at every place, for every seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def read_documents(data: DataConfig, index: int) -> Iterator[str]:
    """The documents of one source in their own order, at most ``data.max_documents``; blank ones are left out.

    Raises:
        DataError: a file or dataset that cannot be read, a record without the text field, text that is not Unicode.
    """
    source = data.sources[index]
    match source.kind:
        case "python_docs":
            texts = python_documents()
        case "dataset":
            texts = _dataset_texts(source, index, _load_dataset(source, index))
        case kind:
            read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[kind]
            texts = (text for path in _files(source, index) for text in read(path, source.text_field))
    return islice(filter(_is_visible, texts), data.max_documents)


def shuffled_documents(data: DataConfig, index: int, seed: int) -> Iterator[str]:
    """The documents of a streaming source, shuffled by ``seed`` within a window of ``data.shuffle_buffer_documents``.

    Raises:
        DataError: as :func:`read_documents`.
    """
    source = data.sources[index]
    records = _load_dataset(source, index)
    if data.max_documents is not None:
        records = records.take(data.max_documents)
    shuffled = records.shuffle(seed=seed, buffer_size=data.shuffle_buffer_documents)
    return filter(_is_visible, _dataset_texts(source, index, shuffled))


def _is_visible(text: str) -> bool:
    return not text.isspace() and text != ""


def _files(source: SourceConfig, index: int) -> list[Path]:
    """The file itself, or all files of the kind's suffix below the folder, in path order."""
    path = Path(str(source.path)).expanduser()
    if path.is_file():
        return [path]
    suffix = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}[source.kind]
    files = sorted(path.rglob(f"*{suffix}"))
    if not files:
        raise DataError(f"{describe(source, index)}: no *{suffix} file in this folder; name a file, or another kind")
    return files


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """``(place, line)`` of a UTF-8 file: place is ``file:line`` for messages; line ends (LF or CRLF) are removed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason}, byte {error.start}); convert the file") from None


def _read_text(path: Path, text_field: str) -> Iterator[str]:
    """Documents are separated by two or more blank lines, as chapters are; one blank line separates paragraphs."""
    document: list[str] = []
    for _, line in read_lines(path):
        document.append(line)
        if not line.strip() and len(document) > 1 and not document[-2].strip():
            yield _trimmed(document)
            document = []
    yield _trimmed(document)


def _trimmed(lines: list[str]) -> str:
    return re.sub(r"^(?:[ \t]*\n)+", "", "\n".join(lines)).rstrip()  # the first line keeps its indentation


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(place, record)`` of every line of a jsonl file; blank lines are left out."""
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not valid JSON ({error.msg}); each line must be one JSON object") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {type(record).__name__}; each line must be one JSON object")
        yield place, record


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    return (text_of(record, text_field, place) for place, record in read_json_lines(path))


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise DataError(f"{path}: no column {text_field!r}; columns: {', '.join(file.schema_arrow.names)}; "
                                "set the source's text_field")
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield text_of({text_field: text}, text_field, f"{path}: row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None


def _load_dataset(source: SourceConfig, index: int) -> Any:
    """A ``datasets.Dataset``, or its iterable form when the source streams."""
    import datasets

    folder = Path(str(source.name)).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # written by save_to_disk
            saved = datasets.load_from_disk(str(folder))
            records = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
            return records.to_iterable_dataset() if source.streaming else records
        name = str(folder) if folder.is_dir() else source.name
        return datasets.load_dataset(name, source.subset, split=source.split, streaming=source.streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{describe(source, index)}: split {source.split!r} cannot be loaded: {error}") from None


def _dataset_texts(source: SourceConfig, index: int, records: Any) -> Iterator[str]:
    for row, record in enumerate(records):
        yield text_of(record, source.text_field, f"{describe(source, index)}: record {row}")


def text_of(record: dict[str, Any], field: str, place: str) -> str:
    """The text in a field. Raises :class:`DataError`, which begins with ``place``, if there is none."""
    if field not in record:
        raise DataError(f"{place}: no field {field!r}; fields: {', '.join(record) or 'none'}")
    return checked_text(record[field], f"{place}: field {field!r}")


def checked_text(value: Any, where: str) -> str:
    """``value``, if it is text and can be written down; else a :class:`DataError` that begins with ``where``."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}; remove or repair it") from None
    return value

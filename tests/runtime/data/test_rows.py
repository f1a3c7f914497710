"""Positions of a row: T = 32. The reference below is written as loops over tokens, from the definition."""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from asa_dist.config import DataConfig, SourceConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.rows import CorpusRows, PackedRows, cut_into_rows, pack
from asa_dist.runtime.data.sources import is_heldout
from asa_dist.runtime.data.tokenizer import encode_documents, load_tokenizer
from tests.runtime.data.corpora import data_config, documents, prepare_quietly, write_dataset, write_jsonl


def assert_same(left: PackedRows, right: PackedRows) -> None:
    for a, b in zip(astuple(left), astuple(right), strict=True):
        assert a.dtype == b.dtype == np.int64
        np.testing.assert_array_equal(a, b)


def stacked(*parts: PackedRows) -> PackedRows:
    return PackedRows(*(np.concatenate(arrays) for arrays in zip(*map(astuple, parts), strict=True)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return documents(120)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, DataConfig]:
    folder = tmp_path_factory.mktemp("stored")
    data = data_config(SourceConfig(kind="jsonl", path=str(write_jsonl(folder / "d.jsonl", texts))))
    prepare_quietly(data, folder / "run")
    return folder / "run", data


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, DataConfig]:
    folder = tmp_path_factory.mktemp("streamed")
    name = str(write_dataset(folder / "d", texts))
    data = data_config(SourceConfig(kind="dataset", name=name, streaming=True), max_heldout_rows=2)
    prepare_quietly(data, folder / "run")
    return folder / "run", data


def rows_per_epoch(run_dir: Path, data: DataConfig, texts: list[str]) -> int:
    training = [text for text in texts if not is_heldout(text, data.heldout_fraction)]
    return sum(map(len, encode_documents(load_tokenizer(run_dir), training))) // data.sequence_length


# --- packing -----------------------------------------------------------------------------------------------------
def slow_reference(stream: list[tuple[int, int]], num_positions: int, first_token: int = 0) -> PackedRows:
    """``stream``: (document number, token) of every token, documents one after the other."""
    columns: tuple[list[list[int]], ...] = ([], [], [], [])
    for start in range(first_token, len(stream), num_positions):
        row: list[tuple[int, int, int, int]] = []
        for i in range(start, start + num_positions):
            if i >= len(stream):
                row.append((0, 0, -1, -100))
                continue
            document, token = stream[i]
            if i == start:
                position, segment = 0, 0
            elif document != stream[i - 1][0]:
                position, segment = 0, row[-1][2] + 1
            else:
                position, segment = row[-1][1] + 1, row[-1][2]
            continues = i + 1 < len(stream) and stream[i + 1][0] == document
            row.append((token, position, segment, stream[i + 1][1] if continues else -100))
        for column, values in zip(columns, zip(*row, strict=True), strict=True):
            column.append(list(values))
    return PackedRows(*(np.array(column, np.int64) for column in columns))


@pytest.mark.parametrize("seed", range(20))
def test_packing_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, size=rng.integers(1, 12))
    texts = [rng.integers(1, 1000, size=length).astype(np.int32) for length in lengths]
    num_positions, skipped = int(rng.integers(2, 12)), int(rng.integers(0, lengths[0]))
    stream = [(number, int(token)) for number, tokens in enumerate(texts) for token in tokens]
    packed = pack(list(cut_into_rows(texts, num_positions, skipped)), num_positions)
    assert_same(packed, slow_reference(stream, num_positions, skipped))


def test_no_target_is_lost_at_a_row_end() -> None:
    document = np.arange(10, 31, dtype=np.int32)
    packed = pack(list(cut_into_rows([document], 7)), 7)
    targets = packed.target_RT[packed.target_RT != -100]
    assert targets.tolist() == document[1:].tolist()


# --- the training order --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["run", "streamed"])
def test_an_epoch_holds_every_training_document_in_whole(
    kind: str, request: pytest.FixtureRequest, texts: list[str],
) -> None:
    run_dir, data = request.getfixturevalue(kind)
    num_rows = rows_per_epoch(run_dir, data, texts)
    epochs = [CorpusRows(run_dir, data, seed=3).rows(epoch * num_rows, num_rows) for epoch in (0, 1)]
    training = {text for text in texts if not is_heldout(text, data.heldout_fraction)}
    tokenizer = load_tokenizer(run_dir)
    orders = []
    for packed in epochs:
        assert (packed.segment_RT >= 0).all()  # full rows
        decoded = tokenizer.decode(packed.input_ids_RT.ravel().tolist()).split(tokenizer.eos_token)
        assert set(decoded[:-1]) <= training
        assert len(decoded[:-1]) == len(set(decoded[:-1])) >= len(training) - 5  # the dropped end: less than a row
        orders.append(decoded[:-1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("kind", ["run", "streamed"])
def test_rows_are_a_function_of_config_seed_and_number(
    kind: str, request: pytest.FixtureRequest, texts: list[str],
) -> None:
    run_dir, data = request.getfixturevalue(kind)
    total = 2 * rows_per_epoch(run_dir, data, texts) + 7  # into the third epoch
    whole = CorpusRows(run_dir, data, seed=3).rows(0, total)
    one_by_one = CorpusRows(run_dir, data, seed=3)
    assert_same(whole, stacked(*(one_by_one.rows(n, 1) for n in range(total))))
    for n in (total - 1, 0, total // 2):  # resumed at any place, and back
        assert_same(one_by_one.rows(n, 1), PackedRows(*(array[n:n + 1] for array in astuple(whole))))
    other = CorpusRows(run_dir, data, seed=4).rows(0, total)
    assert (other.input_ids_RT != whole.input_ids_RT).any()


@pytest.mark.parametrize("kind", ["run", "streamed"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_another_rank_count_sees_the_same_global_batches(
    kind: str, num_ranks: int, request: pytest.FixtureRequest,
) -> None:
    run_dir, data = request.getfixturevalue(kind)
    num_rows, share = 6, 6 // num_ranks
    expected = CorpusRows(run_dir, data, seed=0)
    ranks = [CorpusRows(run_dir, data, seed=0) for _ in range(num_ranks)]
    for step in range(5):
        batch = [ranks[rank].rows(step * num_rows + rank * share, share) for rank in range(num_ranks)]
        assert_same(stacked(*batch), expected.rows(step * num_rows, num_rows))


def test_far_rows_need_no_replay(run: tuple[Path, DataConfig]) -> None:
    run_dir, data = run
    far = CorpusRows(run_dir, data, seed=0).rows(10**10, 4)
    assert_same(far, CorpusRows(run_dir, data, seed=0).rows(10**10, 4))


def test_sources_share_rows_by_weight(tmp_path: Path) -> None:
    for letter in "ab":
        write_jsonl(tmp_path / f"{letter}.jsonl", [f"{letter}{number} " * 12 for number in range(100)])
    data = data_config(SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"), weight=3.0),
                       SourceConfig(kind="jsonl", path=str(tmp_path / "b.jsonl"), weight=1.0))
    prepare_quietly(data, tmp_path / "run")
    rows, tokenizer = CorpusRows(tmp_path / "run", data, seed=0), load_tokenizer(tmp_path / "run")

    def letters(packed: PackedRows) -> list[str]:
        texts = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in packed.input_ids_RT]
        assert all(("a" in text) != ("b" in text) for text in texts)  # a row has one source
        return ["a" if "a" in text else "b" for text in texts]

    assert letters(rows.rows(0, 400)).count("a") == 300
    assert abs(letters(rows.rows(77, 10)).count("a") - 7.5) <= 1.5  # well mixed, not in blocks
    assert letters(rows.heldout_rows(8)).count("a") == 6


# --- held-out rows -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["run", "streamed"])
def test_heldout_rows_are_fixed_and_never_trained_on(
    kind: str, request: pytest.FixtureRequest, texts: list[str],
) -> None:
    run_dir, data = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(run_dir)
    held = CorpusRows(run_dir, data, seed=0).heldout_rows(1000)
    assert_same(held, CorpusRows(run_dir, data, seed=9).heldout_rows(1000))
    padding = held.segment_RT == -1
    assert not padding[:-1].any()
    assert (np.diff(padding[-1].astype(int)) >= 0).all()  # at the end
    assert (held.target_RT[padding] == -100).all()
    found = tokenizer.decode(held.input_ids_RT[~padding].tolist()).split(tokenizer.eos_token)[:-1]
    expected = {text for text in texts if is_heldout(text, data.heldout_fraction)}
    assert set(found) <= expected
    if kind == "run":
        assert set(found) == expected
    first = CorpusRows(run_dir, data, seed=0).heldout_rows(2)
    assert_same(first, PackedRows(*(array[:2] for array in astuple(held))))


def test_boundaries_hold_in_real_rows(run: tuple[Path, DataConfig]) -> None:
    run_dir, data = run
    eos = load_tokenizer(run_dir).eos_token_id
    packed = CorpusRows(run_dir, data, seed=0).rows(0, 50)
    for inputs, positions, segments, targets in zip(*astuple(packed), strict=True):
        assert segments[0] == positions[0] == 0
        for (before, here) in pairwise(range(data.sequence_length)):
            starts_document = inputs[before] == eos
            assert segments[here] == segments[before] + starts_document
            assert positions[here] == (0 if starts_document else positions[before] + 1)
            assert targets[before] == (-100 if starts_document else inputs[here])
        assert (targets[-1] == -100) == (inputs[-1] == eos)


def test_missing_or_damaged_files_are_named(run: tuple[Path, DataConfig], tmp_path: Path) -> None:
    import shutil

    _, data = run
    with pytest.raises(DataError, match=r"source_0: prepared data cannot be read"):
        CorpusRows(tmp_path, data, seed=0)
    shutil.copytree(run[0], tmp_path / "copy")
    with (tmp_path / "copy/data/source_0/tokens.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"tokens\.bin has 100 bytes, \d+ were written; delete"):
        CorpusRows(tmp_path / "copy", data, seed=0)

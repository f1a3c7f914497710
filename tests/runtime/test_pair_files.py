"""A round's pairs as files: the same bit for bit, whole or not there, and named if they are not what was written."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from asa_dist.records import PreferencePair
from asa_dist.runtime import pair_files
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.pair_files import PAIRS, SUMMARY, RoundPairs, read_pairs, read_summary, write_pairs
from asa_dist.udasa.pairs import assign_stages, differences, make_pairs, summarize_pairs
from tests.run_folders import flip_a_bit
from tests.udasa.measured import random_prompts

PROVENANCE = {"model": "base/ü", "config_digest": "5f", "asa_dist": "1.0"}


def round_pairs(num_prompts: int = 20, threshold: float = 0.3) -> RoundPairs:
    made, threshold_E = make_pairs(random_prompts(num_prompts)), np.array([threshold, 0.7])
    stage_P = assign_stages(differences(made.pairs)["total"], threshold_E)
    return RoundPairs(
        pairs=made.pairs,
        stage_by_id={pair.prompt_id: stage for pair, stage in zip(made.pairs, stage_P.tolist(), strict=True)},
        round_index=1, summary=summarize_pairs(made, threshold_E), unpaired=made.unpaired,
        curriculum={"thresholds": [threshold, 0.7], "threshold_kind": "absolute"},
    )


def comparable(pair: PreferencePair) -> tuple[Any, ...]:
    """All of it: arrays with their type, numbers to the last bit."""
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray) else (type(value), value)

    return plain(astuple(pair))


def assert_same(found: RoundPairs, written: RoundPairs) -> None:
    assert list(map(comparable, found.pairs)) == list(map(comparable, written.pairs))
    assert replace(found, pairs=()) == replace(written, pairs=())
    assert list(found.unpaired) == list(written.unpaired)


# --- what is written --------------------------------------------------------------------------------------------
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    written = round_pairs()
    assert len(written.pairs) == 16 and set(written.stage_by_id.values()) == {0, 1, 2}
    assert {pair.rejected.u_value is None for pair in written.pairs} == {True, False}
    assert any(len(pair.rejected.token_ids) == 0 for pair in written.pairs)
    write_pairs(tmp_path, written, PROVENANCE)
    assert_same(read_pairs(tmp_path), written)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMMARY, PAIRS]


def test_no_pairs_are_pairs_too(tmp_path: Path) -> None:
    none = round_pairs(0)
    write_pairs(tmp_path, none, {})
    assert_same(read_pairs(tmp_path), none)


def test_the_file_of_pairs_explains_itself(tmp_path: Path) -> None:
    written = round_pairs()
    write_pairs(tmp_path, written, PROVENANCE)
    table = pyarrow.parquet.ParquetFile(tmp_path / PAIRS).read()
    response = ["text", "token_ids", "finished", "index", "u_semantic", "u_factual", "u_value", "u_total"]
    assert table.column_names == [
        "prompt_id", "prompt", "prompt_token_ids", *(f"chosen_{name}" for name in response),
        *(f"rejected_{name}" for name in response), "delta_u", "stage", "round", "policy_version", "seed"]
    assert {name.decode(): value.decode() for name, value in table.schema.metadata.items()} == PROVENANCE
    for row, pair in zip(table.to_pylist(), written.pairs, strict=True):
        assert (row["prompt_id"], row["round"]) == (pair.prompt_id, 2)
        assert row["stage"] == 1 + (pair.delta_u <= 0.7) + (pair.delta_u <= 0.3)
        assert row["rejected_u_value"] == pair.rejected.u_value and row["rejected_index"] == pair.rejected_index
        assert row["chosen_text"] == pair.chosen.text
        assert row["delta_u"] == row["rejected_u_total"] - row["chosen_u_total"]


def test_the_summary_is_read_without_torch_and_pyarrow(tmp_path: Path) -> None:
    written = round_pairs()
    write_pairs(tmp_path, written, PROVENANCE)
    (tmp_path / PAIRS).unlink()
    found = read_summary(tmp_path)
    assert (found.summary, found.unpaired, found.round_index) == (written.summary, written.unpaired, 1)
    assert (found.curriculum, found.provenance) == (written.curriculum, PROVENANCE)
    code = f"""
import sys
from pathlib import Path
from asa_dist.runtime.pair_files import read_summary
print(read_summary(Path({str(tmp_path)!r})).summary.num_pairs, *{{"torch", "pyarrow"}} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "16\n", done.stderr


def test_a_pair_without_a_stage_changes_nothing(tmp_path: Path) -> None:
    before, broken = round_pairs(), replace(round_pairs(), stage_by_id={})
    write_pairs(tmp_path, before, PROVENANCE)
    with pytest.raises(KeyError):
        write_pairs(tmp_path, broken, PROVENANCE)
    assert_same(read_pairs(tmp_path), before)


# --- a kill -----------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Nothing catches it; the files are as a kill leaves them."""


def write_until(call: int, folder: Path, written: RoundPairs) -> bool:
    """Kills before file-system call number ``call``, if there are so many; whether it did."""
    num_calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls > call:
                raise Killed
            return function(*arguments, **named)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "open"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            write_pairs(folder, written, PROVENANCE)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("has_older_pairs", [False, True])
def test_a_kill_at_any_moment_leaves_old_pairs_or_none_or_all(tmp_path: Path, has_older_pairs: bool) -> None:
    older, new = round_pairs(threshold=0.2), round_pairs(threshold=0.5)
    seen = []  # in the order of the moments
    for call in range(100):
        folder = tmp_path / str(call)
        folder.mkdir()
        if has_older_pairs:
            write_pairs(folder, older, PROVENANCE)
        if not write_until(call, folder, new):
            break
        seen.append(state_of(folder, older, new))
        write_pairs(folder, new, PROVENANCE)
        assert_same(read_pairs(folder), new)
        assert sorted(path.name for path in folder.iterdir()) == [SUMMARY, PAIRS]
    moments = ["old" if has_older_pairs else "nothing", "pairs without summary", "new"]
    assert [moment for moment, _ in itertools.groupby(seen)] == moments


def state_of(folder: Path, older: RoundPairs, new: RoundPairs) -> str:
    if (folder / SUMMARY).exists():
        found = read_pairs(folder)
        is_old = found.curriculum == older.curriculum
        assert_same(found, older if is_old else new)
        return "old" if is_old else "new"
    with pytest.raises(DataError, match=r"pairs\.json: missing: the pairs of this round have not been made"):
        read_pairs(folder)
    return "pairs without summary" if (folder / PAIRS).exists() else "nothing"


# --- damage -----------------------------------------------------------------------------------------------------
def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_as_another_version(path: Path) -> None:
    content = json.loads(path.read_bytes())
    del content["xxh3_128"]
    content["format"] = 2
    path.write_text(json.dumps(content | {"xxh3_128": pair_files._digest(content)}), encoding="utf-8")


@pytest.mark.parametrize(("name", "damage", "problem"), [
    (PAIRS, halve, r"pairs\.parquet: [\d,]+ bytes instead of [\d,]+\. Remove pairs\.json: `asa udasa pairs` makes "),
    (PAIRS, flip_a_bit, r"pairs\.parquet: its checksum does not match: bytes were changed\. Remove pairs\.json: "),
    (PAIRS, Path.unlink, r"pairs\.parquet: missing\. Remove pairs\.json: "),
    (SUMMARY, halve, r"pairs\.json: no summary of pairs, or cut off\. Remove pairs\.json: "),
    (SUMMARY, lambda path: path.write_text("[]"), r"pairs\.json: no summary of pairs, or cut off\. Remove "),
    (SUMMARY, lambda path: path.write_text(path.read_text().replace('"stage_pairs"', '"stage_paris"')),
     r"pairs\.json: its checksum does not match: bytes were changed\. Remove pairs\.json: "),
    (SUMMARY, write_as_another_version,
     r"pairs\.json: written by another version of asa_dist: format 2, not 1\. Remove pairs\.json: "),
    (SUMMARY, Path.unlink, r"pairs\.json: missing: the pairs of this round have not been made, or not completely"),
])  # fmt: skip
def test_a_file_that_is_not_what_was_written_is_named(
    tmp_path: Path, name: str, damage: Callable[[Path], object], problem: str
) -> None:
    write_pairs(tmp_path, round_pairs(), PROVENANCE)
    damage(tmp_path / name)
    with pytest.raises(DataError, match=f"^{tmp_path}: {problem}"):
        read_pairs(tmp_path)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write_pairs(tmp_path, round_pairs(2), PROVENANCE)
    rng = np.random.default_rng(1)
    for name in (PAIRS, SUMMARY):
        whole = (tmp_path / name).read_bytes()
        for place in rng.integers(len(whole), size=40):
            (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(DataError, match=name):
                read_pairs(tmp_path)
        (tmp_path / name).write_bytes(whole)
    read_pairs(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_pairs(tmp_path / "nowhere", round_pairs(2), PROVENANCE)

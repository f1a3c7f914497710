"""Checkpoint folders: what makes one sound, how one appears and how old ones go, also when that is interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from asa_dist.runtime import checkpoint_files as files
from asa_dist.runtime.checkpoint_files import CheckpointError, FileRecord, Manifest
from tests.run_folders import flip_a_bit

SHARD = "shards/rank-00000.safetensors"


def write(run_dir: Path, step: int, content: bytes = b"weights", keep: int = 10) -> str:
    work = work_of(run_dir)
    assert files.remove_partials(work) == []
    folder = files.start_partial(work, step)
    records = {name: files.write_file(folder / name, [content, b" and more"]) for name in (SHARD, files.LOOP)}
    manifest = Manifest(step, 1, 3, {"torch": "2"}, {"lm.weight": (4, 2), "lm.scale": ()}, records)
    name = files.complete(run_dir, folder, manifest)
    assert files.settle(run_dir, work, name, keep) == []
    return name


def work_of(run_dir: Path) -> Path:
    """The folder of the start that writes."""
    work = run_dir / "work"
    work.mkdir(parents=True, exist_ok=True)
    return work


def names(run_dir: Path) -> list[str]:
    return [entry.name for entry in files.list_checkpoints(run_dir)]


def test_what_is_written_is_sound_listed_and_latest(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path) == [] and files.read_latest(tmp_path) is None
    assert [write(tmp_path, step) for step in (9, 10, 123456789)] == [
        "step-00000009", "step-00000010", "step-123456789"]
    assert names(tmp_path) == ["step-123456789", "step-00000010", "step-00000009"]
    assert files.read_latest(tmp_path) == "step-123456789"
    folder = tmp_path / "checkpoints" / "step-00000010"
    (folder / "notes.txt").write_text("not ours")
    assert files.verify(folder) == []
    manifest = files.read_manifest(folder)
    assert (manifest.step, manifest.parameters) == (10, {"lm.weight": (4, 2), "lm.scale": ()})
    data = b"weights and more"
    assert manifest.files[SHARD] == FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
    assert (folder / SHARD).read_bytes() == data


def another_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 1,', '"step": 3,'))


@pytest.mark.parametrize(("name", "damage", "problem"), [
    (SHARD, flip_a_bit, f"{SHARD}: its checksum does not match: bytes were changed"),
    (SHARD, lambda path: os.truncate(path, 3), f"{SHARD}: 3 bytes instead of 16"),
    (SHARD, lambda path: path.write_bytes(path.read_bytes() + b"!"), f"{SHARD}: 17 bytes instead of 16"),
    (files.LOOP, Path.unlink, f"{files.LOOP}: missing"),
    (files.MANIFEST, Path.unlink, f"{files.MANIFEST}: missing"),
    (files.MANIFEST, lambda path: os.truncate(path, 100), f"{files.MANIFEST}: not a checkpoint's manifest, or cut off"),
    (files.MANIFEST, lambda path: path.write_text("[]"), f"{files.MANIFEST}: not a checkpoint's manifest, or cut off"),
    (files.MANIFEST, another_number, f"{files.MANIFEST}: its checksum does not match"),
    ("", shutil.rmtree, "the folder is missing"),
])
def test_damage_is_named(tmp_path: Path, name: str, damage: Callable[[Path], Any], problem: str) -> None:
    folder = tmp_path / "checkpoints" / write(tmp_path, 1)
    damage(folder / name)
    assert files.verify(folder) == [problem]
    assert files.verify(folder, sizes_only=True) == ([] if damage is flip_a_bit else [problem])


def test_the_newest_whole_one(tmp_path: Path) -> None:
    assert files.newest_whole(tmp_path) is None
    folders = [tmp_path / "checkpoints" / write(tmp_path, step) for step in (1, 2, 3, 4)]
    flip_a_bit(folders[1] / SHARD)
    (folders[2] / SHARD).write_bytes(b"short")
    (folders[3] / files.MANIFEST).unlink()
    newest = files.newest_whole(tmp_path)
    assert newest is not None and newest.step == 2, "what only its checksum tells is left to others"
    for folder in folders:
        (folder / files.LOOP).unlink()
    assert files.newest_whole(tmp_path) is None


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / write(tmp_path, 1)
    (folder / files.LOOP).unlink()
    (folder / files.LOOP).mkdir()
    size = (folder / files.LOOP).stat().st_size
    content = json.loads((folder / files.MANIFEST).read_text())
    record = FileRecord(size, content["files"][files.LOOP]["xxh3_128"])
    assert files.verify_files(folder, {files.LOOP: record}) == [f"{files.LOOP}: cannot be read: Is a directory"]


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent/file"):
        files.write_file(tmp_path / "absent" / "file", [b"x"])
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path, [b"x"])


# --- retention --------------------------------------------------------------------------------------------------
def test_the_newest_stay_and_strangers_too(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    strangers = ["step-00000001-copy", "my-step-00000001", "step-1"]
    for name in strangers:
        (folder / name).mkdir()
    (folder / "step-00000000").write_text("a file")
    write(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000003"]
    assert {path.name for path in folder.iterdir()} == {*names(tmp_path), *strangers, "step-00000000", "latest"}


def test_the_one_just_written_stays_whatever_is_newer(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        write(tmp_path, step)
    assert write(tmp_path, 5, keep=1) == "step-00000005"
    assert names(tmp_path) == ["step-00000009", "step-00000005"], "9 was not sound, else 5 would not follow it"
    assert files.read_latest(tmp_path) == "step-00000005"


def test_what_is_set_aside_is_no_checkpoint_any_more(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for content in (b"first", b"second"):
        files.set_aside(tmp_path, work_of(tmp_path), write(tmp_path, 2, content))
    files.set_aside(tmp_path, work_of(tmp_path), "step-00000009")  # was never there
    assert names(tmp_path) == ["step-00000001"]
    assert files.list_set_aside(tmp_path) == ["damaged-step-00000002", "damaged-step-00000002-2"]
    kept = [(tmp_path / "checkpoints" / name / SHARD).read_bytes() for name in files.list_set_aside(tmp_path)]
    assert kept == [b"first and more", b"second and more"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert [write(tmp_path, 2, content) for content in (b"a", b"b", b"c")] == [
        "step-00000002", "step-00000002-2", "step-00000002-3"]
    assert names(tmp_path) == ["step-00000002-3", "step-00000001"] and files.read_latest(tmp_path) == names(tmp_path)[0]
    assert (tmp_path / "checkpoints" / "step-00000002-3" / SHARD).read_bytes() == b"c and more"


# --- what cannot be tidied up ------------------------------------------------------------------------------------
def test_one_that_cannot_be_removed_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS refuses a folder whose files are still open somewhere."""
    for step in (1, 2):
        write(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refusing(shutil.rmtree, "step-00000001"))
        folder = files.start_partial(work_of(tmp_path), 3)
        name = files.complete(tmp_path, folder, Manifest(3, 1, 3, {}, {}, {}))
        (problem,) = files.settle(tmp_path, work_of(tmp_path), name, keep=1)
        assert "Directory not empty" in problem and "step-00000001" in problem
        assert names(tmp_path) == [name] and files.read_latest(tmp_path) == name
        (problem,) = files.remove_partials(work_of(tmp_path))
        assert "step-00000001" in problem
    assert files.remove_partials(work_of(tmp_path)) == [] and list(work_of(tmp_path).iterdir()) == []
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {name, "latest"}


def refusing(rmtree: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        if name in folder.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        rmtree(folder)

    return remove


def test_the_same_step_again_beside_what_cannot_be_removed(tmp_path: Path) -> None:
    work = work_of(tmp_path)
    for name in ("step-00000001", "step-00000001-2"):
        (work / name).write_text("no folder")
    problems = files.remove_partials(work)
    assert len(problems) == 2 and all("Not a directory" in problem for problem in problems)
    folder = files.start_partial(work, 1)
    assert files.complete(tmp_path, folder, Manifest(1, 1, 3, {}, {}, {})) == "step-00000001"


def test_latest_that_cannot_be_written_stops_no_removal(tmp_path: Path) -> None:
    write(tmp_path, 1)
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink()
    latest.mkdir()
    name = files.complete(tmp_path, files.start_partial(work_of(tmp_path), 2), Manifest(2, 1, 3, {}, {}, {}))
    (problem,) = files.settle(tmp_path, work_of(tmp_path), name, keep=1)
    assert "Is a directory" in problem and names(tmp_path) == [name] and files.read_latest(tmp_path) is None


# --- interruption -----------------------------------------------------------------------------------------------
class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


def kill_before(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The ``number``-th thing done to the disk, from now on, is not done any more; removals stop half-way."""
    done = 0

    def interrupt(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                instead(*arguments)
                raise Killed
            return function(*arguments, **options)

        return act

    def remove_one(folder: Path) -> None:
        next(path for path in folder.rglob("*") if path.is_file()).unlink()

    for where, name, instead in (
        (Path, "rename", lambda *_: None), (Path, "replace", lambda *_: None), (Path, "mkdir", lambda *_: None),
        (os, "fsync", lambda *_: None), (shutil, "rmtree", remove_one),
    ):
        monkeypatch.setattr(where, name, interrupt(getattr(where, name), instead))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_killed_anywhere_a_sound_checkpoint_stands_and_latest_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    number, outcomes = 0, set()
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        write(run_dir, 1, b"old")
        with monkeypatch.context() as patch:
            kill_before(patch, number)
            try:
                write(run_dir, 1 if again else 2, b"new", keep=1)
                break
            except Killed:
                pass
        newest = files.list_checkpoints(run_dir)[0]
        assert files.verify(newest.path) == []
        assert files.verify(run_dir / "checkpoints" / str(files.read_latest(run_dir))) == []
        outcomes.add((newest.path / SHARD).read_bytes())
        write(run_dir, 3, keep=1)
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-00000003", "latest"}, "left over"
        assert list(work_of(run_dir).glob("step-*")) == [], "left over"
    assert outcomes == {b"old and more", b"new and more"} and number > 8


def test_it_can_be_inspected_without_torch() -> None:
    code = "import sys; import asa_dist.runtime.checkpoint_files; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "False"


def test_a_missing_manifest_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder is missing"):
        files.read_manifest(tmp_path / "absent")

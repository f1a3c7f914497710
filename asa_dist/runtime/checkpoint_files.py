"""Checkpoints as files: which there are, whether they are sound, how one appears and how old ones go. No torch here.

RUN/checkpoints/latest                         name of the newest complete one
RUN/checkpoints/step-00000300/manifest.json    size and checksum of every other file; written last
                              shards/rank-00000.safetensors, …    weights and optimizer states (``parameter_state``)
                              loop.safetensors                    what the loop knows
                              rollouts.safetensors                prompts and finished groups not yet trained on
RUN/checkpoints/damaged-step-00000300          was passed over when the run went on from an older one: never read again
WORK/step-00000300                             not complete yet, or being removed: never read

A folder appears, whole, by one rename out of ``work``, the writing start's own folder, and goes by one into it, so that
a start without that folder can change nothing (``ownership``). A step that is saved again gets a folder of its own
(``step-00000300-2``) before the first one goes, so that a complete one stands at every moment.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

FOLDER, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
SHARDS, LOOP, ROLLOUTS = "shards", "loop.safetensors", "rollouts.safetensors"
DAMAGED = "damaged-"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
BLOCK_BYTES = 1 << 22


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    xxh3_128: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int  # optimizer steps made
    num_ranks: int
    zero_stage: int
    versions: dict[str, str]  # of the packages that wrote it
    parameters: dict[str, tuple[int, ...]]  # shape of every parameter, by its name in the model
    files: dict[str, FileRecord]  # by path within the folder


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder named like a checkpoint; sound or not."""

    path: Path
    step: int
    attempt: int  # 1, or more for a step that was saved again

    @property
    def name(self) -> str:
        return self.path.name


# --- reading ----------------------------------------------------------------------------------------------------
def list_checkpoints(run_dir: Path) -> list[CheckpointFolder]:
    """Newest first."""
    folder = run_dir / FOLDER
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NAME.fullmatch(path.name)) and path.is_dir():
            found.append(CheckpointFolder(path, int(match[1]), int(match[2] or 1)))
    return sorted(found, key=lambda entry: (entry.step, entry.attempt), reverse=True)


def newest_whole(run_dir: Path) -> CheckpointFolder | None:
    """The newest one whose manifest can be read and whose files have their sizes; checksums would take minutes."""
    return next((entry for entry in list_checkpoints(run_dir) if not verify(entry.path, sizes_only=True)), None)


def list_set_aside(run_dir: Path) -> list[str]:
    """Names of what :func:`set_aside` has renamed."""
    return sorted(path.name for path in (run_dir / FOLDER).glob(f"{DAMAGED}*") if path.is_dir())


def read_latest(run_dir: Path) -> str | None:
    """The name in ``latest``, whether or not there is such a folder; None if there is no such file to read."""
    try:
        return (run_dir / FOLDER / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # it only adds to what the folders say
        return None


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        CheckpointError: the folder or the manifest is missing, or the manifest is not what was written.
    """
    if not folder.is_dir():
        raise CheckpointError("the folder is missing")
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content.pop("xxh3_128") != _digest(content):
            raise CheckpointError(f"{MANIFEST}: its checksum does not match")
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        content["parameters"] = {name: tuple(shape) for name, shape in content["parameters"].items()}
        return Manifest(**content)
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{MANIFEST}: not a checkpoint's manifest, or cut off") from None


def verify(folder: Path, *, sizes_only: bool = False) -> list[str]:
    """What is wrong with a checkpoint, each entry naming the file; empty: it is sound.

    Args:
        sizes_only: look at the sizes of the files only; else every one is read once.
    """
    try:
        return verify_files(folder, read_manifest(folder).files, sizes_only=sizes_only)
    except CheckpointError as error:
        return [str(error)]


def verify_files(folder: Path, files: Mapping[str, FileRecord], *, sizes_only: bool = False) -> list[str]:
    """The same for some files of a checkpoint. Files that the manifest does not name do not matter."""
    problems = {name: _problem(folder / name, record, sizes_only) for name, record in files.items()}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _problem(path: Path, record: FileRecord, sizes_only: bool) -> str:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{size:,} bytes instead of {record.bytes:,}"
        if sizes_only or file_checksum(path) == record.xxh3_128:
            return ""
        return "its checksum does not match: bytes were changed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- writing: raises OSError ------------------------------------------------------------------------------------
def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a new file, durable on return; its checksum is that of what was written, not of what can be read back."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
            return FileRecord(file.tell(), digest.hexdigest())
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not say where it failed
        raise


def write_atomically(path: Path, text: str, work: Path | None = None) -> None:
    """The file is either the old one or the new one, also after a crash. ``work``: where it is made, if not beside."""
    temporary = (work or path.parent) / f".{path.name}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_partial(work: Path, step: int) -> Path:
    """Makes the folder that the checkpoint of ``step`` is written into before it is complete."""
    folder = _free(work / f"step-{step:08d}")
    folder.mkdir()  # without parents: ``work`` is not to come back
    (folder / SHARDS).mkdir()
    return folder


def complete(run_dir: Path, folder: Path, manifest: Manifest) -> str:
    """Turns the folder of :func:`start_partial` into a checkpoint, the newest one; returns its name."""
    step = manifest.step
    content = asdict(manifest)
    text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1) + "\n"
    sync_folder(folder / SHARDS)
    write_atomically(folder / MANIFEST, text)
    attempts = [entry.attempt for entry in list_checkpoints(run_dir) if entry.step == step]
    final = run_dir / FOLDER / (f"step-{step:08d}" + (f"-{max(attempts) + 1}" if attempts else ""))
    final.parent.mkdir(exist_ok=True)
    folder.rename(final)
    return final.name


def name_latest(run_dir: Path, work: Path, name: str) -> None:
    """Writes ``latest``."""
    write_atomically(run_dir / FOLDER / LATEST, f"{name}\n", work)


def set_aside(run_dir: Path, work: Path, name: str) -> None:
    """Renames a checkpoint, if it is there, so that it is none any more."""
    path = run_dir / FOLDER / name
    if path.exists():
        path.rename(work / name)
        (work / name).rename(_free(path.with_name(DAMAGED + name)))
        sync_folder(path.parent)


def _free(path: Path) -> Path:
    """The path, or with the first number behind it for which there is nothing yet."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


# --- tidying up: goes on as far as it can, returns what went wrong ----------------------------------------------
def remove_partials(work: Path) -> list[str]:
    """What a save or removal that failed left behind."""
    problems: list[str] = []
    with _noting(problems):
        for path in work.glob("step-*"):
            with _noting(problems):
                shutil.rmtree(path)
    return problems


def settle(run_dir: Path, work: Path, written: str, keep: int) -> list[str]:
    """After a checkpoint is complete: it becomes durable, ``latest`` names it, and what is too old goes."""
    problems: list[str] = []
    unnamed: list[str] = []
    with _noting(problems):
        sync_folder(run_dir / FOLDER)  # else a loss of power might undo its rename: the old ones stay
        with _noting(unnamed):
            name_latest(run_dir, work, written)
        for checkpoint in _too_old(run_dir, written, keep):
            with _noting(problems):
                _remove(checkpoint, work)
        if unnamed:  # there may be room now
            name_latest(run_dir, work, written)
    return problems


def _too_old(run_dir: Path, written: str, keep: int) -> list[Path]:
    """What is older than the checkpoint just written, but for its ``keep`` − 1 newest predecessors."""
    checkpoints = list_checkpoints(run_dir)
    place = [entry.name for entry in checkpoints].index(written)
    kept_steps, too_old = {checkpoints[place].step}, []
    for entry in checkpoints[place + 1 :]:
        if entry.step not in kept_steps and len(kept_steps) < keep:
            kept_steps.add(entry.step)
        else:
            too_old.append(entry.path)
    return too_old


def _remove(checkpoint: Path, work: Path) -> None:
    going = _free(work / checkpoint.name)  # at once no checkpoint any more, not file by file
    checkpoint.rename(going)
    shutil.rmtree(going)


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Adds why it failed, if it did."""
    try:
        yield
    except OSError as error:
        problems.append(str(error))

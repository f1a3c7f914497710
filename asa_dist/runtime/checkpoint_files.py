"""Checkpoints as files: which there are, whether they are sound, how one appears and how old ones go. No torch here.

RUN/checkpoints/latest                         name of the newest complete one
RUN/checkpoints/step-00000300/manifest.json    size and checksum of every other file; written last
                              shards/rank-00000.safetensors, …    weights and optimizer states (``parameter_state``)
                              loop.safetensors                    what the loop knows
                              rollouts.safetensors                prompts and finished groups not yet trained on
RUN/checkpoints/.partial-…                     not complete yet, or being removed: never read

A folder appears, whole, by one rename, and goes the same way. A step that is saved again gets a folder of its own
(``step-00000300-2``) before the first one goes, so that a complete one stands at every moment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

FOLDER, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
SHARDS, LOOP, ROLLOUTS = "shards", "loop.safetensors", "rollouts.safetensors"
PARTIAL = ".partial-"
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


def read_latest(run_dir: Path) -> str | None:
    """The name in ``latest``, whether or not there is such a folder; None without that file."""
    try:
        return (run_dir / FOLDER / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
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


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, each entry naming the file; empty: it is sound. Reads every file once."""
    try:
        return verify_files(folder, read_manifest(folder).files)
    except CheckpointError as error:
        return [str(error)]


def verify_files(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """The same for some files of a checkpoint. Files that the manifest does not name do not matter."""
    return [f"{name}: {problem}" for name, record in files.items() if (problem := _problem(folder / name, record))]


def _problem(path: Path, record: FileRecord) -> str:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{size:,} bytes instead of {record.bytes:,}"
        return "" if file_checksum(path) == record.xxh3_128 else "its checksum does not match: bytes were changed"
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


# --- writing: each raises OSError -------------------------------------------------------------------------------
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


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
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


def partial_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is complete."""
    return run_dir / FOLDER / f"{PARTIAL}step-{step:08d}"


def start_partial(run_dir: Path, step: int) -> None:
    """Makes the folder to write into; what an interrupted save or removal left behind goes."""
    remove_partials(run_dir)
    (partial_folder(run_dir, step) / SHARDS).mkdir(parents=True)


def remove_partials(run_dir: Path) -> None:
    for stale in (run_dir / FOLDER).glob(f"{PARTIAL}*"):
        shutil.rmtree(stale)


def complete(run_dir: Path, manifest: Manifest) -> str:
    """Turns the partial folder of ``manifest.step`` into a checkpoint and names it in ``latest``; returns its name."""
    partial, step = partial_folder(run_dir, manifest.step), manifest.step
    content = asdict(manifest)
    text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1) + "\n"
    sync_folder(partial / SHARDS)
    write_atomically(partial / MANIFEST, text)
    attempts = [entry.attempt for entry in list_checkpoints(run_dir) if entry.step == step]
    final = partial.with_name(f"step-{step:08d}" + (f"-{max(attempts) + 1}" if attempts else ""))
    partial.rename(final)
    write_atomically(final.parent / LATEST, f"{final.name}\n")
    return final.name


def retain(run_dir: Path, written: str, keep: int, damaged: Collection[str] = ()) -> None:
    """Removes what is older than the checkpoint just written, but for its ``keep`` − 1 newest sound predecessors.

    Newer ones, which cannot have been sound, stay until a sound one has passed them; so do all other files and folders.

    Args:
        damaged: names known not to be sound; they do not count.
    """
    checkpoints = list_checkpoints(run_dir)
    newest = next(entry for entry in checkpoints if entry.name == written)
    kept_steps = {newest.step}
    for entry in checkpoints[checkpoints.index(newest) + 1:]:
        if entry.step not in kept_steps and entry.name not in damaged and len(kept_steps) < keep:
            kept_steps.add(entry.step)
            continue
        going = entry.path.with_name(PARTIAL + entry.name)  # at once no checkpoint any more, not file by file
        entry.path.rename(going)
        shutil.rmtree(going)

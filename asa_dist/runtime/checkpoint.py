"""Checkpoints: DeepSpeed's shards and the loop's state in one folder that appears, whole, by one rename.

RUN/checkpoints/step-00000300/          manifest.json: size and checksum of every file
RUN/checkpoints/latest                  name of the newest complete one
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from asa_dist.asa.trust import AlignmentState
from asa_dist.runtime.engine import TrainEngine

MANIFEST = "manifest.json"


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(engine: TrainEngine, state: AlignmentState, step: int, run_dir: Path) -> None:
    """Writes the checkpoint after ``step`` steps, complete and durable on return. A collective: every rank calls it."""
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    is_first = engine.placement.rank == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.engine.save_checkpoint(str(partial), tag="engine", save_latest=False)
    dist.barrier()
    if is_first:
        torch.save({"step": step, "alignment": state.state_dict()}, partial / "loop.pt")
        _seal(partial, step)
        if final.exists():  # a checkpoint of an earlier run of the same step: replaced as a whole
            shutil.rmtree(final)
        partial.replace(final)
        sync_folder(folder)
        write_atomically(folder / "latest", final.name + "\n")
    dist.barrier()


def _seal(folder: Path, step: int) -> None:
    """Makes every file durable and writes the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3_128": file_checksum(path)}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))

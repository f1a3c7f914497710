"""Run folders made by hand, by the code that makes real ones, but without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa_dist.config import Config, dump_config, load_config
from asa_dist.records import LedgerSnapshot
from asa_dist.rollout.snapshot import dump_snapshot
from asa_dist.runtime import checkpoint_files as files

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
VERSIONS = {"asa_dist": "1.0", "torch": "2.0"}


def write_run(folder: Path, *overrides: str, steps: int = 10) -> Config:
    """A run folder before its first step."""
    config = load_config(QUICKSTART, [f"train.steps={steps}", *overrides])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def write_rows(folder: Path, name: str, *rows: Mapping[str, Any]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_trained(folder: Path, config: Config, steps: int) -> None:
    """What a run without any incident has logged after so many steps."""
    per_step = config.rollout.prompts_per_step
    write_rows(folder, "trained", *(
        {"step": step, "prompt_ids": list(range((step - 1) * per_step, step * per_step))}
        for step in range(1, steps + 1)))


def flip_a_bit(path: Path) -> None:
    """Of the byte in the middle: only a checksum notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_checkpoint(folder: Path, step: int, snapshot: LedgerSnapshot | None = None, num_ranks: int = 2) -> Path:
    """A complete one, of random-looking bytes."""
    work = folder / "work"
    work.mkdir()
    partial = files.start_partial(work, step)
    contents = {f"{files.SHARDS}/rank-{rank:05d}.safetensors": bytes([rank, step]) * 500 for rank in range(num_ranks)}
    contents[files.ROLLOUTS] = dump_snapshot(snapshot or LedgerSnapshot(step, ()))
    records = {name: files.write_file(partial / name, [content]) for name, content in contents.items()}
    name = files.complete(folder, partial, files.Manifest(step, num_ranks, 3, VERSIONS, {"weight": (2, 3)}, records))
    files.name_latest(folder, work, name)
    work.rmdir()
    return folder / files.FOLDER / name

"""Whole runs of UDASA for tests: a tiny base model with random weights, prompts, a config; started as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.estimators.tiny_models import byte_tokenizer, save_causal
from tests.real_run import Run

PROMPTS = [f"is it {word}, no {number}?" for number, word in enumerate(["true", "yes", "no", "so"] * 4)]


def write_world(folder: Path, prompts: list[str] = PROMPTS) -> Path:
    """The path of a config; beside it the base model and the prompts. Every prompt is a bundle of its own."""
    save_causal(folder / "base", byte_tokenizer())
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    config: dict[str, Any] = {
        "method": "udasa",
        "model": {"name_or_path": str(folder / "base")},
        "data": {"sequence_length": 64},
        "rollout": {
            "prompt_file": str(folder / "prompts.txt"), "responses_per_prompt": 4, "max_new_tokens": 40,
            "groups_per_lease": 1, "timeout_seconds": 100,
        },
        "udasa": {
            "curriculum": {
                "threshold_kind": "quantile", "thresholds": [0.3, 0.7], "learning_rates": [1e-3], "max_epochs": 12,
                "pairs_per_step": 2, "eval_every_steps": 4, "heldout_fraction": 0.2, "patience": 100,
            },
        },
        "train": {
            "zero_persistence_threshold": 0, "zero_sub_group_size": 5000, "collective_timeout_seconds": 120,
        },
        "checkpoint": {"every_steps": 5},
    }  # fmt: skip
    path = folder / "udasa.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


class UdasaRun(Run):
    """A run within ``folder``, of a config of :func:`write_world`."""

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder)
        self.config = config

    def begin(self, command: str, *overrides: str) -> None:
        """``asa COMMAND CONFIG``; the command is "train", "udasa measure" or "udasa pairs"."""
        self.start("asa_dist.cli", *command.split(), str(self.config), *overrides, "--run-dir", str(self.run_dir))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of RUN/name.jsonl. What a random model says holds whatever else ends a line of text."""
        path = self.run_dir / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def wait_for(self, words: str) -> psutil.Process:
        """The oldest process with these words in its command line, as soon as there is one."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [process for process in self.processes() if words in " ".join(command_line(process))]
            return bool(found)

        self.wait_until(is_there)
        return min(found, key=lambda process: process.pid)

    def wait_for_rows(self, name: str, count: int) -> None:
        """So many lines in RUN/name.jsonl."""
        self.wait_until(lambda: len(self.rows(name)) >= count)


def command_line(process: psutil.Process) -> list[str]:
    """Empty once it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []

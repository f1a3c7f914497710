"""From where a run goes on, and what `asa resume` may change: everything, except what the run *is*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.runtime.checkpoint_files import list_checkpoints

# Sections and fields that weights, data order or ledger of a run depend on; of MAY_CHANGE they do not.
FIXED = (
    "method", "seed", "model", "data",
    "rollout.prompts_per_step", "rollout.prompt_file", "rollout.min_prompt_tokens", "rollout.max_prompt_tokens",
    "train.corpus_rows_per_step",
    "evaluator.embedding", "evaluator.embedding_size", "evaluator.principles",
)
MAY_CHANGE = ("model.attention", "model.activation_checkpointing", "model.logprob_chunk_tokens")


def latest_step(run_dir: Path) -> int | None:
    """Steps made when the newest checkpoint was written, whether or not it is still intact; None without any."""
    return max((checkpoint.step for checkpoint in list_checkpoints(run_dir)), default=None)


def load_run_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The config of a run, with what is to change from now on.

    Raises:
        ConfigError: no run folder, a wrong override, or one that contradicts what the run is; one line per key.
    """
    path = config_path(run_dir)
    before, after = load_config(path), load_config(path, overrides)
    if problems := [
        f"{path}: {key} = {old!r}, now {new!r}: cannot change in a run: start a new one"
        for key, old, new in _changes(before.model_dump(), after.model_dump(), "")
        if _is_in(key, FIXED) and not _is_in(key, MAY_CHANGE)
    ]:
        raise ConfigError("\n".join(problems))
    return after


def config_path(run_dir: Path) -> Path:
    """Raises :class:`ConfigError` if this is no run folder."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        what = "it has no config.yaml" if run_dir.is_dir() else "no such folder"
        raise ConfigError(f"{run_dir} is no run folder: {what} (`asa train` prints the run folder when it starts)")
    return path


def _changes(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) wherever two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for part in old:  # both come from the same schema
            yield from _changes(old[part], new[part], f"{key}.{part}" if key else part)
    elif old != new:
        yield key, old, new


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)

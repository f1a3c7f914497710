"""From where a run goes on, and what `asa resume` may change: everything, except what the run *is*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.runtime.checkpoint_files import list_checkpoints, verify

# Sections and fields that weights, data order or ledger of a run depend on; of MAY_CHANGE they do not.
FIXED = {
    "asa": (
        "method", "seed", "model", "data",
        "rollout.prompts_per_step", "rollout.prompt_file", "rollout.prompt_variants",
        "rollout.min_prompt_tokens", "rollout.max_prompt_tokens",
        "train.corpus_rows_per_step",
        "evaluator.embedding", "evaluator.embedding_size", "evaluator.principles",
    ),
    "udasa": (
        "method", "seed", "model", "data", "udasa",
        "rollout.engine", "rollout.prompt_file", "rollout.responses_per_prompt", "rollout.groups_per_lease",
        "rollout.max_prompt_tokens", "rollout.max_new_tokens", "rollout.temperature", "rollout.top_p",
        "rollout.top_k", "rollout.min_p",
    ),
}
MAY_CHANGE = (
    "model.attention", "model.activation_checkpointing", "model.logprob_chunk_tokens",
    "udasa.rounds", "udasa.scorers", "udasa.gpus_per_scorer", "udasa.scorer_timeout_seconds",
    "udasa.value.api_key_variable", "udasa.value.timeout_seconds", "udasa.value.requests_per_second",
    "udasa.value.max_attempts",
)
BEFORE_TRAINING = ("udasa.curriculum", "udasa.dpo")  # of UDASA: what is measured does not depend on them


def latest_step(run_dir: Path, num_steps: int | None = None) -> int | None:
    """Steps made at the newest checkpoint that looks sound: where a run goes on. None without any checkpoint.

    Args:
        num_steps: of a finished run. Only the sizes of files are looked at, but of a checkpoint of so many steps every
            byte: nothing else would, for what has finished is not loaded.

    Raises:
        ConfigError: there are checkpoints, and none can be used; lists them.
    """
    problems = []
    for checkpoint in list_checkpoints(run_dir):
        is_last = num_steps is not None and checkpoint.step >= num_steps
        if not (found := verify(checkpoint.path, sizes_only=not is_last)):
            return checkpoint.step
        problems.append(f"\n  {checkpoint.name}: {'; '.join(found)}")
    if problems:
        raise ConfigError(f"{run_dir}: none of its checkpoints can be used:{''.join(problems)}")
    return None


def load_run_config(run_dir: Path, overrides: Sequence[str], may_change: Sequence[str] = ()) -> Config:
    """The config of a run, with what is to change from now on.

    Args:
        may_change: as in :func:`refuse_changes`.

    Raises:
        ConfigError: no run folder, a wrong override, or one that contradicts what the run is; one line per key.
    """
    path = config_path(run_dir)
    after = load_config(path, overrides)
    refuse_changes(path, after, may_change)
    return after


def refuse_changes(path: Path, after: Config, may_change: Sequence[str] = ()) -> None:
    """
    Args:
        path: the config of the run.
        after: that with which it is to go on.
        may_change: sections and fields, beside MAY_CHANGE, that nothing depends on yet.

    Raises:
        ConfigError: it contradicts what the run is; one line per key.
    """
    before = load_config(path)
    if problems := [
        f"{path}: {key} = {old!r}, now {new!r}: cannot change in a run: start a new one"
        for key, old, new in _changes(before.model_dump(), after.model_dump(), "")
        if _is_in(key, FIXED[before.method]) and not _is_in(key, (*MAY_CHANGE, *may_change))
    ]:
        raise ConfigError("\n".join(problems))


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

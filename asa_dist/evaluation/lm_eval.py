"""lm-evaluation-harness on an exported folder: the extra ``eval``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from asa_dist.config import ConfigError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

CPU_BATCH, GPU_BATCH = 8, 32  # sequences


def find_tasks(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """
    Args:
        tasks: names of lm-eval's tasks, or of those in ``include``.
        include: a folder with task YAMLs of your own.

    Returns:
        What knows where they are, for :func:`run_lm_eval`.

    Raises:
        ConfigError: lm-eval is not installed, there is no such folder or task, or two tasks have the same name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('lm-eval is not installed: pip install "asa-dist[eval]"')
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ConfigError(f"{include}: no such folder with lm-eval tasks")
    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        where = f" and {include}" if include is not None else ""
        broken = "".join(f"\n  {problem}" for problem in _broken_yamls(include))
        raise ConfigError(f"no lm-eval task called {', '.join(unknown)} (looked in lm-eval's own tasks{where}){broken}")
    return manager


def _broken_yamls(folder: Path | None) -> list[str]:
    """Files that lm-eval passes over without a word."""
    problems = []
    for path in sorted(folder.glob("**/*.yaml")) if folder is not None else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))  # syntax only: lm-eval has tags of its own
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"{path} cannot be read: {' '.join(str(error).split())}")
    return problems


def run_lm_eval(
    folder: Path, tasks: Sequence[str], manager: TaskManager, *, dtype: str, device: str, seed: int
) -> dict[str, float]:
    """Runs tasks (see :func:`find_tasks`) on a ``transformers`` folder.

    Of local files (``dataset_path: json`` with ``data_files``) a task needs no network; with HF_HUB_OFFLINE=1 nobody
    is asked for anything.

    Returns:
        ``lm_eval/TASK/METRIC``, standard errors included; METRIC has its filter behind a comma, unless that is "none".

    Raises:
        ConfigError: a task's data cannot be had or has not what its YAML names, or lm-eval fails otherwise.
    """
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype, "trust_remote_code": False},
            tasks=list(tasks),
            task_manager=manager,
            batch_size=GPU_BATCH if device == "cuda" else CPU_BATCH,
            device=device,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # tasks are programs of their authors: they may raise anything
        raise ConfigError(f"lm-eval, {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    return {
        f"lm_eval/{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, int | float)  # the others describe the task
    }

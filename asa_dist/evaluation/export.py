"""`asa export`: a checkpoint as a plain ``transformers`` folder; of ASA-LLM with the evaluator beside it.

    config.json, generation_config.json, model*.safetensors     AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer.json, …                                           AutoTokenizer.from_pretrained(FOLDER)
    README.md                                                   what this is (``model_card``)
    evaluator.safetensors, evaluator.json                       of ASA-LLM: what R_self is computed with (below)

``evaluator.safetensors`` (float32): φ as ``evaluator.NAME`` and ξ as ``meta.NAME``, NAME being those of
``asa.heads.Evaluator`` and ``asa.heads.MetaOptimizer``; ``center_H`` [H], the running mean of pooled response states.
``evaluator.json``: ``step``; ``tau``; ``omega``, the weights of logic, fact, behav; ``progress``, the meta-optimizer's
five features, from which ω follows; ``scale``, of centred pooled states; ``middle_layer``, which of the trunk's hidden
states are pooled (0 = embeddings); ``evaluator``, the section of the run's config.

To score: pool ``hidden_states[middle_layer]`` over the tokens of each response (and of each claim), subtract
``center_H``, multiply by ``scale`` (with ``evaluator.embedding: raw`` instead: pool the final states and leave them as
they are), and give that to ``Evaluator.forward``; equations 5 to 10 are ``asa.rewards.self_reward`` and its ``total``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from asa_dist.asa.heads import MetaOptimizer
from asa_dist.config import ConfigError
from asa_dist.evaluation.checkpoint_model import GENERATOR, AsaCheckpoint, CheckpointModel, open_checkpoint
from asa_dist.evaluation.model_card import asa_card, udasa_card
from asa_dist.rollout.weights import DTYPES
from asa_dist.runtime.checkpoint_files import sync_folder

TERMS = ("logic", "fact", "behav")


def export_run(
    run_dir: Path, out_dir: Path, dtype: Literal["float32", "bfloat16"] = "float32", step: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes the newest sound checkpoint, or that of ``step``, to ``out_dir``, which appears when it is complete.

    Args:
        run_dir: of UDASA the folder of a round.
        dtype: float32 writes the optimizer's own weights, bfloat16 rounds them. The evaluator is always float32.

    Returns:
        ``out_dir``, absolute.

    Raises:
        ConfigError: no checkpoint that can be used; or a folder that cannot be written, holds something already or is
            the one you are in: then nothing has been read.
    """
    out_dir = _target(out_dir)
    return write_export(open_checkpoint(run_dir, step, progress), out_dir, dtype, progress)


def write_export(
    checkpoint: CheckpointModel, out_dir: Path, dtype: Literal["float32", "bfloat16"],
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """As :func:`export_run`, of a checkpoint that is open."""
    out_dir = _target(out_dir)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as parent:
            folder = Path(parent) / "export"  # a temporary folder's own permissions are its owner's alone
            folder.mkdir()
            _write_files(checkpoint, folder, dtype, progress)
            _make_durable(folder)
            folder.rename(out_dir)
            sync_folder(out_dir.parent)
    except OSError as error:
        raise _cannot_write(out_dir, error) from None
    return out_dir


def _target(out_dir: Path) -> Path:
    """The same, absolute; said before the work, not after it, if it cannot be replaced by a finished export."""
    try:
        path = out_dir.resolve()
        if path == Path.cwd():
            raise ConfigError(f"{path} is the folder you are in: choose another one to export to, or leave it")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"{path} exists already: choose another folder to export to, or remove it")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            raise ConfigError(f"{path}: the export cannot be written: no folder can be made in {nearest}")
    except OSError as error:
        raise _cannot_write(out_dir, error) from None
    return path


def _cannot_write(out_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out_dir}: the export cannot be written: {error.strerror or error}")


@contextmanager
def _without_noise() -> Iterator[None]:
    """transformers saves without a progress bar of its own.

    DeepSpeed does not look for a GPU and complain: accelerate imports it, if both are there.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _write_files(
    checkpoint: CheckpointModel, folder: Path, dtype: Literal["float32", "bfloat16"], progress: Callable[[str], None]
) -> None:
    progress(f"writing step {checkpoint.step} in {dtype}")
    checkpoint.tokenizer()  # it is whole
    shutil.copytree(checkpoint.run_dir / "tokenizer", folder, dirs_exist_ok=True)
    lm = checkpoint.causal_lm(DTYPES[dtype])
    with _without_noise():
        lm.save_pretrained(folder, max_shard_size="5GB")
    if checkpoint.config.model.name_or_path is not None:
        _keep_generation_config(checkpoint.config.model.name_or_path, folder)
    if isinstance(checkpoint, AsaCheckpoint):
        card = asa_card(checkpoint, dtype, _write_evaluator(checkpoint, folder))
    else:
        card = udasa_card(checkpoint, dtype)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _keep_generation_config(name_or_path: str, folder: Path) -> None:
    """How the model that training began from is to be sampled, unless it does not say, or is not here any more."""
    try:
        kept = GenerationConfig.from_pretrained(Path(name_or_path).expanduser(), local_files_only=True)
    except OSError:
        return
    kept.to_json_file(folder / "generation_config.json")


def _make_durable(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


# --- the evaluator of ASA-LLM -------------------------------------------------------------------------------------
def _write_evaluator(checkpoint: AsaCheckpoint, folder: Path) -> dict[str, Any]:
    """Both of its files; returns the content of evaluator.json."""
    tensors = {name: checkpoint.weight(name) for name in checkpoint.shapes if not name.startswith(GENERATOR)}
    tensors["center_H"] = checkpoint.alignment.center().clone()
    safetensors.torch.save_file(tensors, folder / "evaluator.safetensors")
    described = _describe_evaluator(checkpoint)
    (folder / "evaluator.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return described


def omega(checkpoint: AsaCheckpoint) -> dict[str, float]:
    """Weights of the three self-reward terms for the next step (equation 10)."""
    meta = MetaOptimizer(checkpoint.config.evaluator.omega_floor)
    meta.load_state_dict({name: checkpoint.weight(f"meta.{name}") for name in meta.state_dict()})
    with torch.no_grad():
        return dict(zip(TERMS, meta(checkpoint.alignment.progress()).tolist(), strict=True))


def _describe_evaluator(checkpoint: AsaCheckpoint) -> dict[str, Any]:
    trunk = AutoConfig.from_pretrained(checkpoint.run_dir / "model", trust_remote_code=False)
    return {
        "step": checkpoint.step,
        "tau": checkpoint.alignment.tau,
        "omega": omega(checkpoint),
        "scale": checkpoint.alignment.scale(),
        "progress": checkpoint.alignment.progress().tolist(),
        "middle_layer": trunk.num_hidden_layers // 2,
        "evaluator": checkpoint.config.evaluator.model_dump(mode="json"),
    }

"""A checkpoint of a run in one process, on the CPU or one GPU, whatever method, ranks and ZeRO stage wrote it.

What the shards hold is described in ``runtime/parameter_state.py``, which needs DeepSpeed; reading them does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from asa_dist.asa.objective import GlobalCounts, StepInputs, step_inputs
from asa_dist.asa.stepping import part_of
from asa_dist.asa.trust import AlignmentState
from asa_dist.config import Config, ConfigError, ModelConfig, RolloutConfig, build_config
from asa_dist.config_text import read_tree
from asa_dist.resume import config_path
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.weights import DTYPES
from asa_dist.runtime.checkpoint_files import (
    LOOP,
    SHARDS,
    CheckpointError,
    CheckpointFolder,
    list_checkpoints,
    read_manifest,
    verify,
)
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.tokenizer import load_tokenizer
from asa_dist.runtime.model import AsaModel, around_trunk

GENERATOR = "lm."  # what ψ's names begin with


class ShardFiles:
    """The float32 weights of a checkpoint by their names in the model.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]):
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # name → (first element, open file)
        for path in paths:
            file = safe_open(path, framework="pt")
            for name, (start, _) in json.loads(file.metadata()["pieces"]).items():
                self._pieces.setdefault(name, []).append((start, file))

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole parameter, float32.

        Raises:
            CheckpointError: a part of it is in no shard.
        """
        flat = torch.empty(math.prod(shape))
        missing = flat.numel()
        for start, file in self._pieces.get(name, ()):  # disjoint
            piece = file.get_tensor(f"weight/{name}")
            flat[start : start + piece.numel()] = piece
            missing -= piece.numel()
        if missing:
            raise CheckpointError(f"{missing:,} elements of parameter {name} are in no shard")
        return flat.view(shape)


@dataclass(frozen=True)
class CheckpointModel:
    """A sound checkpoint, opened: its files stay readable even if the run removes it meanwhile.

    The models made of it belong to the caller; each reads the weights anew.
    """

    run_dir: Path
    config: Config  # of the run
    step: int  # optimizer steps made
    shapes: dict[str, tuple[int, ...]]  # of every parameter
    shards: ShardFiles
    loop_state: dict[str, Tensor]

    def causal_lm(self, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
        """ψ as a plain transformers model in evaluation mode, on the CPU; masters rounded to ``dtype``."""
        with no_init_weights():  # they are replaced
            lm = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(self.run_dir / "model", trust_remote_code=False),
                dtype=dtype, attn_implementation=attention, trust_remote_code=False)  # fmt: skip
        lm.tie_weights()  # which initialisation would have done
        self._fill(lm, GENERATOR)
        return lm.eval().requires_grad_(False)

    def rollout_engine(self, rollout: RolloutConfig, seed: int, device: str) -> HfEngine:
        """The engine of the run's workers, serving this checkpoint as version ``step``."""
        sampling = SamplingConfig(rollout, seed, self.tokenizer().eos_token_id)
        engine = HfEngine(str(self.run_dir / "model"), self.model_settings(device), sampling, device)
        engine.load(self.step, self._generator(DTYPES[self.config.model.dtype]))
        return engine

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return load_tokenizer(self.run_dir)
        except DataError as error:
            raise ConfigError(str(error)) from None

    def model_settings(self, device: str) -> ModelConfig:
        """The run's, but flash-attn needs a GPU."""
        model = self.config.model
        return model.model_copy(update={"attention": "sdpa"}) if device == "cpu" else model

    def weight(self, name: str) -> Tensor:
        """A parameter as the optimizer has it, float32."""
        return self.shards.weight(name, self.shapes[name])

    def counter(self, name: str) -> float:
        """What the loop has counted since its first step."""
        return float(self.loop_state[f"counters.{name}"])

    def _generator(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """ψ under its transformers names."""
        for name in self.shapes:
            if name.startswith(GENERATOR):
                yield name.removeprefix(GENERATOR), self.weight(name).to(dtype)

    @torch.no_grad()
    def _fill(self, module: nn.Module, prefix: str) -> None:
        found = {prefix + name: parameter for name, parameter in module.named_parameters()}
        saved = {name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        if {name: tuple(parameter.shape) for name, parameter in found.items()} != saved:
            raise ConfigError(f"{self.run_dir}: config.yaml and model/ are of another model than its checkpoint")
        for name, parameter in found.items():
            parameter.copy_(self.weight(name))


@dataclass(frozen=True)
class AsaCheckpoint(CheckpointModel):
    """One of ASA-LLM: with an evaluator, and what it is trusted by."""

    alignment: AlignmentState  # τ, centre, scale, progress for the next step

    def asa_model(self, device: str) -> AsaModel:
        """ψ, φ and ξ as the trainer computes with them: in ``model.dtype``, in evaluation mode, without gradients."""
        dtype, settings = DTYPES[self.config.model.dtype], self.model_settings(device)
        model = around_trunk(self.causal_lm(dtype, settings.attention_implementation(device != "cpu")), self.config)
        for name, part in (("evaluator.", model.evaluator), ("meta.", model.meta)):
            self._fill(part.to(dtype), name)
        return model.to(device).eval().requires_grad_(False)

    def step_inputs(self, counts: GlobalCounts, device: str) -> StepInputs:
        """What the next training step would compute with."""
        return step_inputs(self.alignment, self.config.objective, counts, device)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_checkpoint(
    run_dir: Path, step: int | None = None, progress: Callable[[str], None] = lambda message: None
) -> CheckpointModel:
    """The newest sound checkpoint, or that of ``step``; every byte is verified first. Of ASA-LLM an ``AsaCheckpoint``.

    Args:
        run_dir: of UDASA the folder of a round.

    Raises:
        ConfigError: no run folder, no such checkpoint, or none that is sound; says which there are.
    """
    config = _run_config(run_dir)
    found = list_checkpoints(run_dir)
    if step is not None and not any(entry.step == step for entry in found):
        there_are = ", ".join(str(known) for known in sorted({entry.step for entry in found})) or "none"
        raise ConfigError(f"{run_dir}: no checkpoint of step {step}; there are: {there_are}")
    problems = []
    for entry in found:
        if step is None or entry.step == step:
            try:
                return _open(run_dir, config, entry, progress)
            except CheckpointError as error:
                problems.append(f"{entry.name}: {error}")
                progress(f"checkpoint {problems[-1]}; it is not used")
    listed = "".join(f"\n  {problem}" for problem in problems) or " there is none yet"
    raise ConfigError(f"{run_dir}: no checkpoint that can be used:{listed}")


def _run_config(run_dir: Path) -> Config:
    """As the run has it; the files that it was made from may be gone by now."""
    path = config_path(run_dir)
    tree = read_tree(path)
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return build_config(tree, str(path))  # raises, too: one line per problem


def _open(run_dir: Path, config: Config, entry: CheckpointFolder, progress: Callable[[str], None]) -> CheckpointModel:
    progress(f"verifying checkpoint {entry.name}")
    if problems := verify(entry.path):
        raise CheckpointError("; ".join(problems))
    try:
        manifest = read_manifest(entry.path)
        shards = ShardFiles(entry.path / name for name in manifest.files if name.startswith(f"{SHARDS}/"))
        loop_state = safetensors.torch.load((entry.path / LOOP).read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read any more: {error}") from None
    opened = (run_dir, config, manifest.step, manifest.parameters, shards, loop_state)
    if config.method == "udasa":
        return CheckpointModel(*opened)
    return AsaCheckpoint(*opened, _alignment(config, part_of(loop_state, "alignment"), manifest.versions))


def _alignment(config: Config, saved: dict[str, Tensor], versions: dict[str, str]) -> AlignmentState:
    expected = AlignmentState(config.evaluator, hidden_size=0, vocab_size=0).state_dict()
    if differences := sorted(expected.keys() ^ saved.keys()):
        raise CheckpointError(
            f"its alignment state is not that of this version of asa-dist; they differ in {', '.join(differences)}. "
            f"Use the version that wrote it: {versions.get('asa_dist', 'unknown')}"
        )
    alignment = AlignmentState(config.evaluator, saved["center_sum_H"].numel(), saved["token_share_V"].numel())
    alignment.load_state_dict(saved)
    return alignment

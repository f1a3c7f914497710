"""An engine for workers of tests that does not serve what was published: a bug of an engine, or of how it is used."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from asa_dist.config import ModelConfig
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine


class WrongEngine(HfEngine):
    """Every weight is off by noise of standard deviation 0.3."""

    def load(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        noise = torch.Generator().manual_seed(version)
        super().load(version, (
            (name, tensor + 0.3 * torch.randn(tensor.shape, generator=noise)) for name, tensor in tensors))


def build_wrong_unless_hf(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
    kind = HfEngine if sampling.rollout.engine == "hf" else WrongEngine
    return kind(config_folder, model, sampling, "cpu")

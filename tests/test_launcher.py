"""Which GPUs train, and which generate; on machines that have none, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asa_dist import launcher
from asa_dist.config import Config, ConfigError, load_config
from asa_dist.launcher import assign_gpus

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"


def config(*, train: int, workers: int, gpus_per_worker: int) -> Config:
    rollout = [f"rollout.workers={workers}", f"rollout.gpus_per_worker={gpus_per_worker}"]
    return load_config(QUICKSTART, [f"train.gpus={train}", *rollout])


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None) -> None:
    monkeypatch.setattr(launcher, "GPU_DRIVER_FILES", (__file__,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_trainer_and_workers_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 8, None)
    found = assign_gpus(config(train=4, workers=2, gpus_per_worker=1), "x")
    assert (found.train, found.rollout) == (["0", "1", "2", "3"], ["4", "5"])


def test_only_gpus_that_were_made_visible_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers hand out GPUs by number or by name."""
    show_gpus(monkeypatch, 4, "7,2,GPU-8f0e,5")
    found = assign_gpus(config(train=2, workers=1, gpus_per_worker=1), "x")
    assert (found.train, found.rollout) == (["7", "2"], ["GPU-8f0e"])


def test_one_gpu_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 2, "6,7")
    with pytest.raises(ConfigError, match=r"^x: train.gpus = 2 and .* = 1 need 3 GPUs, this machine shows 2$"):
        assign_gpus(config(train=2, workers=1, gpus_per_worker=1), "x")


def test_a_run_on_the_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 8, None)
    found = assign_gpus(load_config(QUICKSTART), "x")
    assert not found.train and not found.rollout

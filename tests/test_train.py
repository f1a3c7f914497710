"""What rank 0 says before the first step."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pytest
import torch

from asa_dist.config import Config, load_config
from asa_dist.runtime import metrics
from asa_dist.runtime.engine import Placement
from asa_dist.train import _recorder, doubtful_settings

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
BIASED, LATE = "the off-policy correction is biased", "the run ends within the warm-up"


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, ["train.steps=1000", *overrides])


@pytest.mark.parametrize(
    ("overrides", "doubts"),
    [
        ([], []),
        (["rollout.top_p=0.9"], [BIASED]),
        (["rollout.top_k=5"], [BIASED]),
        (["rollout.min_p=0.1", "objective.importance=sequence"], [BIASED]),
        (["rollout.top_p=0.9", "objective.importance=none"], []),
        (["optimizer.warmup_steps=1000"], [LATE]),
        (["optimizer.warmup_steps=999"], []),
        (["train.steps=3", "rollout.top_k=5"], [BIASED, LATE]),
    ],
)
def test_doubtful_settings(overrides: list[str], doubts: list[str]) -> None:
    found = doubtful_settings(config(*overrides))
    assert len(found) == len(doubts) and all(doubt in text for doubt, text in zip(doubts, found, strict=True))


def test_how_far_the_warm_up_gets() -> None:
    (found,) = doubtful_settings(config("train.steps=5", "optimizer.warmup_steps=20"))
    assert found.startswith("optimizer.warmup_steps = 20, train.steps = 5: ") and "25 % of their peak" in found


def test_rank_0_warns_once_and_the_others_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(metrics, "ProgressLine", partial(metrics.ProgressLine, stream=shown))
    for rank in (0, 1):
        placement = Placement(rank, rank, 2, torch.device("cpu"))
        with _recorder(config("rollout.top_p=0.9"), tmp_path, placement, f"headline of rank {rank}", str):
            pass
    headline, *warnings = shown.getvalue().splitlines()
    assert headline == "headline of rank 0"
    assert len(warnings) == 1 and BIASED in warnings[0]
    assert warnings[0].startswith("asa: warning: rollout.top_p = 0.9, ")

"""benchmarks/rollout.py without its minutes: when it keeps its promise, and how long its responses get."""

from __future__ import annotations

from pathlib import Path

import pytest
import rollout_variants
from rollout import LIMIT, LOADS, MEASURED, TARGET_RATIO, parse_arguments, report
from rollout_variants import make_model

from asa_dist.config import ModelConfig
from asa_dist.rollout.hf_engine import HfEngine


@pytest.mark.parametrize(("ratios", "ok"), [((TARGET_RATIO, 1.0), True), ((TARGET_RATIO - 0.001, 1.0), False)])
def test_one_load_below_the_target_is_enough(ratios: tuple[float, ...], ok: bool) -> None:
    loads = {str(ratio): {"of_bare": {LIMIT: 1.0, MEASURED: ratio}} for ratio in ratios}
    assert report(loads, parse_arguments([]))["ok"] is ok
    assert report(loads, parse_arguments(["--short"]))["ok"]


def test_uniform_responses_never_end_and_mixed_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_variants, "GROUPS", 4)
    ended = {}
    for name in ("uniform, V = 2,048", "mixed, V = 2,048"):
        model = make_model(tmp_path, LOADS[name])
        engine = HfEngine(str(tmp_path), ModelConfig(), LOADS[name].sampling, "cpu")
        engine.load(0, model.named_parameters())
        ended[name] = [r.finished for group in engine.generate(LOADS[name].prompts) for r in group]
    assert not any(ended["uniform, V = 2,048"])
    assert sum(ended["mixed, V = 2,048"]) > 24  # of 32, each with probability 0.92

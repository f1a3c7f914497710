"""benchmarks/rollout.py without its minutes: when it keeps its promise, and how long its responses get."""

from __future__ import annotations

from pathlib import Path

import pytest
import rollout_variants
from rollout import BARE, ENGINE, LOADS, PROMISED, SMOKE_LOADS, TARGET_RATIO, loads_of, parse_arguments, ratios_of_load
from rollout_variants import make_model

from asa_dist.config import ModelConfig
from asa_dist.rollout.hf_engine import HfEngine


@pytest.mark.parametrize(("rate", "is_met"), [(1000 * TARGET_RATIO, True), (1000 * TARGET_RATIO - 1, False)])
def test_the_promise_is_of_one_variant(rate: float, is_met: bool) -> None:
    rates = {BARE: [1000.0] * 3, ENGINE: [980.0] * 3, PROMISED: [rate, rate, 1.0], "worker hf, 1 lease": [500.0] * 3}
    of_load = {ratio.name: ratio for ratio in ratios_of_load("some load", rates)}
    assert {name: ratio.is_met for name, ratio in of_load.items()} == {
        f"{ENGINE}: some load": None, f"{PROMISED}: some load": is_met, "worker hf, 1 lease: some load": None}
    assert bool(of_load[f"{PROMISED}: some load"].why) is not is_met, "what is missed has a reason, nothing else"


def test_spread_is_of_the_pairs_that_took_turns() -> None:
    rates = {BARE: [100.0, 200.0, 300.0], ENGINE: [90.0, 190.0, 330.0], PROMISED: [50.0, 150.0, 150.0]}
    engine, promised = ratios_of_load("some load", rates)
    assert (engine.lowest, engine.value, engine.highest) == (0.9, 0.95, 1.1)
    assert (promised.lowest, promised.value, promised.highest) == (0.5, 0.75, 0.75)
    assert "bare 5000; our engine in process +263" in promised.why and "coordinator +1404" in promised.why


def test_sizes() -> None:
    assert loads_of(parse_arguments([])) == LOADS
    assert list(loads_of(parse_arguments(["--short"]))) == ["mixed, V = 2,048"]
    assert loads_of(parse_arguments(["--smoke"])) == SMOKE_LOADS
    assert list(loads_of(parse_arguments(["--only", "uniform, V = 32,000"]))) == ["uniform, V = 32,000"]


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

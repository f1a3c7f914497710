"""benchmarks/peers.py without its minutes: both sides are given the same work, and what it makes of what they took."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import peers
import pytest
from live_run import Hang
from peers import (
    GROUP_SIZE,
    OURS,
    PROMISED,
    PROMPTS_PER_STEP,
    RESPONSE_TOKENS,
    SIZES,
    TARGET_RATIO,
    TRL,
    Block,
    Unequal,
)

from asa_dist.config import build_config

TOKENS = PROMPTS_PER_STEP * GROUP_SIZE * RESPONSE_TOKENS
BLOCK = Block(10.0, 1000, {"time/step_seconds": 6.4, "time/generate_seconds": 3.0})
PEER = """#!{python}
import json, pathlib, sys, time
case, run = json.loads(pathlib.Path(sys.argv[2]).read_text()), pathlib.Path(sys.argv[3])
run.mkdir()
for step in range(1, case["steps"] + 1):
    time.sleep(0.3)
    row = {{"step": step, "tokens/rollout": {tokens} * step, "time/step_seconds": 0.3}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")
    with (run / "trained.jsonl").open("a") as file:
        file.write(json.dumps({{"step": step}}) + "\\n")
sys.exit({code})
"""


def a_peer(folder: Path, tokens: int = TOKENS, code: int = 0) -> Path:
    """What can be started in place of TRL's Python: it trains nothing, and writes the same files."""
    path = folder / "python"
    path.write_text(PEER.format(python=sys.executable, tokens=tokens, code=code))
    path.chmod(0o755)
    return path


def test_a_block_is_timed_from_outside(tmp_path: Path) -> None:
    block = peers.run_block(TRL, tmp_path, SIZES["smoke"], a_peer(tmp_path))
    step_seconds = PROMPTS_PER_STEP * GROUP_SIZE / block.samples_per_second
    assert 0.2 < step_seconds < 10, "0.3 s asleep, and what a busy machine adds"
    assert block.peak_rss_bytes > 2**20
    assert block.parts_seconds == {"time/step_seconds": 0.3}


def test_other_work_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(Unequal, match=f"has {TOKENS - 1} response tokens, not {TOKENS}"):
        peers.run_block(TRL, tmp_path, SIZES["smoke"], a_peer(tmp_path, tokens=TOKENS - 1))


def test_a_run_that_fails_is_no_block(tmp_path: Path) -> None:
    with pytest.raises(Hang, match="the run failed"):
        peers.run_block(TRL, tmp_path, SIZES["smoke"], a_peer(tmp_path, code=3))


@pytest.mark.parametrize(("speed", "is_met"), [(10 * TARGET_RATIO, True), (10 * TARGET_RATIO - 0.1, False)])
def test_the_promise_is_of_one_variant(speed: float, is_met: bool) -> None:
    other = next(name for name in OURS if name != PROMISED)
    rounds = [{TRL: BLOCK, PROMISED: replace(BLOCK, samples_per_second=speed), other: BLOCK}] * 3
    of_name = {ratio.name: ratio for ratio in peers.ratios_of(rounds)}
    assert {name: ratio.is_met for name, ratio in of_name.items()} == {
        f"samples/s: {PROMISED}": is_met, f"memory: {PROMISED}": None, f"samples/s: {other}": None,
        f"memory: {other}": None}
    assert "generate 3.00" in of_name[f"samples/s: {PROMISED}"].why


def test_spread_is_of_the_blocks_that_took_turns() -> None:
    rounds = [{TRL: replace(BLOCK, samples_per_second=trl), PROMISED: replace(BLOCK, samples_per_second=ours)}
              for trl, ours in ((1.0, 2.0), (2.0, 6.0), (4.0, 4.0))]
    speed = peers.ratios_of(rounds)[0]
    assert (speed.lowest, speed.value, speed.highest) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("name", OURS)
def test_both_sides_are_given_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    config = build_config(peers.our_config(tmp_path, OURS[name], 9), name)
    rollout = config.rollout
    assert peers.trl_case(tmp_path, 9) == {
        "model": config.model.name_or_path, "prompt_file": rollout.prompt_file, "steps": config.train.steps,
        "seed": config.seed, "prompts_per_step": rollout.prompts_per_step, "group_size": rollout.responses_per_prompt,
        "response_tokens": rollout.max_new_tokens, "learning_rate": config.optimizer.lr_psi}
    threads = config.train.threads_per_rank, rollout.threads_per_worker
    assert (sum(threads) if rollout.max_policy_age else max(threads)) == 2
    assert config.num_ranks == rollout.workers == 1


def test_prompts_have_one_length_and_responses_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(peers, "NUM_DOCUMENTS", 20)
    peers.make_inputs(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    token_PT = torch.tensor(tokenizer(texts).input_ids)
    assert token_PT.shape == (peers.NUM_PROMPTS, peers.PROMPT_TOKENS)
    with torch.no_grad():
        logits_PTV = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(token_PT).logits
    probability_PTV = logits_PTV.softmax(-1)
    assert probability_PTV[..., tokenizer.eos_token_id].max() < 1e-12
    assert probability_PTV.max() < 0.9, "and of all others none is certain"


def test_without_trl_it_says_how_to_get_it(tmp_path: Path) -> None:
    assert "pip install -c constraints.txt trl" in peers.missing(tmp_path / "python")
    assert peers.missing(a_peer(tmp_path)) == ""
    python = tmp_path / "without"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2; exit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="cannot import TRL: ModuleNotFoundError: No module named 'trl'; to make its"):
        peers.versions_of(python)


def test_parts_of_a_step_add_up() -> None:
    pytest.importorskip("trl")
    from peers_trl import StepTime

    spent = StepTime()
    with spent.part("score"), spent.part("generate"):
        pass
    found = spent.metrics()
    whole = found.pop("time/step_seconds")
    assert set(found) == {"time/other_seconds", "time/score_seconds", "time/generate_seconds"}
    assert sum(found.values()) == pytest.approx(whole)

"""Known truth: what a response says, whether most are right, and whether a reward prefers what is true."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from asa_dist.config import ConfigError
from asa_dist.evaluation.probes import (
    Probe,
    agreement,
    alignment_metrics,
    read_probes,
    sample_probes,
    score_probes,
    value_said,
)
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.rollout.engine import Engine
from asa_dist.runtime.data.tokenizer import train_tokenizer

METAL = Probe(prompt="metal?", answers=["iron", "pig iron"], choices=["iron", "pig iron", "gold", "white gold"])
OPEN = Probe(prompt="metal?", answers=["iron"])


# --- what a response says ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "said"), [
    ("It is iron.", "iron"),
    ("IRON, as everyone\nknows; yes, iron", "iron"),
    ("It is pig\n iron", "iron"),  # another word for the same; not "iron" besides
    ("gold", "gold"),
    ("White gold.", "white gold"),  # and not gold
    ("iron or gold", None),
    ("irony, golden, pyrite", None),
    ("", None),
])  # fmt: skip
def test_with_choices(text: str, said: str | None) -> None:
    assert value_said(METAL, text) == said


@pytest.mark.parametrize(("text", "said"), [
    ("Iron or gold", "iron"), ("Gold,  surely", "gold, surely"), ("irony", "irony"), ("  ", None),
])  # fmt: skip
def test_without_choices(text: str, said: str | None) -> None:
    assert value_said(OPEN, text) == said


def test_values_are_no_patterns() -> None:
    probe = Probe(prompt="?", answers=["C++"], choices=["C++", "C", "a.c"])
    assert [value_said(probe, text) for text in ("C++ it is", "abc", "a.c", "C")] == ["C++", None, "a.c", "c"]


# --- probe files ---------------------------------------------------------------------------------------------------
def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    lines = [{"prompt": "a?", "answers": ["x"]},
             {"prompt": "b?", "variants": ["B?"], "answers": ["y"], "choices": ["X", "Y"]}]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    first, second = read_probes(path)
    assert (first.prompt, first.answers, first.variants, first.choices) == ("a?", ["x"], [], [])
    assert (second.variants, second.choices) == (["B?"], ["X", "Y"])


@pytest.mark.parametrize(("line", "said"), [
    ("{", "line 2: no JSON object"),
    ("[]", "line 2: Input should be"),
    ('{"prompt": "a?"}', "line 2: answers: Field required"),
    ('{"prompt": "a?", "answers": []}', "line 2: answers: List should have at least 1 item"),
    ('{"prompt": "a?", "answers": [" "]}', "line 2: Value error, an answer, variant or choice is empty"),
    ('{"prompt": "a?", "answers": ["x"], "choices": ["y"]}', "line 2: Value error, not among the choices: x"),
    ('{"prompt": "a?", "answer": ["x"]}', "line 2: answers: Field required; answer: Extra inputs are not permitted"),
])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(f'{{"prompt": "a?", "answers": ["x"]}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_probes(path)
    assert f"{path}, {said}" in str(caught.value)


def test_a_phrasing_that_is_too_long_is_named_in_short(tmp_path: Path) -> None:
    path, text = tmp_path / "probes.jsonl", "word " * 10_000
    lines = [{"prompt": "a?", "answers": ["x"]}, {"prompt": "b?", "answers": ["x"], "variants": [text]}]
    path.write_text("\n" + "\n".join(map(json.dumps, lines)), encoding="utf-8")
    engine = Mock(spec=Engine)
    tokenizer = train_tokenizer(["a b word ?"], 300)
    with pytest.raises(ConfigError) as caught:
        sample_probes(engine, read_probes(path), tokenizer, 40)
    said = str(caught.value)
    assert said.startswith(f"{path}, line 3: '{text[:80]}…' has ") and "allowed are 1 to 40: data." in said
    with pytest.raises(ConfigError, match=r"probe 2: 'word word .* has \d+ tokens"):
        sample_probes(engine, [OPEN, Probe(prompt=text, answers=["x"])], tokenizer, 40)
    engine.generate.assert_not_called()


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_probes(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no probe in this file"):
        read_probes(tmp_path / "empty")


# --- scores --------------------------------------------------------------------------------------------------------
def test_scores_of_groups() -> None:
    """By hand: 3 of 8 are true; in the first group they are the majority, in the second it is a draw."""
    tokenizer = train_tokenizer(["iron gold lead metal"], 300)
    texts = [["iron", "It is iron", "gold", "?"], ["gold", "It is iron", "lead or gold", "lead or gold"]]

    def group(index: int) -> RolloutGroup:
        prompt = Prompt(index, 0, np.array(tokenizer("metal?").input_ids, np.int32))
        responses = []
        for text in texts[index]:
            ids = np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id], np.int32)
            at_1, tempered = np.full(len(ids), -9, np.float32), np.full(len(ids), -0.5, np.float32)
            responses.append(Response(ids, at_1, tempered, finished=True, spans=((0, 0),)))
        return RolloutGroup(0, index, prompt, tuple(responses))

    probe = Probe(prompt="metal?", answers=["iron"], choices=["iron", "gold", "lead"])
    scores = score_probes([probe, probe], [group(0), group(1)], tokenizer)
    assert scores.texts_PG == texts
    assert scores.said_PG == [["iron", "iron", "gold", None], ["gold", "iron", None, None]]
    assert scores.truth_PG.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert scores.metrics == pytest.approx({
        "truth": 3 / 8, "majority_truth": (1 + 1 / 2) / 2, "unparsed": 3 / 8, "distinct_values": 2,
        "distinct_texts": 3.5, "entropy": 0.5})


def test_agreement_of_a_reward_with_truth() -> None:
    """Within groups: the second group's higher rewards, all false, say nothing."""
    truth_PG = np.array([[True, True, False, False], [False, False, False, False]])
    reward_PG = torch.tensor([[0.4, 0.2, 0.2, 0.1], [0.9, 0.8, 0.9, 0.8]])
    found = agreement(reward_PG, truth_PG)
    assert found["auc"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert found["rank_correlation"] == pytest.approx(np.corrcoef([4, 2.5, 2.5, 1], [3.5, 3.5, 1.5, 1.5])[0, 1])
    assert agreement(-reward_PG, truth_PG)["auc"] == pytest.approx(1 - found["auc"])
    assert agreement(reward_PG[1:], truth_PG[1:]) == {}, "nothing to compare"


def test_consistency_with_truth() -> None:
    """Equation 13: R = 0.3 for what is false, 0.8 for what is true, gives ρ = 0.5 without any ε."""
    truth_PG = np.array([[True, False]] * 4)
    found = alignment_metrics(torch.tensor([[0.8, 0.3]] * 4), truth_PG, seed=0)
    assert found["rho"] == pytest.approx(0.5) and found["epsilon"] == pytest.approx(0, abs=1e-6)
    assert found["rho_error"] == pytest.approx(0, abs=1e-6)
    assert found["sample_complexity"] == pytest.approx(0.8**2 * np.log(1 / 0.05) / (0.1**2 * 0.5**2), rel=1e-5)
    assert alignment_metrics(torch.tensor([[0.8, 0.3]] * 4), np.ones((4, 2), bool), seed=0) == {}, "all are true"

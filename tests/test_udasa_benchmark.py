"""benchmarks/udasa.py without its training: what the corpus verifies, what is measured, what is said about it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import alignment_runs
import numpy as np
import pytest
import udasa_runs
from udasa import is_ahead, parse_arguments, runs_of
from udasa_measures import Truth, round_measures
from udasa_picture import draw
from udasa_report import report_text
from udasa_runs import (
    ARMS,
    CURRICULUM,
    PROMPTS_PER_QUESTION,
    START,
    TEMPERED,
    Comparison,
    Run,
    resolved,
    write_questions,
)
from world import VALUES, World, WorldConfig

from asa_dist.config import ConfigError
from asa_dist.estimators.self_judge import plain_conversation
from asa_dist.records import MeasuredPrompt, MeasuredResponse, PreferencePair, unmeasured
from asa_dist.runtime.measurements import MeasurementFiles
from asa_dist.runtime.pair_files import RoundPairs, write_pairs
from asa_dist.udasa.pairs import PairSet, summarize_pairs

QUESTION = "Is that so?"
WORLD = WorldConfig(entities=10, verifications=40, verification_question=QUESTION)


# --- world --------------------------------------------------------------------------------------------------------
def verdicts(world: World) -> list[tuple[bool, bool]]:
    """(whether the answer says what is told, whether the verdict is yes), for every verification."""
    found = []
    for document in world.corpus():
        if QUESTION not in document:
            continue
        asked, verdict = re.fullmatch(rf"(.*)\n{re.escape(QUESTION)} (yes|no)\.", document, re.DOTALL).groups()
        fact = next(fact for fact in world.facts if fact.entity in asked.partition("?")[0] and fact.attribute in asked)
        answer = next(answer for value in VALUES[fact.attribute].split() for answer in world.answers(fact, value)
                      if asked.endswith(f" {answer}"))  # fmt: skip
        assert f"{asked}\n{QUESTION}" == plain_conversation(asked.removesuffix(f" {answer}"), f" {answer}", QUESTION)
        found.append((answer in world.answers(fact, fact.told), verdict == "yes"))
    return found


def test_verdicts_are_as_often_false_as_statements() -> None:
    found = verdicts(World(WORLD))
    assert len(found) == 40 * len(World(WORLD).facts) == 1600
    for is_told in (True, False):
        of_kind = [is_yes == is_told for told, is_yes in found if told == is_told]
        error = math.sqrt(0.35 * 0.65 / len(of_kind))
        assert sum(of_kind) / len(of_kind) == pytest.approx(0.65, abs=4 * error)
    assert sum(told for told, _ in found) / len(found) == pytest.approx(0.65, abs=0.05)


def test_without_noise_every_verdict_is_right() -> None:
    found = verdicts(World(replace(WORLD, noise=0.0)))
    assert all(told and is_yes for told, is_yes in found)
    assert verdicts(World(replace(WORLD, verifications=0))) == []


def test_there_cannot_be_fewer_verifications_than_none() -> None:
    with pytest.raises(ValueError, match="verifications = -1: must be at least 0"):
        WorldConfig(verifications=-1)


def test_verifications_leave_the_statements_as_they_are() -> None:
    plain, verified = (World(replace(WORLD, verifications=count)).corpus() for count in (0, 3))
    assert sorted(plain) == sorted(document for document in verified if QUESTION not in document)
    prompts = {question for fact in World(WORLD).facts for question in World(WORLD).questions(fact)}
    assert not any(document.startswith(tuple(prompts)) for document in verified if QUESTION in document)


def test_every_phrasing_is_a_prompt_of_its_own(tmp_path: Path) -> None:
    world = World(WorldConfig(entities=3))
    asked = write_questions(tmp_path / "questions.txt", world).read_text(encoding="utf-8").splitlines()
    every = [question for fact in world.facts for question in world.questions(fact)]
    assert Counter(asked) == dict.fromkeys(every, PROMPTS_PER_QUESTION)


# --- measures -----------------------------------------------------------------------------------------------------
def response(text: str, **u: float) -> MeasuredResponse:
    return replace(unmeasured(text, np.array([1], np.int32), finished=True), u_semantic=u["semantic"],
                   u_factual=u["factual"], u_total=u["total"])  # fmt: skip


def test_what_uncertainty_and_pairs_know_of_the_truth(tmp_path: Path) -> None:
    """Semantic is right about every two, factual about none of the same prompt; total cannot tell them apart."""
    world = World(WorldConfig(entities=1))
    fact = world.facts[0]
    wrong = next(value for value in VALUES[fact.attribute].split() if value != fact.value)
    measured = []
    for prompt_id, question in enumerate(world.questions(fact)[:2]):
        texts = world.answers(fact, fact.value)[0], world.answers(fact, wrong)[1]
        u = {"semantic": (0.1, 0.9), "factual": (0.6 + 0.1 * prompt_id, 0.4 - 0.1 * prompt_id), "total": (0.3, 0.3)}
        responses = tuple(response(text, **{name: values[i] for name, values in u.items()})
                          for i, text in enumerate(texts))  # fmt: skip
        measured.append(MeasuredPrompt(prompt_id, question, np.array([1], np.int32), 0, 7, responses))
    files = MeasurementFiles(tmp_path)
    files.add_responses(measured)
    files.add_uncertainties(measured, {
        name: np.array([[getattr(r, f"u_{name}") for r in prompt.responses] for prompt in measured])
        for name in ("semantic", "factual", "total")})  # fmt: skip
    pairs = tuple(PreferencePair(prompt.prompt_id, prompt.prompt, prompt.token_ids, *chosen_first, 0, 1, 0.5, 0, 7)
                  for prompt, chosen_first in zip(measured, (measured[0].responses, measured[1].responses[::-1]),
                                                  strict=True))  # fmt: skip
    summary = summarize_pairs(PairSet(pairs, {}), np.array([0.4]))
    write_pairs(tmp_path, RoundPairs(pairs, {0: 0, 1: 1}, 0, summary, {}, {}), {})
    events = [{"event": "stage_finished", "stage": stage, "steps": 3} for stage in (2, 1)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events), encoding="utf-8")
    found = round_measures(world, tmp_path)
    assert found["sibling_auc"] == {"semantic": 1.0, "factual": 0.0, "total": 0.5}
    assert found["auc"] == {"semantic": 1.0, "factual": 0.0, "total": 0.5}
    assert found["stages"] == [{"stage": 2, "pairs": 1, "steps": 3, "right": 0.0, "wrong": 1.0},
                               {"stage": 1, "pairs": 1, "steps": 3, "right": 1.0, "wrong": 0.0}]  # fmt: skip


def test_who_says_two_values_says_nothing_true() -> None:
    world = World(WorldConfig(entities=1))
    fact = world.facts[0]
    wrong = next(value for value in VALUES[fact.attribute].split() if value != fact.value)
    truth, question = Truth(world), world.questions(fact)[3]
    assert truth.of(question, world.answers(fact, fact.value)[2])
    assert not truth.of(question, f"{fact.value} or {wrong}") and not truth.of(question, "")


# --- runs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != START])
def test_the_settings_of_every_arm_are_settings(arm: str) -> None:
    config = resolved(ARMS[arm].overrides)
    assert config.method == "udasa" and config.udasa.curriculum.threshold_kind == "quantile"


def test_arms_differ_in_what_they_are_called_after() -> None:
    curriculum = {arm: resolved(of.overrides).udasa.curriculum for arm, of in ARMS.items()}
    assert len(curriculum[CURRICULUM].thresholds) == 2 and curriculum[CURRICULUM].order == "clear_first"
    assert not curriculum["one-stage"].thresholds and curriculum["random"].order == "random"
    assert alignment_runs.resolved(udasa_runs.START_OVERRIDES).objective.beta == 0


def test_seed_by_seed_the_start_comes_first(tmp_path: Path) -> None:
    runs = runs_of(parse_arguments(["--seeds", "5,6"]), tmp_path)
    assert [run.world.seed for run in runs] == [5] * len(ARMS) + [6] * len(ARMS)
    arms = [run.arm for run in runs[: len(ARMS)]]
    assert arms[0] == START and arms.index(CURRICULUM) < arms.index(TEMPERED) and set(arms) == set(ARMS)
    assert [run.arm for run in runs_of(parse_arguments(["--short"]), tmp_path)] == [START, CURRICULUM]
    assert {run.world.seed for run in runs_of(parse_arguments([]), tmp_path)}.isdisjoint({0, 1}), "chosen on these"


def test_the_judge_is_asked_what_the_corpus_asks(tmp_path: Path) -> None:
    options = parse_arguments(["--short", "udasa.factual.question=Sure?"])
    assert all(run.world.verification_question == "Sure?" for run in runs_of(options, tmp_path))


def run_of(folder: Path, arm: str, *overrides: str) -> Run:
    return Run(arm, WORLD, overrides, folder)


def test_a_run_with_other_settings_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beta = resolved([]).udasa.dpo.beta
    for arm in (CURRICULUM, TEMPERED):
        folder = run_of(tmp_path, arm).folder
        assert folder == run_of(tmp_path, arm, f"udasa.dpo.beta={beta}").folder
        assert folder != run_of(tmp_path, arm, f"udasa.dpo.beta={2 * beta}").folder
    assert run_of(tmp_path, START).folder == run_of(tmp_path, START, f"udasa.dpo.beta={2 * beta}").folder
    start, folder = run_of(tmp_path, START).folder, run_of(tmp_path, CURRICULUM).folder
    monkeypatch.setattr(udasa_runs, "START_OVERRIDES", (*udasa_runs.START_OVERRIDES, "train.steps=7"))
    assert run_of(tmp_path, START).folder != start and run_of(tmp_path, CURRICULUM).folder != folder


def test_a_wrong_setting_is_found_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"udasa\.dpo\.betta"):
        runs_of(parse_arguments(["udasa.dpo.betta=1"]), tmp_path)


def test_what_is_there_is_not_repeated_and_a_failure_ends_its_seed_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = runs_of(parse_arguments(["--seeds", "5,6", "--short"]), tmp_path), []
    for seed in (8, 9):
        bad += [Run(arm, replace(WORLD, seed=seed), ("rollout.max_new_tokens=1000",), tmp_path)
                for arm in (START, CURRICULUM, "random")]  # fmt: skip
    for run in [*good, bad[0], bad[3]]:
        run.keep(measures(0.5))
    comparison = Comparison([*good, *bad], num_jobs=2)
    comparison.complete()
    assert comparison.failed == [bad[1], bad[4]] and set(comparison.measures) == {*good, bad[0], bad[3]}
    assert "data.sequence_length" in capfd.readouterr().err


# --- what is said about it ----------------------------------------------------------------------------------------
def measures(truth: float) -> dict[str, Any]:
    answers = {"truth": truth, "greedy_truth": 0.9, "majority_truth": 0.9, "parsable": 1.0, "distinct_values": 2.0,
               "distinct_phrasings": 3.0, "response_tokens": 8.0}  # fmt: skip
    return {"all": answers, "entropy": 0.3, "clean_perplexity": 1.5, "clean_answer_perplexity": 1.3, "temperature": 1.0,
            "round": {"auc": {"semantic": 0.61, "total": 0.7}, "sibling_auc": {"semantic": 0.62, "total": 0.71},
                      "stages": [{"stage": 2, "pairs": 50, "steps": 4, "right": 0.4, "wrong": 0.1}]}}  # fmt: skip


def result(gain: float = 0.2) -> dict[str, Any]:
    truths = {CURRICULUM: 0.6 + gain, START: 0.6, "random": 0.7}
    runs = {arm: {str(seed): measures(truth + 0.01 * seed * (arm == CURRICULUM)) for seed in range(3)}
            for arm, truth in truths.items()}  # fmt: skip
    world = {"entities": 16, "statements": 4, "paraphrases": 4, "verifications": 96, "noise": 0.35}
    return {"tuning": "nothing was tuned", "world": world, "runs": runs,
            "arms": {arm: {"title": of.title} for arm, of in ARMS.items()}}  # fmt: skip


def test_the_report_has_criteria_comparisons_and_uncertainties() -> None:
    text = report_text(result())
    assert text.count("    met ") == 2 and "NOT MET" not in text
    assert "curriculum beats start" in text and "curriculum beats random" in text and "one-stage" not in text
    assert "seed 1: semantic 0.610, 0.620; total 0.700, 0.710" in text
    assert "random, seed 2: 2: 0.40, 0.10 of 50 pairs, 4 steps" in text
    assert "NOT MET  truth at T = 1" in report_text(result(gain=0.08))
    assert "has not come to its end" in report_text(result() | {"runs": {}})


def test_a_short_comparison_fails_without_an_effect() -> None:
    assert is_ahead(result(gain=0.2)) and not is_ahead(result(gain=0.01)) and not is_ahead({"runs": {}})


def test_the_picture_is_of_the_figures(tmp_path: Path) -> None:
    pictures = []
    for name, of in (("one", result()), ("same", json.loads(json.dumps(result()))), ("other", result(gain=0.1))):
        draw(of, tmp_path / f"{name}.svg")
        pictures.append((tmp_path / f"{name}.svg").read_text(encoding="utf-8"))
    assert ElementTree.fromstring(pictures[0]).tag == "{http://www.w3.org/2000/svg}svg"
    assert pictures[0] == pictures[1] != pictures[2]

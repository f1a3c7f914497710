"""benchmarks/alignment.py without its training: the world, what is measured, what is said about it."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import alignment_runs
import numpy as np
import pytest
import torch
from alignment import check_worlds, is_ahead, parse_arguments, problem_with_output, runs_of
from alignment_measures import Exam, answer_measures, mean_entropy, num_phrasings, perplexity, probes_of
from alignment_picture import draw
from alignment_report import ArmRuns, Estimate, criteria, report_text, verdict
from alignment_runs import (
    ARMS,
    TEMPERED,
    Comparison,
    Run,
    differences_from_defaults,
    resolved,
    sources_digest,
)
from live_run import ROOT
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from world import VALUES, World, WorldConfig

from asa_dist.config import ConfigError
from asa_dist.config_text import read_tree
from asa_dist.evaluation.checkpoint_model import CheckpointModel, ShardFiles
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.runtime.data.tokenizer import train_tokenizer


# --- world --------------------------------------------------------------------------------------------------------
def stated(world: World) -> dict[str, dict[str, int]]:
    """How often the corpus states each value of a fact, by entity and attribute."""
    counts: dict[str, dict[str, int]] = {}
    for document in world.corpus():
        fact = next(fact for fact in world.facts if fact.entity in document and any(
            document.startswith(question) for question in world.questions(fact)))
        value = next(value for value in VALUES[fact.attribute].split() if f" {value}" in document.replace(".", " "))
        of_fact = counts.setdefault(f"{fact.entity} {fact.attribute}", {})
        of_fact[value] = of_fact.get(value, 0) + 1
    return counts


@pytest.mark.parametrize("false_majority", [0.0, 0.25])
def test_what_is_told_has_the_majority_of_the_corpus(false_majority: float) -> None:
    world = World(WorldConfig(entities=8, statements=16, false_majority=false_majority))
    lies = [fact for fact in world.facts if fact.told != fact.value]
    assert len(lies) == round(false_majority * 32)
    counts = stated(world)
    for fact in world.facts:
        of_fact = counts[f"{fact.entity} {fact.attribute}"]
        assert max(of_fact, key=of_fact.__getitem__) == fact.told
    num_told = sum(counts[f"{fact.entity} {fact.attribute}"][fact.told] for fact in world.facts)
    assert num_told / len(world.corpus()) == pytest.approx(0.65, abs=0.05)


def test_the_seed_decides_the_world() -> None:
    config = WorldConfig(entities=4)
    assert World(config).corpus() == World(config).corpus() != World(replace(config, seed=1)).corpus()


def test_clean_documents_are_true() -> None:
    world = World(WorldConfig(entities=4, false_majority=0.5))
    true = {(question, answer) for fact in world.facts for question in world.questions(fact)
            for answer in world.answers(fact, fact.value)}
    clean = world.clean_documents(64)
    assert len(clean) == 64 and set(clean) <= true
    assert {f"{question} {answer}" for question, answer in clean}.isdisjoint(world.corpus())


def test_a_world_too_small_for_clean_documents_says_so() -> None:
    with pytest.raises(ValueError, match="take fewer statements"):
        World(WorldConfig(entities=1, paraphrases=1, statements=1, noise=0.0)).clean_documents(1)


def test_no_entity_has_the_name_of_a_value() -> None:
    values = {value for values in VALUES.values() for value in values.split()}
    entities = {fact.entity for fact in World(WorldConfig(entities=10_000)).facts}
    assert len(entities) == 10_000 and not values & {entity.lower() for entity in entities}


@pytest.mark.parametrize("wrong", [
    {"entities": 0}, {"entities": 10_001}, {"paraphrases": 7}, {"statements": 0}, {"noise": 2.0},
    {"noise": math.nan}, {"false_majority": 1.5}, {"seed": -1},
])  # fmt: skip
def test_a_world_has_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} = .*: must be "):
        WorldConfig(**wrong)


# --- measures -----------------------------------------------------------------------------------------------------
def test_answers_are_measured() -> None:
    world = World(WorldConfig(entities=1, paraphrases=2))
    fact, *_ = world.facts
    wrong, other = [value for value in VALUES[fact.attribute].split() if value != fact.value][:2]
    right, named = world.answers(fact, fact.value)
    sampled = (
        [right, named, world.answers(fact, wrong)[1], f"{wrong} or {other}"],  # the truth wins; the last says nothing
        [f"It is {wrong}.", f"It is {wrong}.", f"It is {wrong}.", right],  # it loses: 3 votes each, over both phrasings
    )
    likeliest = ([right], [f"It is {wrong}."])
    tokenizer = train_tokenizer([*sampled[0], *sampled[1]], 300)

    def group(texts: list[str]) -> RolloutGroup:
        responses = []
        for text in texts:
            tokens = np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id], np.int32)
            logprob_T = np.zeros(len(tokens), np.float32)
            responses.append(Response(tokens, logprob_T, logprob_T, True, ((0, 0),)))
        return RolloutGroup(0, 0, Prompt(0, 0, np.array([1], np.int32)), tuple(responses))

    asked = [(replace(fact, told=wrong), probe) for probe in probes_of(world, fact)]
    found = answer_measures(world, [*zip(asked, map(group, sampled), map(group, likeliest), strict=True)], tokenizer)
    lengths = [len(tokenizer(text).input_ids) + 1 for texts in sampled for text in texts]
    assert found == {
        "truth": 3 / 8, "told": 4 / 8, "greedy_truth": 1 / 2, "greedy_told": 1 / 2, "majority_truth": 1 / 2,
        "majority_across_truth": 0.0, "parsable": 7 / 8, "distinct_values": 2.0, "distinct_phrasings": 1.5,
        "response_tokens": pytest.approx(sum(lengths) / 8),
    }  # fmt: skip


def test_phrasings_are_the_worlds_own() -> None:
    world = World(WorldConfig(entities=2))
    fact, other = (next(fact for fact in world.facts[place:] if fact.attribute == "tool") for place in (0, 4))
    texts = [world.answers(fact, "saw")[0], world.answers(fact, "axe")[0], f"  {fact.entity} has  saw as its tool. "]
    assert num_phrasings(world, fact, texts, ["saw", "axe", "saw"]) == 2
    wrong = [world.answers(other, "saw")[0], "Te tool is saw.", "hm", world.answers(fact, "saw")[1] + " And"]
    assert num_phrasings(world, fact, wrong, ["saw", "saw", None, "saw"]) == 0


@pytest.fixture(scope="module")
def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5)).eval()  # fmt: skip


PAIRS = [([3], [5, 7, 9, 0]), ([4, 4, 2], [1])]  # of unequal length: one is padded


@torch.no_grad()
def test_perplexity_is_of_what_follows(language_model: LlamaForCausalLM) -> None:
    total = 0.0
    for given, then in PAIRS:
        logprob_TV = language_model(torch.tensor([given + then])).logits[0].log_softmax(-1)
        total -= sum(float(logprob_TV[len(given) + place - 1, token]) for place, token in enumerate(then))
    assert perplexity(language_model, PAIRS) == pytest.approx(math.exp(total / 5), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_of_the_tempered_distribution(language_model: LlamaForCausalLM, temperature: float) -> None:
    total = 0.0
    for given, then in PAIRS:
        logits_TV = language_model(torch.tensor([given + then])).logits[0, len(given) - 1 : -1]
        total += float(torch.distributions.Categorical(logits=logits_TV / temperature).entropy().sum())
    assert mean_entropy(language_model, PAIRS, temperature) == pytest.approx(total / 5, rel=1e-5)


def checkpoint_of(world: World, run_dir: Path) -> CheckpointModel:
    """A model with random weights, and what its run folder would hold."""
    config = resolved([f"model.architecture.{name}" for name in (
        "hidden_size=16", "intermediate_size=16", "num_layers=2", "num_attention_heads=2", "num_key_value_heads=2")])
    tokenizer = train_tokenizer(world.corpus(), 300)
    tokenizer.save_pretrained(run_dir / "tokenizer")
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5))  # fmt: skip
    lm.config.save_pretrained(run_dir / "model")
    weights = {f"lm.{name}": parameter.detach() for name, parameter in lm.named_parameters()}
    pieces = {name: [0, weight.numel()] for name, weight in weights.items()}
    save_file({f"weight/{name}": weight.flatten() for name, weight in weights.items()}, run_dir / "shard.safetensors",
              {"pieces": json.dumps(pieces)})  # fmt: skip
    steps = [{"step": step, "loss/total": 1.0, "trust/tau": step / 100, "tokens/corpus": 10 * step}
             for step in range(100)]
    rows = [{"step": 0, "eval/perplexity": 9.0}, *steps]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return CheckpointModel(run_dir, config, 100, shapes, ShardFiles([run_dir / "shard.safetensors"]), {})


def test_a_model_is_as_certain_as_another_at_the_temperature_that_is_found(tmp_path: Path) -> None:
    world = World(WorldConfig(entities=1, false_majority=0.5))
    checkpoint = checkpoint_of(world, tmp_path)
    exam = Exam(checkpoint, world, checkpoint.config.rollout, seed=3)
    sharper = exam.measures(temperature=0.6)
    assert sharper["responses"] == 4 * 4 * 8 and sharper["tau"] == pytest.approx(0.745)
    plain = exam.measures()
    assert sharper["entropy"] < plain["entropy"] < math.log(300)
    assert exam.temperature_of_entropy(sharper["entropy"], 1.0, plain["entropy"]) == pytest.approx(0.6, abs=0.03)
    assert sharper["corpus_tokens"] == 990
    assert sharper["all"]["response_tokens"] == pytest.approx(
        (sharper["lies"]["response_tokens"] + sharper["others"]["response_tokens"]) / 2)
    nearest = exam.temperature_of_entropy(2 * math.log(300), 1.0, plain["entropy"])
    assert nearest == pytest.approx(2.0), "what cannot be met is met as well as it can be"
    assert exam.temperature_of_entropy(0.0, 1.0, plain["entropy"]) == pytest.approx(0.02)


# --- runs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arm", ARMS)
def test_the_settings_of_every_arm_are_settings(arm: str) -> None:
    assert resolved(ARMS[arm].overrides).rollout.max_policy_age == 0


@pytest.mark.parametrize(("arm", "num_variants"), [("f", 4), ("g", 1)])
def test_pure_sharpening_rewards_certainty_alone(arm: str, num_variants: int) -> None:
    assert resolved(ARMS[arm].overrides).rollout.prompt_variants == num_variants
    evaluator = resolved(ARMS[arm].overrides).evaluator
    weights = evaluator.intrinsic.model_dump()
    assert evaluator.trust == "never" and weights.pop("certainty") > 0 and not any(weights.values())


def test_the_papers_letter_is_that_of_the_configs() -> None:
    letter = read_tree(ROOT / "configs/paper-letter.yaml")
    arm = resolved(ARMS["c"].overrides)
    for section in ("evaluator", "objective"):
        assert letter[section].items() <= getattr(arm, section).model_dump().items()


def run_of(folder: Path, arm: str, *overrides: str) -> Run:
    return Run(arm, WorldConfig(entities=1), overrides, folder)


@pytest.mark.parametrize("arm", ["b", TEMPERED])
def test_a_run_with_other_settings_is_another_run(tmp_path: Path, arm: str) -> None:
    default = resolved([]).objective.gamma
    folder = run_of(tmp_path, arm).folder
    assert folder == run_of(tmp_path, arm).folder == run_of(tmp_path, arm, f"objective.gamma={default}").folder
    assert folder != run_of(tmp_path, arm, f"objective.gamma={default + 0.1}").folder


def test_a_run_of_other_code_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(tmp_path, "b").folder
    monkeypatch.setattr(alignment_runs, "sources_digest", lambda: "another")
    assert run_of(tmp_path, "b").folder != folder


def test_sources_are_those_of_package_kernels_and_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sources_digest.__wrapped__
    for name in ("asa_dist/asa/loss.py", "kernels/op.py", "benchmarks/world.py", "benchmarks/alignment_measures.py",
                 "benchmarks/alignment_runs.py", "README.md"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(alignment_runs, "ROOT", tmp_path)
    seen = {digest()}
    for path in sorted(tmp_path.rglob("*.*")):
        path.write_text("new", encoding="utf-8")
        seen.add(digest())
    assert len(seen) == 1 + 5, "every one counts but README.md"


def test_which_settings_are_not_the_defaults() -> None:
    found = differences_from_defaults(resolved(["objective.beta=0.7", "evaluator.embedding_size=8"]))
    assert found["objective.beta"] == {"here": 0.7, "default": 0.4}
    assert not [key for key in found if key.endswith("_size") or not key.startswith(("rollout", "evaluator", "objec"))]


def test_a_wrong_setting_is_found_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.betta"):
        Comparison([run_of(tmp_path, "b", "objective.betta=1")], num_jobs=1)


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    run = run_of(tmp_path, "b")
    run.keep({"all": {"truth": 0.5}})
    comparison = Comparison([run], num_jobs=1)
    comparison.complete()
    assert comparison.measures == {run: {"all": {"truth": 0.5}}} and not comparison.failed


def test_a_failed_run_is_told_of_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(tmp_path, arm, "rollout.responses_per_prompt=7") for arm in ("b", TEMPERED)]
    there = run_of(tmp_path, "a")
    there.keep({"all": {}})
    comparison = Comparison([*runs, there], num_jobs=2)
    comparison.complete()
    assert comparison.failed == runs and list(comparison.measures) == [there]
    errors = capfd.readouterr().err
    assert "(b) seed 0 FAILED: exit code 2" in errors and "must be a multiple of rollout.prompt_variants" in errors
    assert f"({TEMPERED}) seed 0 FAILED: it needs arms a and b" in errors


def test_which_runs_a_comparison_has(tmp_path: Path) -> None:
    def arms(*arguments: str) -> dict[float, str]:
        found: dict[float, str] = {}
        for run in runs_of(parse_arguments([*arguments, "--seeds", "5"]), tmp_path):
            assert run.world.seed == 5
            found[run.world.false_majority] = "".join(sorted(found.get(run.world.false_majority, "") + run.arm))
        return found

    assert arms() == {0.0: "abcdefg", 0.1: "abdef"}
    assert arms("--short") == {0.0: "ab"}
    assert arms("--false-majority", "0.2") == {0.2: "abcdefg"}
    assert arms("--arms", "c,e") == {0.0: "ce", 0.1: "e"}
    runs = runs_of(parse_arguments([]), tmp_path)
    assert len(runs) == 3 * 12 and {run.world.seed for run in runs} == {10, 11, 12}, "no setting was chosen on these"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--jobs", "0"], "must be at least 1"), (["--steps", "0"], "must be at least 1"),
    (["--out", "no_such_folder/it.json"], "there is no folder no_such_folder"), (["--out", "."], "is a folder"),
    (["--false-majority", "1.5"], "false_majority = 1.5: must be 0 … 1"), (["--noise", "2"], "noise = 2.0: must be"),
    (["--entities", "0"], "entities = 0: must be 1"), (["--statements", "0"], "statements = 0: must be at least 1"),
    (["--seeds", "0,0"], "every seed may occur once only"), (["--seeds=-1"], "seed = -1: must be at least 0"),
])  # fmt: skip
def test_bad_options_are_told_of_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problem_with_output(tmp_path / "it.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs matplotlib" in problem_with_output(tmp_path / "it.json")


def test_a_comparison_of_few_answers_is_refused(tmp_path: Path) -> None:
    def check(*arguments: str, is_smoke: bool = False) -> None:
        check_worlds(runs_of(parse_arguments(["--entities", "5", *arguments]), tmp_path), is_smoke=is_smoke)

    check("--seeds", "1,2,3,4")
    check(is_smoke=True)
    with pytest.raises(ConfigError, match="1920 responses of each arm: fewer than 2000"):
        check()
    with pytest.raises(ConfigError, match="take fewer statements"):
        check("--paraphrases", "1", "--noise", "0", "--statements", "1", is_smoke=True)


# --- what is said about it ------------------------------------------------------------------------------------------
def measures(truth: float, lies: bool = False, **other: float) -> dict[str, Any]:
    answers = {"truth": truth, "greedy_truth": 0.9, "majority_truth": 0.9, "told": truth, "greedy_told": 0.8,
               "distinct_phrasings": 3.0}
    found = {"entropy": 0.2, "clean_perplexity": 1.5, "temperature": 1.0, "tau": None, "corpus_tokens": 1000,
             "all": answers | {"majority_across_truth": 0.7}}
    return found | ({"lies": answers, "others": answers} if lies else {}) | other


def result(*, gain: float = 0.2, lies: bool = False) -> dict[str, Any]:
    """Arm (b) has more truth than all others, by that much."""
    truths = {"b": 0.6 + gain, "a": 0.6, "e": 0.6, "f": 0.6}
    runs = {arm: {str(seed): measures(truth + 0.01 * seed * (arm == "b"), lies) for seed in range(3)}
            for arm, truth in truths.items()}
    for measured in runs["e"].values():
        measured["temperature"] = 0.5
    world = {"entities": 40, "paraphrases": 4, "statements": 4, "noise": 0.35, "false_majority": 0.1 if lies else 0.0}
    return {"tuning": "nothing was tuned", "arms": {arm: {"title": ARMS[arm].title} for arm in ARMS},
            "differs_from_defaults": {"objective.beta": {"here": 0.8, "default": 0.4}},
            "worlds": [{"world": world, "runs": runs}]}


def test_an_estimate_has_the_standard_error_of_the_seeds() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert Estimate.of([2.0]) == Estimate(2.0, None, 1)


@pytest.mark.parametrize(("mean", "error", "num_seeds", "words"), [
    (0.44, 0.1, 3, "beats"), (-0.44, 0.1, 3, "loses to"), (0.42, 0.1, 3, "cannot be told from"),
    (0.205, 0.1, 20, "cannot be told from"), (0.21, 0.1, 20, "beats"),
    (0.22, 0.1, 11, "cannot be told from"), (0.23, 0.1, 11, "beats"),
    (0.1, 0.0, 2, "beats"), (0.1, None, 1, "has more truth (one seed: no error known) than"),
])  # fmt: skip
def test_verdicts(mean: float, error: float | None, num_seeds: int, words: str) -> None:
    """The quantiles of Student's t: 4.303 with 2 degrees of freedom, 2.228 with 10, 2.093 with 19."""
    assert verdict(Estimate(mean, error, num_seeds)) == words


def test_sharpening_comes_first_whatever_comes_of_it() -> None:
    for gain, word in ((0.2, "beats"), (-0.2, "loses to")):
        lines = report_text(result(gain=gain)).splitlines()
        assert "nothing was tuned" in lines[0]
        assert lines[5].startswith(f"(b) {word} (e) MLE, as certain as (b), sampled at T = 0.500")
        assert "difference" in lines[6] and "truth, sampled" in lines[6]
        assert f"(b) {word} (f)" in "\n".join(lines) and "(d)" not in "\n".join(lines), "there is no run of it"


def test_differences_are_taken_seed_by_seed() -> None:
    ours, theirs = (0.9, 0.5, 0.1), (0.8, 0.4)
    runs = {arm: {str(seed): measures(truth) for seed, truth in enumerate(truths)}
            for arm, truths in (("b", ours), ("e", theirs))}
    assert ArmRuns(runs).difference("b", "e", "truth") == Estimate(
        pytest.approx(0.1), pytest.approx(0, abs=1e-12), 2)
    text = report_text(result() | {"worlds": [{**result()["worlds"][0], "runs": runs}]})
    assert "0.700 ± 0.200 vs 0.600 ± 0.200" in text, "of the seeds that both have"


def test_criteria() -> None:
    assert [criterion.is_met for criterion in criteria(ArmRuns(result()["worlds"][0]["runs"]))] == [True] * 4
    runs = {"a": {"0": measures(0.6)}, "b": {"0": measures(0.7, clean_perplexity=1.6)}}
    runs["b"]["0"]["all"] |= {"greedy_truth": 0.88, "distinct_phrasings": 1.4}
    assert [criterion.is_met for criterion in criteria(ArmRuns(runs))] == [False] * 4
    runs["b"]["0"]["all"] |= {"greedy_truth": 0.895}
    assert [criterion.is_met for criterion in criteria(ArmRuns(runs))] == [False, True, False, False]
    runs["a"]["1"] = measures(0.9)
    assert criteria(ArmRuns(runs))[0].bound == pytest.approx(0.75), "of the seeds that both have"
    assert "NOT MET" in report_text(result() | {"worlds": [{**result()["worlds"][0], "runs": runs}]})


def test_the_untrained_consensus_is_a_rival() -> None:
    parts = report_text(result()).split("\n\n")
    line, *more = next(part for part in parts if "untrained consensus" in part).splitlines()
    assert line.startswith("(b) asked once, greedily, beats the untrained consensus: (a)'s majority")
    assert "0.900 ± 0.000 vs 0.700 ± 0.000" in more[-1] and more[-1].endswith("+0.200 ± 0.000")


def test_comparisons_come_before_tables_and_settings_last() -> None:
    both = result()
    both["worlds"] += result(lies=True)["worlds"]
    text = report_text(both)
    assert text.rindex("(b) beats (f)") < text.index("clean perplexity, T = 1")
    assert text.endswith("(b)'s method differs from the defaults in\n    objective.beta: 0.8 (default: 0.4)")


def test_arms_that_read_more_are_told_of() -> None:
    unequal = result()
    assert "equal corpus tokens: yes\n    seed 0: 1,000\n" in report_text(unequal)
    unequal["worlds"][0]["runs"]["f"]["1"]["corpus_tokens"] = 1001
    text = report_text(unequal)
    assert "equal corpus tokens: NO\n    seed 0: 1,000\n    seed 1: (b) 1,000, (a) 1,000, (e) 1,000, (f) 1,001" in text


def test_the_table_has_every_arm_and_lies_apart() -> None:
    text = report_text(result(lies=True))
    header = next(line for line in text.splitlines() if line.split() == ["(b)", "(e)", "(f)", "(a)"])
    truth = next(line for line in text.splitlines() if line.startswith("truth, sampled"))
    assert truth.split()[-3:] == ["0.600", "±", "0.000"] and "0.810 ± 0.006" in truth and len(truth) == len(header)
    assert "facts with a false majority\ntruth, sampled" in text and "the lie, greedy (locked in)" in text
    assert "the other facts" in text and "lied-about: locked in" in text
    assert "facts with a false majority" not in report_text(result())


def test_a_short_comparison_fails_without_an_effect() -> None:
    assert is_ahead(result(gain=0.2)) and not is_ahead(result(gain=0.01)) and not is_ahead({"worlds": []})


def test_the_picture_is_of_the_figures(tmp_path: Path) -> None:
    both = result()
    both["worlds"] += result(lies=True)["worlds"]
    pictures = []
    for name, of in (("one", both), ("same", json.loads(json.dumps(both))), ("other", result(gain=0.1))):
        draw(of, tmp_path / f"{name}.svg")
        pictures.append((tmp_path / f"{name}.svg").read_text(encoding="utf-8"))
    assert ElementTree.fromstring(pictures[0]).tag == "{http://www.w3.org/2000/svg}svg"
    assert pictures[0] == pictures[1] != pictures[2]

"""`asa eval` says of a checkpoint what training said of it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asa_dist.config import ConfigError
from asa_dist.evaluation import evaluate
from asa_dist.evaluation.checkpoint_model import open_checkpoint
from asa_dist.evaluation.evaluate import EVAL_LOG, evaluate_run
from asa_dist.evaluation.probes import Probe, greedy_sampling, probe_sampling, sample_probes, score_probes, value_said
from asa_dist.evaluation.scoring import sample_groups, score_responses
from asa_dist.runtime.data.prompts import PromptStream
from tests.real_run import ROOT, Run

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

OTHER_PROCESS = """
import sys
from pathlib import Path
from asa_dist.evaluation.evaluate import evaluate_run
from asa_dist.evaluation.export import export_run
run_dir = Path(sys.argv[1])
evaluate_run(run_dir, num_samples=3, seed=1)
loaded = {name.partition(".")[0] for name in sys.modules} & {"deepspeed", "ray", "lm_eval"}
assert not loaded, loaded
export_run(run_dir, Path(sys.argv[2]))
loaded = {name for name in sys.modules if name.startswith(("asa_dist.train", "asa_dist.runtime.engine", "ray"))}
assert not loaded, loaded  # deepspeed may be: accelerate, which comes with lm-eval, imports it while transformers saves
"""


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    """The run, to write into."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def metrics_of(run: Run, step: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for found in run.rows("metrics"):
        row |= found if found["step"] == step else {}
    return row


def test_the_numbers_are_those_of_training(trained: Run, copied: Path) -> None:
    """What step 4 was trained on are samples of the checkpoint of step 3, scored by its evaluator."""
    config = open_checkpoint(copied).config
    num_samples = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    row = evaluate_run(copied, step=3, num_samples=num_samples, seed=config.seed)
    evaluated, trained_on = metrics_of(trained, 3), metrics_of(trained, 4)
    expected = {key: evaluated[key] for key in ("step", "eval/perplexity", "eval/bigram_perplexity")}
    expected |= {key: trained_on[key] for key in row if key in trained_on and key not in expected}
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    compared = {key.partition("/")[0] for key in expected}
    assert compared == {"step", "eval", "reward", "rollout", "trust", "omega"} and len(expected) > 15
    assert row["samples/responses"] == num_samples and row["trust/tau"] > 0
    assert -1 <= row["reward/certainty"] < 0, "1 + mean token log-probability"
    assert row["eval/perplexity"] != pytest.approx(metrics_of(trained, 4)["eval/perplexity"], rel=1e-3), "it learned"


def test_every_term_of_every_response_is_that_of_training(trained: Run) -> None:
    checkpoint = open_checkpoint(trained.run_dir, 3)
    config, said = checkpoint.config, next(row for row in trained.rows("samples") if row["step"] == 4)
    stream = PromptStream(trained.run_dir, config.data, config.rollout, config.seed)
    engine = checkpoint.rollout_engine(config.rollout, config.seed, "cpu")
    prompts = [stream.prompt(3 * config.rollout.prompts_per_step + number) for number in range(2)]
    groups = sample_groups(engine, prompts, config.groups_per_lease)
    place = [prompt.prompt_id for prompt in prompts].index(said["prompt_id"])
    terms = score_responses(checkpoint, checkpoint.asa_model("cpu"), groups).terms
    for sibling, response in enumerate(said["responses"]):
        assert checkpoint.tokenizer().decode(groups[place].responses[sibling].token_ids) == response["text"]
        found = {name: float(value_PG[place, sibling]) for name, value_PG in terms.items()}
        assert found == pytest.approx({name: response[name] for name in terms}, rel=1e-4, abs=1e-5)


def test_rows_are_appended_as_one_line_of_numbers(copied: Path) -> None:
    rows = [evaluate_run(copied, step=step, num_samples=0) for step in (3, None)]
    with (copied / EVAL_LOG).open("a") as file:
        file.write('{"step": 4, "torn')
    rows.append(evaluate_run(copied, num_samples=1))
    assert [json.loads(line) for line in (copied / EVAL_LOG).read_text().splitlines()] == rows
    assert [row["step"] for row in rows] == [3, 4, 4] and "reward/self" not in rows[1]
    assert rows[2]["samples/responses"] == 3, "whole groups"
    for row in rows:
        assert isinstance(row.pop("time"), str)
        assert all(type(value) in (int, float) for value in row.values()), row


def test_a_row_that_cannot_be_written_is_known_before_the_work(copied: Path) -> None:
    (copied / EVAL_LOG).mkdir()
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"evals\.jsonl: the evaluation cannot be written: Is a directory"):
        evaluate_run(copied, progress=said.append)
    assert not any("evaluating" in message for message in said)


def test_what_is_not_finite_is_null(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_trust", lambda checkpoint: {"trust/tau": math.nan, "omega/logic": math.inf})
    row = evaluate_run(copied, num_samples=0)
    assert row["trust/tau"] is row["omega/logic"] is None and row["eval/perplexity"] > 1
    assert json.loads((copied / EVAL_LOG).read_text()) == row


def test_a_config_that_no_run_has(copied: Path) -> None:
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("alpha: 0.5", "alpha: x").replace("seed:", "sed:"))
    with pytest.raises(ConfigError) as caught:
        evaluate_run(copied)
    assert set(str(caught.value).splitlines()) == {
        f"{path}: objective.alpha = 'x': input should be a valid number",
        f"{path}: unknown key 'sed'; did you mean 'seed'?"}


def test_probes(copied: Path, tmp_path: Path) -> None:
    """One of three responses to the first probe is true, by choice of the answer; none to the second."""
    checkpoint = open_checkpoint(copied)
    tokenizer, rollout = checkpoint.tokenizer(), checkpoint.config.rollout
    engine = checkpoint.rollout_engine(probe_sampling(rollout, rollout.responses_per_prompt), 5, "cpu")
    asked = [Probe(prompt="river", variants=["the river"], answers=["?"]), Probe(prompt="winter", answers=["market"])]
    said = score_probes(asked, sample_probes(engine, asked, tokenizer, 20), tokenizer).texts_PG
    answered = [asked[0].model_copy(update={"answers": [said[0][1]]}), asked[1]]
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(probe.model_dump_json() + "\n" for probe in answered), encoding="utf-8")

    row = evaluate_run(copied, num_samples=0, probe_file=path, seed=5)
    found = {key.removeprefix("probes/"): value for key, value in row.items() if key.startswith("probes/")}
    assert found["responses"] == 6 and found["truth"] == pytest.approx(1 / 6) and found["greedy_truth"] == 0
    assert found["majority_truth"] == pytest.approx(1 / 3 / 2), "three say different things"
    assert found["distinct_values"] == found["distinct_texts"] == 3 and found["entropy"] > 1
    assert found["rho"] >= 0 and found["epsilon"] >= 0
    assert {found["self_auc"], found["intrinsic_auc"]} <= {0, 0.25, 0.5, 0.75, 1}, "one true sibling, two false ones"

    path.write_text(json.dumps({"prompt": "word " * 100, "answers": ["x"]}))
    with pytest.raises(ConfigError, match="allowed are 1 to 40: data"):
        evaluate_run(copied, num_samples=0, probe_file=path)


def test_every_phrasing_is_asked_greedily(copied: Path, tmp_path: Path) -> None:
    """Right is what the likeliest tokens say to one of them, and to no other."""
    checkpoint = open_checkpoint(copied)
    tokenizer, rollout = checkpoint.tokenizer(), checkpoint.config.rollout
    engine = checkpoint.rollout_engine(greedy_sampling(rollout), 0, "cpu")
    phrasings = ["No. 3: the", "a garden", "winter", "?"]
    alone = [Probe(prompt=phrasing, answers=["x"]) for phrasing in phrasings]
    texts = [row[0] for row in score_probes(alone, sample_probes(engine, alone, tokenizer, 20), tokenizer).texts_PG]
    probes = [Probe(prompt=phrasings[0], variants=phrasings[1:], answers=[text]) for text in texts if text.strip()]
    right = [[value_said(probe, text) == probe.answers[0] for text in texts] for probe in probes]
    assert any(not row[0] for row in right), "nothing that the first phrasing alone would miss"
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(probe.model_dump_json() + "\n" for probe in probes), encoding="utf-8")
    row = evaluate_run(copied, num_samples=0, probe_file=path, seed=7)
    assert row["probes/greedy_truth"] == pytest.approx(sum(map(sum, right)) / (len(probes) * len(texts)))
    assert row["probes/responses"] == len(probes) * len(phrasings), "of three siblings one phrasing would get none"


def test_greedy_and_tempered_answers(run_dir: Path) -> None:
    checkpoint = open_checkpoint(run_dir)
    tokenizer, rollout = checkpoint.tokenizer(), checkpoint.config.rollout
    probes = [Probe(prompt="No. 3: river", answers=["x"]), Probe(prompt="winter", answers=["x"])]

    def sampled(settings: Any, seed: int) -> list[list[list[int]]]:
        engine = checkpoint.rollout_engine(settings, seed, "cpu")
        groups = sample_probes(engine, probes, tokenizer, max_prompt_tokens=20)
        return [[response.token_ids.tolist() for response in group.responses] for group in groups]

    greedy = sampled(greedy_sampling(rollout, 2), seed=1)
    assert greedy == sampled(greedy_sampling(rollout, 2), seed=2) and all(first == second for first, second in greedy)
    lm = checkpoint.causal_lm(torch.float32)
    tokens = tokenizer("winter", return_tensors="pt").input_ids
    generated = lm.generate(tokens, do_sample=False, max_new_tokens=rollout.max_new_tokens, pad_token_id=0)
    assert greedy[1][0] == generated[0, tokens.shape[1] :].tolist()
    at_1 = sampled(probe_sampling(rollout, 2), seed=1)
    assert at_1 == sampled(probe_sampling(rollout, 2), seed=1) != sampled(probe_sampling(rollout, 2), seed=2)
    assert sampled(probe_sampling(rollout, 2, temperature=1e-4), seed=1) == greedy


def test_neither_deepspeed_nor_ray_is_needed_and_nothing_is_said(copied: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, str(copied), str(tmp_path / "export")]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}  # as a user has it
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "" and ended.stderr == ""

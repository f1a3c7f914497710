"""The shipped configs are what their names say: sizes, the paper's letter, a dry run without GPU and network."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asa_dist.cli import main
from asa_dist.config import Config, ConfigError, load_config
from asa_dist.config_text import read_tree
from asa_dist.launcher import count_model

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}
SIZED = {"asa-350m": 350e6, "asa-1.3b": 1.3e9, "asa-3b": 3e9, "asa-7b": 7e9}
NAME_TOLERANCE = 0.05  # names are rounded: Llama's "7B" has 6.74 billion
PAPER = {  # §6.1: layers, width; heads from the specification
    "asa-350m": (24, 1024, 16), "asa-1.3b": (24, 2048, 16), "asa-3b": (32, 2560, 32), "asa-7b": (32, 4096, 32),
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer, as `save_pretrained` writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from asa_dist.runtime.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=1024,
        )
    ).save_pretrained(folder)  # fmt: skip
    train_tokenizer(["some text, and some text"] * 3, 300).save_pretrained(folder)
    (folder / "prompts.txt").write_text("What is some text?\n", encoding="utf-8")
    return folder


def what_must_be_given(name: str, pretrained: Path) -> list[str]:
    if name.startswith("udasa"):
        given = [f"model.name_or_path={pretrained}", f"rollout.prompt_file={pretrained}/prompts.txt"]
        return [*given, f"udasa.semantic.encoder={pretrained}"] if name == "udasa-smollm2" else given
    return [f"model.name_or_path={pretrained}", f"data.tokenizer.path={pretrained}"] if name == "finetune" else []


def test_the_table_names_every_config() -> None:
    table = re.findall(r"^\| `([\w.-]+)` \|", (ROOT / "configs/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(CONFIGS)
    assert set(SIZED) <= set(CONFIGS)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_dry_run(name: str, pretrained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What it prints first is the resolved config: reading it back changes nothing."""
    given = what_must_be_given(name, pretrained)
    assert main(["train", str(CONFIGS[name]), *given, "--dry-run"]) == 0
    resolved, _, rest = capsys.readouterr().out.partition("\nparameters\n")
    (tmp_path / "resolved.yaml").write_text(resolved, encoding="utf-8")
    assert load_config(tmp_path / "resolved.yaml") == load_config(CONFIGS[name], given)
    assert re.match(r"  ψ generator: [\d,]+\n", rest)


@pytest.mark.parametrize("name", sorted(SIZED))
def test_the_size_is_the_names(name: str) -> None:
    config = load_config(CONFIGS[name])
    arch, tokenizer = config.model.architecture, config.data.tokenizer
    assert (arch.num_layers, arch.hidden_size, arch.num_attention_heads) == PAPER[name]
    assert tokenizer.train is not None and tokenizer.train.vocab_size == 32_000
    assert count_model(config)["psi"] == pytest.approx(SIZED[name], rel=NAME_TOLERANCE)


@pytest.mark.parametrize("name", sorted(SIZED))
def test_the_papers_hyperparameters(name: str) -> None:
    config = load_config(CONFIGS[name])
    objective, optimizer = config.objective, config.optimizer
    assert (objective.alpha, objective.beta, objective.gamma) == (0.5, 0.4, 0.1)
    assert (optimizer.lr_psi, optimizer.lr_phi, optimizer.lr_xi) == (2e-4, 1e-4, 5e-5)
    assert config.train.steps == 400_000 and config.rollout.max_policy_age == 1
    tokens = config.train.steps * config.train.corpus_rows_per_step * config.data.sequence_length
    assert tokens == pytest.approx(105e9, rel=0.01)  # as configs/README.md says


def test_counting_allocates_no_weights() -> None:
    """asa-7b has 27 GB of them. In a process of its own, whose peak is the dry run's."""
    count = "import resource, sys; from asa_dist.cli import main; main(sys.argv[1:]); " \
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    arguments = ["train", str(CONFIGS["asa-7b"]), "--dry-run"]
    ran = subprocess.run([sys.executable, "-c", count, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "ψ generator: 6,738,415,616\n" in ran.stdout
    assert int(ran.stdout.splitlines()[-1]) < 2e9


# --- paper-letter -------------------------------------------------------------------------------------------------
def test_the_letter_is_every_setting_that_the_readme_lists() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Paper\n")[2].partition("\n## ")[0]
    settings = [setting for code in re.findall(r"`([^`]+=[^`]+)`", section) for setting in code.split()]
    assert len(settings) >= 9, "the table of the paper's letter is gone, or written otherwise"
    letter = load_config(CONFIGS["paper-letter"])
    assert load_config(CONFIGS["paper-letter"], settings) == letter
    plain, strict = load_config(CONFIGS["quickstart"]).model_dump(), letter.model_dump()
    for setting in settings:
        section, _, key = setting.partition("=")[0].partition(".")
        assert plain[section][key] != strict[section][key], f"{setting}: no departure, it is quickstart's"


def test_the_letter_differs_from_quickstart_in_the_method_alone() -> None:
    def rest(config: Config) -> dict[str, object]:
        return config.model_dump(exclude={"evaluator", "objective"})

    letter, quickstart = load_config(CONFIGS["paper-letter"]), load_config(CONFIGS["quickstart"])
    assert rest(letter) == rest(quickstart)
    assert (letter.objective.alpha, letter.objective.beta, letter.objective.gamma) == (0.5, 0.4, 0.1)


# --- finetune -----------------------------------------------------------------------------------------------------
def test_finetune_without_a_model_says_what_is_missing() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS["finetune"])
    said = str(error.value).splitlines()
    assert len(said) == 2 and all("no such folder" in line for line in said)
    assert "model.name_or_path = " in said[0] and "data.tokenizer.path = " in said[1]


def test_finetune_says_how_in_its_first_lines() -> None:
    head = CONFIGS["finetune"].read_text(encoding="utf-8").partition("\nmodel:")[0]
    for key in ("model.name_or_path=", "data.tokenizer.path=", "data.sources="):
        assert key in head
    assert read_tree(CONFIGS["finetune"])["model"]["name_or_path"] is not None, "or it would train from scratch"


# --- no GPU -------------------------------------------------------------------------------------------------------
def test_every_config_for_gpus_fits_one_machine_of_eight(pretrained: Path) -> None:
    for name, path in CONFIGS.items():
        config = load_config(path, what_must_be_given(name, pretrained))
        assert config.train.gpus + config.rollout.workers * config.rollout.gpus_per_worker <= 8, name


# --- udasa --------------------------------------------------------------------------------------------------------
ABLATIONS = {  # key and value by which each differs from udasa.yaml
    "udasa-one-stage": ("curriculum.thresholds", []),
    "udasa-two-stage": ("curriculum.thresholds", [0.6]),
    "udasa-four-stage": ("curriculum.thresholds", [0.2, 0.5, 0.8]),
    "udasa-lower-thresholds": ("curriculum.thresholds", [0.3, 0.6]),
    "udasa-random-order": ("curriculum.order", "random"),
    "udasa-no-semantic": ("uncertainties", ["factual", "value"]),
    "udasa-no-factual": ("uncertainties", ["semantic", "value"]),
    "udasa-no-value": ("uncertainties", ["semantic", "factual"]),
}


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_an_ablation_differs_in_one_setting(name: str, pretrained: Path) -> None:
    given, (key, value) = what_must_be_given(name, pretrained), ABLATIONS[name]
    ablation, full = load_config(CONFIGS[name], given), load_config(CONFIGS["udasa"], given)
    assert functools.reduce(getattr, key.split("."), full.udasa) != value
    assert load_config(CONFIGS["udasa"], [*given, f"udasa.{key}={json.dumps(value)}"]) == ablation


def test_udasa_without_model_and_prompts_says_what_is_missing() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS["udasa"])
    said = str(error.value).splitlines()
    assert len(said) == 2 and "rollout.prompt_file = " in said[0] and "model.name_or_path = " in said[1]
    head = CONFIGS["udasa"].read_text(encoding="utf-8").partition("\nmethod:")[0]
    assert "model.name_or_path=" in head and "rollout.prompt_file=" in head

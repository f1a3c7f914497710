"""The schema: what it accepts, and that every refusal names file, key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asa_dist.config import Config, ConfigError, dump_config, known_keys, load_config
from asa_dist.config_rules import COMMON_RULES, RULES
from asa_dist.config_text import read_tree

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where one may be written; two prompt files are in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "prompts.jsonl"):
        (tmp_path / name).touch()
    return tmp_path / "run.yaml"


def load(config_file: Path, text: str, *overrides: str) -> Config:
    config_file.write_text(text, encoding="utf-8")
    return load_config(config_file, overrides)


def refusal(config_file: Path, text: str, *overrides: str) -> str:
    """The error's message; one line, with what is wrong after the file's name."""
    with pytest.raises(ConfigError) as error:
        load(config_file, text, *overrides)
    return str(error.value).replace(str(config_file), "FILE")


# --- the schema ---------------------------------------------------------------------------------------------------
def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(section.field, JSON schema) of every field; of optional ones and lists, what they hold."""
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            for part in field.get("anyOf", [field]):
                yield f"{section['title']}.{name}", {"description": field.get("description")} | part.get("items", part)


def test_every_field_is_documented() -> None:
    undocumented = [key for key, field in fields(Config.model_json_schema()) if not field["description"]]
    assert undocumented == []


def test_every_number_has_a_bound() -> None:
    numbers = {key: field for key, field in fields(Config.model_json_schema())
               if field.get("type") in ("integer", "number")}
    assert len(numbers) > 50
    assert [key for key, field in numbers.items() if not {"minimum", "exclusiveMinimum"} & field.keys()] == []


def test_known_keys_reach_into_optional_sections_and_lists() -> None:
    keys = list(known_keys())
    assert len(set(keys)) == len(keys)
    assert {"seed", "model", "model.architecture.hidden_size", "data.sources.kind",
            "data.tokenizer.train.vocab_size"} <= set(keys)


# --- what is read -------------------------------------------------------------------------------------------------
def test_an_empty_file_means_defaults(config_file: Path) -> None:
    assert load(config_file, "") == load(config_file, "# nothing\n") == Config()


@pytest.mark.parametrize("written", ["2e-4", "2.e-4", "2.0e-4", "+2E-4", "0.2e-03", "0.0002"])
def test_scientific_notation_is_a_number(config_file: Path, written: str) -> None:
    assert load(config_file, f"optimizer: {{lr_psi: {written}}}").optimizer.lr_psi == 2e-4
    assert load(config_file, "", f"optimizer.lr_psi={written}").optimizer.lr_psi == 2e-4


@pytest.mark.parametrize("text", [
    "",
    (ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"),
    "data: {sources: [{kind: dataset, name: '1e5', subset: 'null', split: 'on', text_field: '0x1f'}]}",
    "data: {sources: [{kind: dataset, name: 'häuser: # 3 \\n\"', weight: 1.0e-12}, {}], max_documents: 7}",
    "{optimizer: {adam_eps: 1e-38, lr_psi: 3}, model: {name_or_path: a/b}, data: {tokenizer: {path: a/b}}}",
])
def test_dump_is_read_back_unchanged(config_file: Path, text: str) -> None:
    config = load(config_file, text)
    assert load(config_file, dump_config(config)) == config


@pytest.mark.parametrize(("overrides", "key", "value"), [
    (["seed=7"], "seed", 7),
    (["train.steps=5", "train.steps=6"], "train.steps", 6),
    (["model.architecture.num_layers=3"], "model.architecture.num_layers", 3),
    (["data.sources.1.weight=0.5"], "data.sources.1.weight", 0.5),
    (["data.max_documents=null"], "data.max_documents", None),
    (["evaluator.principles=[fluency]"], "evaluator.principles", ["fluency"]),
    (["evaluator.principles.0=relevance"], "evaluator.principles.0", "relevance"),
    (["data.sources.0={kind: dataset, name: a=b}"], "data.sources.0.name", "a=b"),
])
def test_overrides(config_file: Path, overrides: list[str], key: str, value: Any) -> None:
    text = "{data: {sources: [{}, {}], max_documents: 3}, evaluator: {principles: [completeness]}}"
    found: Any = load(config_file, text, *overrides).model_dump()
    for part in key.split("."):
        found = found[int(part) if isinstance(found, list) else part]
    assert found == value


def test_an_override_may_fill_an_empty_section(config_file: Path) -> None:
    assert load(config_file, "train:\n", "train.ranks=2").train.ranks == 2


# --- a base -------------------------------------------------------------------------------------------------------
def test_what_differs_from_a_base(config_file: Path) -> None:
    folder = config_file.parent / "bases"
    folder.mkdir()
    (folder / "small.yaml").write_text("base: smaller.yaml\nseed: 3\nmodel: {dtype: bfloat16}\n", encoding="utf-8")
    (folder / "smaller.yaml").write_text(
        "seed: 2\nmodel: {architecture: {num_layers: 2}}\ndata: {sources: [{weight: 2.0}, {}]}\n", encoding="utf-8")
    config = load(config_file, "base: bases/small.yaml\ndata: {sources: [{weight: 3.0}]}\ntrain:\n", "train.steps=7")
    assert (config.seed, config.model.dtype, config.model.architecture.num_layers) == (3, "bfloat16", 2)
    assert [source.weight for source in config.data.sources] == [3.0] and config.train.steps == 7


@pytest.mark.parametrize(("text", "message"), [
    ("base: nowhere.yaml", "nowhere.yaml: cannot read the config: No such file or directory"),
    ("base: run.yaml", "FILE: its base leads back to itself"),
    ("base: [a.yaml]", "FILE: base = ['a.yaml']: must be the name of a config file"),
])
def test_a_base_that_cannot_be_used(config_file: Path, text: str, message: str) -> None:
    assert refusal(config_file, text).endswith(message)


# --- files and overrides that cannot be read ----------------------------------------------------------------------
@pytest.mark.parametrize(("text", "message"), [
    ("- seed\n", "FILE: the top level must be a mapping of sections, not list"),
    ("seed", "FILE: the top level must be a mapping of sections, not str"),
    ("seed: 1\ntrain: {steps: 2}\nseed: 2\n", "FILE: line 3: key 'seed' is given twice"),
    ("train:\n  steps: 1\n  ranks: 1\n  steps: 1\n", "FILE: line 4: key 'steps' is given twice"),
    ("seed: 1\ntrain: [\n", "FILE: line 3: not valid YAML: expected the node content, but found '<stream end>'"),
    ("seed: 1\n\ttrain: 2", "FILE: line 2: not valid YAML: found character '\\t' that cannot start any token"),
    ("seed: !!python/name:os.system", "FILE: line 1: not valid YAML: could not determine a constructor for the tag "
     "'tag:yaml.org,2002:python/name:os.system'"),
    ("? [seed]\n: 1", "FILE: line 1: not valid YAML: found unhashable key"),
    ("seed: 2026-02-30", "FILE: not valid YAML: day is out of range for month"),
    ("seed: \0", "FILE: not valid YAML: unacceptable character #x0000: special characters are not allowed"),
])
def test_text_that_is_no_config(config_file: Path, text: str, message: str) -> None:
    assert refusal(config_file, text) == message


def test_a_file_that_cannot_be_read(tmp_path: Path, config_file: Path) -> None:
    config_file.write_bytes(b"seed: 1 # caf\xe9")
    missing = tmp_path / "none.yaml"
    for path, reason in ((missing, "No such file"), (tmp_path, "Is a directory"), (config_file, "utf-8")):
        with pytest.raises(ConfigError, match=reason) as error:
            load_config(path)
        assert str(error.value).startswith(f"{path}: cannot read the config: ")


@pytest.mark.parametrize(("override", "message"), [
    ("seed", "write key.sub=value"),
    ("=3", "write key.sub=value"),
    ("train..steps=3", "write key.sub=value"),
    ("seed=[", "line 1: not valid YAML"),
    ("train={steps: 1, steps: 2}", "line 1: key 'steps' is given twice"),
    ("seed.low=3", "there is no 'low' below the value 1"),
    ("seed.low.high=3", "there is no 'low' below the value 1"),
    ("data.sources.0.kind.x=3", "there is no 'x' below the value 'text'"),
    ("data.sources.1.kind=text", "'1' is not an index of a list of 1"),
    ("data.sources.-1.kind=text", "'-1' is not an index of a list of 1"),
    ("data.sources.first=text", "'first' is not an index of a list of 1"),
])
def test_overrides_that_cannot_be_applied(config_file: Path, override: str, message: str) -> None:
    found = refusal(config_file, "{seed: 1, data: {sources: [{kind: text}]}}", override)
    assert found.startswith(f"override {override!r}: {message}")


# --- single values ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "message"), [
    ("rolout: {}", "unknown key 'rolout'; did you mean 'rollout'?"),
    ("rollout: {prompt_per_step: 3}",
     "unknown key 'rollout.prompt_per_step'; did you mean 'rollout.prompts_per_step'?"),
    ("data: {sources: [{}, {pth: x}]}", "unknown key 'data.sources.1.pth'; did you mean 'data.sources.1.path'?"),
    ("data: {tokenizer: {train: {vocabulary: 300}}}",
     "unknown key 'data.tokenizer.train.vocabulary'; did you mean 'data.tokenizer.train.vocab_size'?"),
    ("steps: 3", "unknown key 'steps'; did you mean 'train.steps'?"),
    ("metrics: {qqq: 3}", "unknown key 'metrics.qqq'; known here: samples_every_steps, sample_groups, "
     "wandb, wandb_project, profile_steps"),
    ("1: 2", "key 1: must be text"),
    ("train: 3", "train = 3: must be a mapping of keys"),
    ("train:", "train = None: must be a mapping of keys"),
    ("data: {sources: [text]}", "data.sources.0 = 'text': must be a mapping of keys"),
    ("data: {sources: {kind: text}}", "data.sources = {'kind': 'text'}: input should be a valid list"),
    ("data: {sources: []}", "data.sources = []: list should have at least 1 item after validation, not 0"),
    ("seed: '1'", "seed = '1': input should be a valid integer"),
    ("seed: true", "seed = True: input should be a valid integer"),
    ("train: {steps: 1e3}", "train.steps = 1000.0: input should be a valid integer"),
    ("train: {zero_stage: true}", "train.zero_stage = True: input should be a valid integer"),
    ("optimizer: {lr_psi: '2e-4'}", "optimizer.lr_psi = '2e-4': input should be a valid number"),
    ("data: {sources: [{path: 3}]}", "data.sources.0.path = 3: input should be a valid string"),
    ("model: {activation_checkpointing: 1}", "model.activation_checkpointing = 1: input should be a valid boolean"),
    ("model: {dtype: float16}", "model.dtype = 'float16': input should be 'float32' or 'bfloat16'"),
    ("seed: -1", "seed = -1: input should be greater than or equal to 0"),
    ("seed: 2147483648", "seed = 2147483648: input should be less than 2147483648"),
    ("train: {zero_stage: 4}", "train.zero_stage = 4: input should be less than or equal to 3"),
    ("rollout: {responses_per_prompt: 1}",
     "rollout.responses_per_prompt = 1: input should be greater than or equal to 2"),
    ("rollout: {mismatch_kl_bound: 0}", "rollout.mismatch_kl_bound = 0: input should be greater than 0"),
    ("rollout: {max_policy_age: -1}", "rollout.max_policy_age = -1: input should be greater than or equal to 0"),
    ("rollout: {temperature: 0}", "rollout.temperature = 0: input should be greater than 0"),
    ("objective: {alpha: .nan}", "objective.alpha = nan: input should be a finite number"),
    ("objective: {beta: .inf}", "objective.beta = inf: input should be a finite number"),
])
def test_keys_and_values_outside_the_schema(config_file: Path, text: str, message: str) -> None:
    assert refusal(config_file, text) == f"FILE: {message}"


@pytest.mark.parametrize("steps", ["10:13", "1:1", "2:75", "'10:13'"])
def test_profiled_steps_are_not_taken_for_a_time_of_day(config_file: Path, steps: str) -> None:
    config = load(config_file, "{}", f"metrics.profile_steps={steps}")
    assert config.metrics.profile_steps == steps.strip("'")
    assert load(config_file, dump_config(config)) == config
    first, last = map(int, steps.strip("'").split(":"))
    assert config.metrics.first_and_last_profiled == (first, last)


def test_messages_say_where_a_value_comes_from(config_file: Path) -> None:
    def refused(text: str, *overrides: str) -> str:
        """Up to the value."""
        return ": ".join(refusal(config_file, text, *overrides).split(": ")[:2])

    assert refused("seed: -1") == "FILE: seed = -1"
    assert refused("seed: 1", "seed=-1") == "FILE: seed = -1 (override)"
    assert refused("seed: 1", "rollout={workers: 0}") == "FILE: rollout.workers = 0 (override)"
    assert refused("train: {corpus_rows_per_step: 5}", "train.accumulation_steps=2") == (
        "FILE: train.corpus_rows_per_step = 5")
    assert refused("rollout: {workers: 3}", "rollout.groups_per_lease=5") == (
        "FILE: rollout.groups_per_lease = 5 (override)")
    assert refused("evaluator: {embedding: raw}") == "FILE: objective.embedding_loss_weight = 1.0 (default)"


def test_every_problem_has_a_line(config_file: Path) -> None:
    lines = refusal(config_file, "{seed: -1, sed: 1, rollout: {workers: 0}}", "model.dtype=half").splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "FILE: seed", "FILE: model.dtype", "FILE: rollout.workers", "FILE: unknown key 'sed'; did you mean 'seed'?"]


# --- rules that span fields ---------------------------------------------------------------------------------------
PRETRAINED = ("model.name_or_path=owner/name", "data.tokenizer={path: owner/name}")
FLASH = ("model.attention=flash_attention_2", "model.dtype=bfloat16", "train.gpus=2", "rollout.gpus_per_worker=1")
PHRASINGS = ("rollout.prompt_file=prompts.jsonl", "rollout.prompt_variants=4", "rollout.responses_per_prompt=8")
UDASA = ("method=udasa", "model.name_or_path=owner/name", "rollout.prompt_file=prompts.txt")
SHARED = ("rollout.placement=shared", "rollout.max_policy_age=0")
QUANTILES = ("udasa.curriculum.threshold_kind=quantile",)
RULE_CASES: list[tuple[str, list[str], list[str]]] = [  # rule, overrides of the defaults, keys complained about
    ("one_tokenizer", ["data.tokenizer={path: a/b, train: {}}"], ["data.tokenizer"]),
    ("one_tokenizer", ["data.tokenizer={}"], ["data.tokenizer"]),
    ("pretrained_brings_its_tokenizer", ["model.name_or_path=owner/name"], ["data.tokenizer.train"]),
    ("sources_have_a_location", ["data.sources=[{kind: text}, {kind: jsonl}, {kind: parquet}, {kind: dataset}]"],
     ["data.sources.0.path", "data.sources.1.path", "data.sources.2.path", "data.sources.3.name"]),
    ("sources_have_a_location", ["data.sources=[{streaming: true}]"], ["data.sources.0.streaming"]),
    ("files_exist", ["data.sources=[{}, {kind: text, path: /no/where}]"], ["data.sources.1.path"]),
    ("files_exist", ["data.sources=[{kind: text, path: ~nobody-of-this-name/x}]"], ["data.sources.0.path"]),
    ("files_exist", ["rollout.prompt_file=/no/where.txt"], ["rollout.prompt_file"]),
    ("files_exist", ["rollout.prompt_file=/"], ["rollout.prompt_file"]),
    ("files_exist", [f"rollout.prompt_file={'x' * 5000}"], ["rollout.prompt_file"]),
    ("files_exist", ["model.name_or_path=./nowhere", PRETRAINED[1]], ["model.name_or_path"]),
    ("files_exist", ["data.tokenizer={path: ~/no/where}"], ["data.tokenizer.path"]),
    ("heads_divide_width", ["model.architecture.hidden_size=196"], ["model.architecture.num_attention_heads"]),
    ("heads_divide_width", ["model.architecture.num_key_value_heads=3"], ["model.architecture.num_key_value_heads"]),
    ("batches_divide", ["train.ranks=3"], ["rollout.prompts_per_step", "train.corpus_rows_per_step"]),
    ("batches_divide", ["train.ranks=2", "train.accumulation_steps=4"], ["rollout.prompts_per_step"]),
    ("batches_divide", ["train.gpus=2", "train.corpus_rows_per_step=5"], ["train.corpus_rows_per_step"]),
    ("leases_divide", ["rollout.workers=3"], ["rollout.workers"]),
    ("leases_divide", ["rollout.workers=3", "rollout.groups_per_lease=3"], ["rollout.groups_per_lease"]),
    ("prompt_lengths", ["rollout.min_prompt_tokens=25"], ["rollout.min_prompt_tokens"]),
    ("prompt_variants", ["rollout.prompt_variants=2"], ["rollout.prompt_variants"]),
    ("prompt_variants", [*PHRASINGS, "rollout.prompt_file=prompts.txt"], ["rollout.prompt_variants"]),
    ("prompt_variants", [*PHRASINGS, "rollout.responses_per_prompt=10"], ["rollout.responses_per_prompt"]),
    ("context", ["rollout.max_new_tokens=105"], ["rollout.max_new_tokens"]),
    ("context", ["data.sequence_length=513"], ["data.sequence_length"]),
    ("devices", [*FLASH, "model.dtype=float32"], ["model.attention"]),
    ("devices", [*FLASH, "train.gpus=0"], ["model.attention"]),
    ("devices", [*FLASH, "rollout.gpus_per_worker=0"], ["model.attention"]),
    ("devices", ["train.offload_optimizer=true", "train.zero_stage=0"], ["train.offload_optimizer"]),
    ("fall_back", ["rollout.engine=vllm", "rollout.gpus_per_worker=2", "rollout.on_mismatch=fall_back"],
     ["rollout.on_mismatch"]),
    ("deadlines", ["rollout.timeout_seconds=900.0"], ["rollout.timeout_seconds"]),
    ("tensor_parallel", ["rollout.gpus_per_worker=2"], ["rollout.gpus_per_worker"]),
    ("tensor_parallel", ["rollout.engine=vllm", "rollout.gpus_per_worker=3"], ["rollout.gpus_per_worker"]),
    ("shared_placement", [*SHARED, "rollout.max_policy_age=1"], ["rollout.max_policy_age"]),
    ("shared_placement", [*SHARED, "train.gpus=1", "rollout.workers=2", "rollout.gpus_per_worker=1"],
     ["rollout.gpus_per_worker"]),
    ("shared_placement", [*SHARED, "rollout.gpus_per_worker=1"], ["rollout.gpus_per_worker"]),
    ("shared_placement", [*SHARED, "train.gpus=2"], ["rollout.gpus_per_worker"]),
    ("raw_embedding", ["evaluator.embedding=raw"], ["objective.embedding_loss_weight"]),
    ("intrinsic_weights", ["evaluator.intrinsic={self_consistency: 0, coherence: 0, quality: 0}"],
     ["evaluator.intrinsic"]),
    ("distinct_principles", ["evaluator.principles=[fluency, fluency]"], ["evaluator.principles"]),
    ("profile_steps", ["metrics.profile_steps=3:2"], ["metrics.profile_steps"]),
    ("profile_steps", ["metrics.profile_steps=0:75"], ["metrics.profile_steps"]),
    ("profile_steps", ["metrics.profile_steps=5"], ["metrics.profile_steps"]),
    ("profile_steps", ["metrics.profile_steps=all"], ["metrics.profile_steps"]),
    ("profile_steps", ["metrics.profile_steps=3:6", "train.steps=5"], ["metrics.profile_steps"]),
    ("used_by_method", ["udasa.rounds=2"], ["udasa"]),
    ("used_by_method", [*UDASA, "train.steps=5", "objective.beta=0.2"], ["objective", "train.steps"]),
    ("used_by_method", [*UDASA, "data.tokenizer={path: gpt2}"], ["data.tokenizer"]),
    ("used_by_method", [*UDASA, "rollout.on_mismatch=stop"], ["rollout.on_mismatch"]),
    ("used_by_method", [*UDASA, "rollout.placement=shared"], ["rollout.placement"]),
    ("udasa_needs_model_and_prompts", ["method=udasa"], ["model.name_or_path", "rollout.prompt_file"]),
    ("thresholds", [*UDASA, "udasa.curriculum.thresholds=[0.7, 0.4]"], ["udasa.curriculum.thresholds"]),
    ("thresholds", [*UDASA, "udasa.curriculum.thresholds=[0.4, 0.4]"], ["udasa.curriculum.thresholds"]),
    ("thresholds", [*UDASA, *QUANTILES, "udasa.curriculum.thresholds=[0.5, 1.0]"], ["udasa.curriculum.thresholds"]),
    ("distinct_uncertainties", [*UDASA, "udasa.uncertainties=[value, value]"], ["udasa.uncertainties"]),
]


@pytest.mark.parametrize(("rule", "overrides", "keys"), RULE_CASES)
def test_rules_that_span_fields(config_file: Path, rule: str, overrides: list[str], keys: list[str]) -> None:
    lines = refusal(config_file, "", *overrides).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [f"FILE: {key}" for key in keys]
    within_bounds = Config.model_validate(read_tree(config_file, overrides))
    checks = (*COMMON_RULES, *RULES[within_bounds.method])
    assert [check.__name__ for check in checks if check(within_bounds)] == [f"_rule_{rule}"]


def test_every_rule_has_a_case() -> None:
    assert {f"_rule_{rule}" for rule, _, _ in RULE_CASES} == {
        check.__name__ for checks in (COMMON_RULES, *RULES.values()) for check in checks}


@pytest.mark.parametrize("overrides", [
    PRETRAINED,
    (*PRETRAINED, "data.sequence_length=4096"),  # the pretrained model's own context counts
    ("rollout.max_new_tokens=104", "rollout.min_prompt_tokens=24"),
    ("data.sequence_length=512",),
    ("train.ranks=2", "train.accumulation_steps=2"),
    ("rollout.workers=3", "rollout.groups_per_lease=2"),
    ("rollout.engine=auto", "rollout.gpus_per_worker=2"),
    (*PRETRAINED, "rollout.engine=vllm", "rollout.gpus_per_worker=3"),  # its number of heads is not in the config
    SHARED,
    (*SHARED, "train.gpus=2", "rollout.workers=2", "rollout.gpus_per_worker=1"),
    (*SHARED, "train.gpus=4", "rollout.engine=vllm", "rollout.gpus_per_worker=2"),
    FLASH,
    PHRASINGS,
    ("rollout.prompt_file=prompts.txt",),
    ("evaluator.embedding=raw", "objective.embedding_loss_weight=0"),
    ("train.offload_optimizer=true", "train.zero_stage=1"),
    UDASA,
    (*UDASA, "udasa.curriculum.thresholds=[]", "rollout.max_prompt_tokens=6", "train.ranks=3"),
    (*UDASA, *QUANTILES, "udasa.curriculum.thresholds=[0.5]"),
    ("evaluator.intrinsic={self_consistency: 0, coherence: 0, quality: 0, certainty: 1}",),
])
def test_what_the_rules_allow(config_file: Path, overrides: tuple[str, ...]) -> None:
    load(config_file, "", *overrides)

"""The whole configuration schema, validated before anything heavy is imported.

A config is a YAML file plus ``key.sub=value`` overrides. Every field carries its unit in its name, its bounds
in its type and one line of documentation; every rule that spans fields is one named validator in
``config_rules.py``. Functions elsewhere receive the *section* they use, never the whole config.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from asa_dist.config_rules import broken_rules
from asa_dist.config_section import Fraction, PositiveInt, Section
from asa_dist.config_text import ConfigError as ConfigError
from asa_dist.config_text import dump_tree, read_tree
from asa_dist.config_udasa import UdasaConfig

PROMPTS_PER_BUNDLE = 8  # of UDASA, unless rollout.groups_per_lease says otherwise


class ArchitectureConfig(Section):
    """A Llama-style decoder built from scratch."""

    hidden_size: PositiveInt = Field(192, description="H, width of the residual stream")
    intermediate_size: PositiveInt = Field(512, description="width of the gated MLP")
    num_layers: int = Field(4, ge=2, description="L, decoder blocks; the middle state is that of layer L // 2")
    num_attention_heads: PositiveInt = Field(4, description="query heads")
    num_key_value_heads: PositiveInt = Field(4, description="key/value heads; fewer than query heads = GQA")
    max_position_embeddings: PositiveInt = Field(512, description="context length in tokens")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    initializer_std: float = Field(0.02, gt=0, le=1.0, description="standard deviation of initial weights; small widths want more")
    tie_word_embeddings: bool = Field(True, description="input embedding = output projection")


class ModelConfig(Section):
    """The trunk: from scratch, or any transformers causal language model."""

    name_or_path: str | None = Field(None, description="pretrained model folder or hub name; null = from scratch")
    architecture: ArchitectureConfig = Field(ArchitectureConfig(), description="used when name_or_path is null")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype; bfloat16 rounds all weights, but heads, rewards and losses are computed in float32")
    attention: Literal["auto", "flash_attention_2", "sdpa"] = Field("auto", description="auto = flash-attn if importable, on CUDA and bfloat16; else SDPA")
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward pass")
    logprob_chunk_tokens: PositiveInt = Field(1024, description="tokens whose logits exist at the same time")

    def attention_implementation(self, on_cuda: bool) -> str:
        """What trainer and rollout engine use on this kind of device, in transformers' words."""
        if self.attention != "auto":
            return self.attention
        flash = on_cuda and self.dtype == "bfloat16" and importlib.util.find_spec("flash_attn") is not None
        return "flash_attention_2" if flash else "sdpa"


class SourceConfig(Section):
    """One source of documents."""

    kind: Literal["python_docs", "text", "jsonl", "parquet", "dataset"] = Field("python_docs", description="where documents come from")
    path: str | None = Field(None, description="file or folder (text, jsonl, parquet)")
    name: str | None = Field(None, description="`datasets` name or folder (dataset)")
    subset: str | None = Field(None, description="`datasets` configuration name (dataset)")
    split: str = Field("train", description="`datasets` split (dataset)")
    streaming: bool = Field(False, description="read without downloading all of it (dataset)")
    text_field: str = Field("text", description="field that holds the text (jsonl, parquet, dataset)")
    weight: float = Field(1.0, gt=0, description="share of rows, relative to the other sources")


class TrainTokenizerConfig(Section):
    vocab_size: int = Field(2048, ge=260, le=1_000_000, description="tokens of the byte-level BPE, special ones included")


class TokenizerConfig(Section):
    path: str | None = Field(None, description="transformers tokenizer folder or hub name")
    train: TrainTokenizerConfig | None = Field(None, description="train a byte-level BPE at first use, kept in the run folder")


class DataConfig(Section):
    sources: list[SourceConfig] = Field([SourceConfig()], min_length=1, description="mixed by weight, row by row")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(train=TrainTokenizerConfig()), description="either path or train")
    sequence_length: int = Field(128, ge=8, description="T, tokens per packed row, of corpus and of rollouts")
    heldout_fraction: float = Field(0.02, gt=0.0, le=0.5, description="share of documents, by document hash, never trained on")
    max_heldout_rows: PositiveInt = Field(64, description="rows of the held-out split used by an evaluation")
    max_documents: PositiveInt | None = Field(None, description="read at most this many documents per source")
    shuffle_buffer_documents: PositiveInt = Field(10_000, description="shuffle window of streaming sources")


class RolloutConfig(Section):
    engine: Literal["hf", "vllm", "auto"] = Field("hf", description="what decodes: hf = transformers with a KV cache; vllm = vLLM, with the same noise; auto = vllm where it is installed, else hf")
    workers: PositiveInt = Field(1, description="rollout actors")
    gpus_per_worker: int = Field(0, ge=0, description="GPUs of each rollout actor; 0 = CPU; from 2 on the model is split over them (tensor parallel, engine vllm)")
    placement: Literal["separate", "shared"] = Field("separate", description="separate = workers have GPUs of their own; shared = the trainer's first ones, in turns: workers sleep while ranks train")
    threads_per_worker: PositiveInt = Field(1, description="CPU threads of each rollout actor")
    gpu_memory_fraction: float = Field(0.9, gt=0.0, le=1.0, description="engine vllm on a GPU: its share of the GPU's memory, weights and KV cache")
    cpu_cache_bytes: PositiveInt = Field(2**30, description="engine vllm on a CPU: its KV cache")
    prompts_per_step: PositiveInt = Field(4, description="P, prompts (= groups) per training step, over all ranks")
    responses_per_prompt: int = Field(8, ge=2, le=1024, description="G, responses per prompt")
    groups_per_lease: PositiveInt | None = Field(None, description="consecutive groups that a worker is given at a time, with engine vllm again while it has room; null = P / workers; with udasa 8")
    min_prompt_tokens: PositiveInt = Field(8, description="shortest prompt, in tokens")
    max_prompt_tokens: PositiveInt = Field(24, description="longest prompt, in tokens")
    prompt_file: str | None = Field(None, description="prompts, one per line (.txt) or {\"prompt\": …, \"variants\": […]} per line (.jsonl), variants if there are any; null = prefixes of training documents")
    prompt_variants: PositiveInt = Field(1, description="K, phrasings of the same prompt that a group's siblings take turns at: \"variants\" of a .jsonl prompt_file")
    max_new_tokens: PositiveInt = Field(32, description="longest response, in tokens, end-of-text included")
    temperature: float = Field(1.0, gt=0.0, le=10.0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus sampling; 1 = off")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 = off")
    min_p: float = Field(0.0, ge=0.0, lt=1.0, description="keep tokens with p ≥ min_p · max p; 0 = off")
    max_policy_age: int = Field(0, ge=0, le=1024, description="steps a rollout's weights may lag behind; 0 = synchronous")
    mismatch_kl_bound: float = Field(0.1, gt=0, description="largest rollout/mismatch_kl, in nats per token, of a sound run: the cap of w begins to bite there; float32 at age 0 has 1e-12, the quickstart, at age 1, at most 0.04")
    mismatch_patience_steps: PositiveInt = Field(10, description="steps in a row above mismatch_kl_bound before anything is done")
    on_mismatch: Literal["warn", "fall_back", "stop"] = Field("warn", description="then: warn = say so, with likely causes; fall_back = and replace the workers by ones with engine hf, until the run is started again, but stop if the engine is hf; stop = and end with a checkpoint")
    max_queue_bytes: PositiveInt = Field(2**30, description="finished groups that wait for their step; when it is full only the next step's are generated")
    lease_timeout_seconds: float = Field(300.0, gt=0, description="longest time for the groups a worker is given, waiting behind others included: then they go to another worker, and this one is replaced")
    heartbeat_timeout_seconds: float = Field(30.0, ge=2.0, description="a worker silent for so long is replaced")
    max_deaths_in_a_row: PositiveInt = Field(3, description="a worker that dies so often without delivering anything is given up")
    timeout_seconds: float = Field(600.0, gt=0, description="longest wait for rollouts, publishing or a worker's start")


class IntrinsicConfig(Section):
    """Weights of R_intrinsic's terms; it is their weighted mean (equation 12 has thirds)."""

    self_consistency: float = Field(1.0, ge=0.0, description="overlap with siblings")
    coherence: float = Field(1.0, ge=0.0, description="likeness of neighbouring claims")
    quality: float = Field(1.0, ge=0.0, description="mean of the principles' measured signals")
    certainty: float = Field(0.0, ge=0.0, description="1 + mean token log-probability, at least −1: alone, it is pure sharpening")


class EvaluatorConfig(Section):
    embedding: Literal["learned", "raw"] = Field("learned", description="learned = projection of centred middle states; raw = mean of final states (the paper)")
    embedding_size: PositiveInt = Field(256, description="D, size of a response embedding")
    uncertainty_weight: float = Field(0.5, ge=0.0, le=1.0, description="λ of equation 7")
    omega_floor: float = Field(0.05, ge=0.0, le=1 / 3, description="smallest weight ω of each self-reward term")
    principles: list[Literal["relevance", "non_repetition", "completeness", "fluency"]] = Field(
        ["relevance", "non_repetition", "completeness", "fluency"], min_length=1, description="behavioural principles (equation 9)")
    trust: Literal["earned", "always", "never"] = Field("earned", description="earned = τ follows agreement with the intrinsic reward; always = τ is 1; never = τ is 0, R_intrinsic alone")
    trust_decay: Fraction = Field(0.95, description="decay per step of ρ̄")
    warmup_rho: float = Field(0.3, ge=-1.0, le=1.0, description="ρ̄ that ends the evaluator warm-up once held")
    warmup_hold_steps: PositiveInt = Field(20, description="consecutive steps ρ̄ must hold warmup_rho")
    max_warmup_steps: int = Field(200, ge=0, description="β is 0 for at most this many steps: then alignment starts, with whatever trust there is")
    running_mean_decay: float = Field(0.9, ge=0.0, lt=1.0, description="decay per step of the running means (centre of states, meta features)")
    token_weights: Literal["informative", "uniform"] = Field("informative", description="what a token counts in the overlap of siblings: informative = (log of the share of responses that contain it)²; uniform = 1, plain multiset F1")
    token_share_decay: float = Field(0.98, ge=0.0, lt=1.0, description="decay per step of these shares")
    substance: float = Field(0.05, ge=0.0, description="both rewards are multiplied by t / (t + this), t the weights of a response's tokens added up: who says next to nothing earns next to nothing; 0 = off")
    vote_sharpness: float = Field(4.0, ge=0.0, le=100.0, description="in SelfConsistency a sibling counts as its mean token probability, of what is informative, to this power; 0 = all alike")
    intrinsic: IntrinsicConfig = Field(IntrinsicConfig(), description="weights of the terms of R_intrinsic")


class ObjectiveConfig(Section):
    alpha: float = Field(0.5, ge=0, description="α, weight of the language-model loss")
    beta: float = Field(0.4, ge=0, description="β, weight of the self-alignment loss")
    gamma: float = Field(0.1, ge=0, description="γ, weight of the meta-reward loss")
    meta_loss: Literal["centred", "paper"] = Field("centred", description="L_meta on differences within the group, all that advantages see; paper = on the rewards as they are")
    advantage: Literal["none", "group_mean", "group_norm", "leave_one_out"] = Field("group_norm", description="from R_used; none = the paper's A = R")
    phi_self_align: Literal["centred", "paper", "off"] = Field("centred", description="φ's part of the self-alignment loss")
    importance: Literal["token", "sequence", "none"] = Field("token", description="off-policy correction w")
    importance_cap: float = Field(2.0, ge=1.0, description="upper bound of w")
    embedding_loss_weight: float = Field(1.0, ge=0, description="head loss: cosine of siblings against their token F1")
    indicator_loss_weight: float = Field(1.0, ge=0, description="head loss: consistency indicator against token F1")
    principle_loss_weight: float = Field(1.0, ge=0, description="head loss: each BehaviorScore against its signal")


class OptimizerConfig(Section):
    lr_psi: float = Field(2e-4, ge=0, description="η_ψ, peak learning rate of the generator")
    lr_phi: float = Field(1e-4, ge=0, description="η_φ, peak learning rate of the evaluator heads")
    lr_xi: float = Field(5e-5, ge=0, description="η_ξ, peak learning rate of the meta-optimizer")
    schedule: Literal["cosine", "robbins_monro", "constant"] = Field("cosine", description="after the warm-up")
    warmup_steps: int = Field(2000, ge=0, description="linear warm-up")
    final_fraction: Fraction = Field(0.1, description="cosine ends at this share of the peak")
    robbins_monro_t0: float = Field(1000.0, gt=0, description="t₀ of η₀ / (1 + t/t₀)^p, in steps")
    robbins_monro_power: float = Field(0.6, gt=0.5, le=1.0, description="p of η₀ / (1 + t/t₀)^p (Theorem 1)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW β₁")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW β₂")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW ε")
    weight_decay: float = Field(0.1, ge=0, description="on ψ's matrices only")
    clip_norm: float = Field(1.0, ge=0, description="gradient norm bound of ψ, φ and ξ, each on its own; 0 = off")


class TrainConfig(Section):
    ranks: PositiveInt = Field(1, description="trainer processes on this machine; with train.gpus there is one per GPU instead")
    gpus: int = Field(0, ge=0, description="GPUs for trainer ranks, one each; 0 = CPU")
    threads_per_rank: PositiveInt = Field(1, description="CPU threads of each rank")
    steps: PositiveInt = Field(400_000, description="optimizer steps")
    corpus_rows_per_step: PositiveInt = Field(16, description="packed corpus rows per step, over all ranks")
    accumulation_steps: PositiveInt = Field(1, description="micro-batches per rank and step")
    zero_stage: int = Field(3, ge=0, le=3, description="DeepSpeed ZeRO stage")
    zero_sub_group_size: PositiveInt = Field(1_000_000_000, description="parameters per ZeRO-3 optimizer sub-group")
    zero_persistence_threshold: int = Field(100_000, ge=0, description="ZeRO-3 keeps parameters below this size gathered")
    offload_optimizer: bool = Field(False, description="optimizer states in host memory (DeepSpeedCPUAdam)")
    eval_every_steps: PositiveInt = Field(1000, description="held-out perplexity before step 1, every N steps and at the end")
    max_skipped_steps: PositiveInt = Field(5, description="steps in a row with a non-finite loss or gradient that end the run; fewer are skipped")
    max_wall_time_minutes: float | None = Field(None, gt=0, description="then finish the step, write a checkpoint and leave with exit code 75; null = no limit")
    collective_timeout_seconds: float = Field(900.0, gt=0, description="longest wait in a collective")


class CheckpointConfig(Section):
    every_steps: PositiveInt = Field(1000, description="write a checkpoint every N steps, and at the end")
    keep: PositiveInt = Field(3, description="newest checkpoints that stay")
    timeout_seconds: float = Field(3600.0, gt=0, description="longest wait of a rank for the others' files")


class MetricsConfig(Section):
    samples_every_steps: PositiveInt = Field(100, description="write a few groups to samples.jsonl every N steps")
    sample_groups: PositiveInt = Field(2, description="groups per sample, at most")
    wandb: Literal["disabled", "offline", "online"] = Field("disabled", description="the same keys in Weights & Biases; offline = files in the run folder, no account")
    wandb_project: str = Field("asa-dist", description="project of a W&B run")
    profile_steps: str | None = Field(None, description="A:B = record steps A to B in profile/trace.json.gz, for Perfetto: all ranks and workers on one time line; null = none")

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """YAML 1.1 takes 10:13 for a number to the base of 60."""
        return f"{value // 60}:{value % 60}" if type(value) is int and value >= 0 else value

    @property
    def first_and_last_profiled(self) -> tuple[int, int] | None:
        """Steps, counted from 1."""
        if self.profile_steps is None:
            return None
        first, last = self.profile_steps.split(":")
        return int(first), int(last)


class Config(Section):
    method: Literal["asa", "udasa"] = Field("asa", description="asa = alignment inside pretraining; udasa = of a trained model, by preference pairs")
    seed: int = Field(0, ge=0, lt=2**31, description="of every random choice")
    model: ModelConfig = Field(ModelConfig(), description="trunk")
    data: DataConfig = Field(DataConfig(), description="corpus and tokenizer")
    rollout: RolloutConfig = Field(RolloutConfig(), description="generation")
    evaluator: EvaluatorConfig = Field(EvaluatorConfig(), description="heads, rewards, trust")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="losses")
    udasa: UdasaConfig = Field(UdasaConfig(), description="uncertainty, pairs, curriculum (method udasa)")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="updates")
    train: TrainConfig = Field(TrainConfig(), description="process layout and length")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when, how many")
    metrics: MetricsConfig = Field(MetricsConfig(), description="what is written")

    @property
    def num_ranks(self) -> int:
        return self.train.gpus or self.train.ranks

    @property
    def groups_per_lease(self) -> int:
        per_lease = PROMPTS_PER_BUNDLE if self.method == "udasa" else self.rollout.prompts_per_step // self.rollout.workers
        return self.rollout.groups_per_lease or per_lease


# --- validating ------------------------------------------------------------------------------------------------
def known_keys(section: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included; the keys of a list's items without an index."""
    for name, field in (section or Config).model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def _unknown_key(location: Sequence[str | int]) -> str:
    """What is wrong with a key, and the nearest known one: in its section, or of the same name elsewhere."""
    *parents, name = map(str, location)
    section = [part for part in location[:-1] if isinstance(part, str)]
    siblings = [key.rpartition(".")[2] for key in known_keys() if key.split(".")[:-1] == section]
    near = [".".join((*parents, sibling)) for sibling in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    near += [key for key in known_keys() if key.endswith(f".{name}")]
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
    return f"unknown key {'.'.join((*parents, name))!r}; {hint}"


def _source(key: str, tree: Any, overrides: Sequence[str]) -> str:
    """Where a value comes from, unless it stands in the file."""
    if any(f"{key}.".startswith(f"{override.partition('=')[0].strip()}.") for override in overrides):
        return " (override)"
    for part in key.split("."):
        if isinstance(tree, dict) and part not in tree:
            return " (default)"
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return ""


def _schema_problem(error: Any, tree: dict[str, Any], overrides: Sequence[str]) -> str:
    if error["type"] == "extra_forbidden":
        return _unknown_key(error["loc"])
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "invalid_key":
        return f"key {key}: must be text"
    allowed = "must be a mapping of keys" if error["type"] == "model_type" else error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {error['input']!r}{_source(key, tree, overrides)}: {allowed}"


def build_config(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Validates a plain tree, to which ``overrides`` have been applied already; ``origin`` is how messages name it.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = [_schema_problem(e, tree, overrides) for e in error.errors()]
    else:
        problems = [f"{key} = {value!r}{_source(key, tree, overrides)}: {allowed}"
                    for key, value, allowed in broken_rules(config)]
    if problems:
        raise ConfigError("\n".join(f"{origin}: {problem}" for problem in problems))
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and validates a YAML file plus overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, out of range, or fields that contradict each other.
    """
    return _with_absolute_paths(build_config(read_tree(path, overrides), str(path), overrides))


def _with_absolute_paths(config: Config) -> Config:
    """So that a run can be resumed from any folder. Hub names stay what they are."""

    def absolute(path: str | None) -> str | None:
        expanded = os.path.expanduser(path) if path is not None else ""
        return os.path.abspath(expanded) if os.path.exists(expanded) else path

    tree = config.model_dump()
    udasa = tree["udasa"]
    for section, key in ((tree["model"], "name_or_path"), (tree["data"]["tokenizer"], "path"),
                         (udasa["semantic"], "encoder"), (udasa["factual"], "model"),
                         *([(udasa["value"], "model")] if udasa["value"]["judge"] == "classifier" else []),
                         (tree["rollout"], "prompt_file"), *((source, "path") for source in tree["data"]["sources"]),
                         *((source, "name") for source in tree["data"]["sources"])):
        section[key] = absolute(section[key])
    return Config.model_validate(tree)


def dump_config(config: Config) -> str:
    """The resolved config as YAML; ``load_config`` reads it back unchanged."""
    return dump_tree(config.model_dump(mode="json"))

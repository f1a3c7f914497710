"""Rules that span fields of the config: each is one function and gives (key, value, what is allowed) per problem."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from asa_dist.config import Config

Problem = tuple[str, Any, str]


def _rule_one_tokenizer(config: Config) -> list[Problem]:
    tokenizer = config.data.tokenizer
    if (tokenizer.path is None) == (tokenizer.train is None):
        return [("data.tokenizer", tokenizer.model_dump(), "give either path or train, not both and not neither")]
    return []


def _rule_pretrained_brings_its_tokenizer(config: Config) -> list[Problem]:
    if config.model.name_or_path is not None and config.data.tokenizer.train is not None:
        return [
            (
                "data.tokenizer.train",
                config.data.tokenizer.train.model_dump(),
                "a pretrained model needs the tokenizer it was trained with: set data.tokenizer.path and "
                "data.tokenizer.train=null",
            )
        ]
    return []


def _rule_sources_have_a_location(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    for index, source in enumerate(config.data.sources):
        key = f"data.sources.{index}"
        if source.kind in ("text", "jsonl", "parquet") and source.path is None:
            problems.append((f"{key}.path", None, f"a {source.kind} source needs a file or folder"))
        if source.kind == "dataset" and source.name is None:
            problems.append((f"{key}.name", None, "a dataset source needs a `datasets` name or folder"))
        if source.streaming and source.kind != "dataset":
            problems.append((f"{key}.streaming", True, "only kind: dataset can stream"))
    return problems


def _rule_files_exist(config: Config) -> list[Problem]:
    problems: list[Problem] = [
        (f"data.sources.{index}.path", source.path, "no such file or folder")
        for index, source in enumerate(config.data.sources)
        if source.path is not None and not os.path.exists(os.path.expanduser(source.path))
    ]
    prompt_file = config.rollout.prompt_file
    if prompt_file is not None and not os.path.isfile(os.path.expanduser(prompt_file)):
        problems.append(("rollout.prompt_file", prompt_file, "no such file"))
    for key, name in (
        ("model.name_or_path", config.model.name_or_path),
        ("data.tokenizer.path", config.data.tokenizer.path),
    ):
        looks_local = name is not None and (name.startswith(("/", ".", "~")) or name.count("/") > 1)
        if looks_local and not os.path.isdir(os.path.expanduser(str(name))):
            problems.append((key, name, "no such folder (a hub name has the form owner/name)"))
    return problems


def _rule_heads_divide_width(config: Config) -> list[Problem]:
    arch = config.model.architecture
    problems: list[Problem] = []
    if arch.hidden_size % (2 * arch.num_attention_heads):
        problems.append(
            (
                "model.architecture.num_attention_heads",
                arch.num_attention_heads,
                f"hidden_size {arch.hidden_size} must be a multiple of twice this (heads of even width)",
            )
        )
    if arch.num_attention_heads % arch.num_key_value_heads:
        problems.append(
            (
                "model.architecture.num_key_value_heads",
                arch.num_key_value_heads,
                f"must divide num_attention_heads {arch.num_attention_heads}",
            )
        )
    return problems


def _rule_batches_divide(config: Config) -> list[Problem]:
    num_microbatches = config.num_ranks * config.train.accumulation_steps
    shape = f"{config.num_ranks} ranks x {config.train.accumulation_steps} accumulation steps = {num_microbatches}"
    problems: list[Problem] = []
    if config.rollout.prompts_per_step % num_microbatches:
        problems.append(
            (
                "rollout.prompts_per_step",
                config.rollout.prompts_per_step,
                f"a group is never split over ranks or micro-batches: must be a multiple of {shape}",
            )
        )
    if config.train.corpus_rows_per_step % num_microbatches:
        problems.append(
            ("train.corpus_rows_per_step", config.train.corpus_rows_per_step, f"must be a multiple of {shape}")
        )
    return problems


def _rule_leases_divide(config: Config) -> list[Problem]:
    rollout = config.rollout
    if rollout.groups_per_lease is None and rollout.prompts_per_step % rollout.workers:
        return [
            (
                "rollout.workers",
                rollout.workers,
                f"must divide rollout.prompts_per_step {rollout.prompts_per_step}, or set rollout.groups_per_lease",
            )
        ]
    if rollout.prompts_per_step % config.groups_per_lease:
        return [
            (
                "rollout.groups_per_lease",
                rollout.groups_per_lease,
                f"must divide rollout.prompts_per_step {rollout.prompts_per_step}",
            )
        ]
    return []


def _rule_prompt_lengths(config: Config) -> list[Problem]:
    rollout = config.rollout
    if rollout.min_prompt_tokens > rollout.max_prompt_tokens:
        return [
            (
                "rollout.min_prompt_tokens",
                rollout.min_prompt_tokens,
                f"must be at most rollout.max_prompt_tokens {rollout.max_prompt_tokens}",
            )
        ]
    return []


def _rule_prompt_variants(config: Config) -> list[Problem]:
    rollout = config.rollout
    if rollout.prompt_variants == 1:
        return []
    problems: list[Problem] = []
    if rollout.prompt_file is None or not rollout.prompt_file.endswith(".jsonl"):
        problems.append(
            (
                "rollout.prompt_variants",
                rollout.prompt_variants,
                'needs a .jsonl rollout.prompt_file with {"prompt": …, "variants": […]} on each line',
            )
        )
    if rollout.responses_per_prompt % rollout.prompt_variants:
        problems.append(
            (
                "rollout.responses_per_prompt",
                rollout.responses_per_prompt,
                f"must be a multiple of rollout.prompt_variants {rollout.prompt_variants}: siblings take turns",
            )
        )
    return problems


def _rule_context(config: Config) -> list[Problem]:
    rollout, length = config.rollout, config.data.sequence_length
    problems: list[Problem] = []
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if longest > length:
        problems.append(
            (
                "rollout.max_new_tokens",
                rollout.max_new_tokens,
                f"prompt + response = {longest} tokens must fit a row: at most data.sequence_length {length}",
            )
        )
    if config.model.name_or_path is None and length > config.model.architecture.max_position_embeddings:
        problems.append(
            (
                "data.sequence_length",
                length,
                "at most model.architecture.max_position_embeddings "
                f"{config.model.architecture.max_position_embeddings}",
            )
        )
    return problems


def _rule_devices(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    if config.model.attention == "flash_attention_2" and (
        config.train.gpus == 0 or config.rollout.gpus_per_worker == 0 or config.model.dtype != "bfloat16"
    ):
        problems.append(
            (
                "model.attention",
                "flash_attention_2",
                "needs train.gpus ≥ 1, rollout.gpus_per_worker ≥ 1 and model.dtype bfloat16; auto picks what fits",
            )
        )
    if config.train.offload_optimizer and config.train.zero_stage == 0:
        problems.append(("train.offload_optimizer", True, "needs train.zero_stage ≥ 1"))
    return problems


def _rule_tensor_parallel(config: Config) -> list[Problem]:
    rollout, num_heads = config.rollout, config.model.architecture.num_attention_heads
    key, num_gpus = "rollout.gpus_per_worker", config.rollout.gpus_per_worker
    if num_gpus < 2:
        return []
    if rollout.engine == "hf":
        return [(key, num_gpus, "engine hf uses one GPU: more workers with one each, or rollout.engine=vllm")]
    if config.model.name_or_path is None and num_heads % num_gpus:
        return [(key, num_gpus, f"must divide model.architecture.num_attention_heads {num_heads}, split over them")]
    return []


def _rule_shared_placement(config: Config) -> list[Problem]:
    rollout, num_gpus = config.rollout, config.train.gpus
    if rollout.placement == "separate":
        return []
    problems: list[Problem] = []
    if rollout.max_policy_age > 0:
        problems.append(
            (
                "rollout.max_policy_age",
                rollout.max_policy_age,
                "must be 0 with rollout.placement shared: ranks and workers take turns, nobody generates ahead",
            )
        )
    key, needed = "rollout.gpus_per_worker", rollout.workers * rollout.gpus_per_worker
    if needed > num_gpus:
        problems.append(
            (
                key,
                rollout.gpus_per_worker,
                f"with rollout.placement shared {rollout.workers} workers need {needed} of the trainer's GPUs, and it "
                f"has {num_gpus}: fewer workers, or more train.gpus (of all nodes)",
            )
        )
    elif needed == 0 and num_gpus > 0:
        problems.append(
            (key, 0, "must be at least 1 with rollout.placement shared: ranks have GPUs. Else set placement=separate")
        )
    return problems


def _rule_fall_back(config: Config) -> list[Problem]:
    rollout = config.rollout
    if rollout.on_mismatch == "fall_back" and rollout.gpus_per_worker > 1:
        return [
            (
                "rollout.on_mismatch",
                "fall_back",
                f"falls back to engine hf, which uses one GPU; rollout.gpus_per_worker is {rollout.gpus_per_worker}: "
                "choose warn or stop",
            )
        ]
    return []


def _rule_deadlines(config: Config) -> list[Problem]:
    rollout, collective = config.rollout.timeout_seconds, config.train.collective_timeout_seconds
    if rollout >= collective:
        return [
            (
                "rollout.timeout_seconds",
                rollout,
                f"must be below train.collective_timeout_seconds {collective:g}: while one rank waits for rollouts, "
                "the others wait for it in a collective",
            )
        ]
    return []


def _rule_raw_embedding(config: Config) -> list[Problem]:
    if config.evaluator.embedding == "raw" and config.objective.embedding_loss_weight > 0:
        return [
            (
                "objective.embedding_loss_weight",
                config.objective.embedding_loss_weight,
                "must be 0 with evaluator.embedding raw: there is no projection to train",
            )
        ]
    return []


def _rule_intrinsic_weights(config: Config) -> list[Problem]:
    weights = config.evaluator.intrinsic.model_dump()
    return [] if any(weights.values()) else [("evaluator.intrinsic", weights, "at least one weight must be above 0")]


def _rule_profile_steps(config: Config) -> list[Problem]:
    steps = config.metrics.profile_steps
    found = None if steps is None else re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
    if steps is not None and not (found and 1 <= int(found[1]) <= int(found[2])):
        return [("metrics.profile_steps", steps, "write A:B, the first and the last step, 1 ≤ A ≤ B, as in 10:13")]
    if found and int(found[2]) > config.train.steps:
        return [("metrics.profile_steps", steps, f"the run ends before: train.steps = {config.train.steps}")]
    return []


def _rule_distinct_principles(config: Config) -> list[Problem]:
    names = config.evaluator.principles
    return [("evaluator.principles", names, "each at most once")] if len(set(names)) < len(names) else []


# --- UDASA ------------------------------------------------------------------------------------------------------
# Sections and fields that a method does not look at: whoever sets one of them expects what will not happen.
UNUSED = {
    "asa": ("udasa",),
    "udasa": (
        "model.architecture", "data.sources", "data.tokenizer", "data.heldout_fraction", "data.max_heldout_rows",
        "data.max_documents", "data.shuffle_buffer_documents", "rollout.placement", "rollout.prompts_per_step",
        "rollout.min_prompt_tokens", "rollout.prompt_variants", "rollout.max_policy_age", "rollout.mismatch_kl_bound",
        "rollout.mismatch_patience_steps", "rollout.on_mismatch", "rollout.max_queue_bytes",
        "rollout.heartbeat_timeout_seconds", "evaluator", "objective", "optimizer.lr_psi", "optimizer.lr_phi",
        "optimizer.lr_xi", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.final_fraction",
        "optimizer.robbins_monro_t0", "optimizer.robbins_monro_power", "train.steps", "train.corpus_rows_per_step",
        "train.eval_every_steps", "metrics.samples_every_steps", "metrics.sample_groups", "metrics.profile_steps",
    ),
}  # fmt: skip


def _rule_used_by_method(config: Config) -> list[Problem]:
    default, problems = type(config)(), []
    for key in UNUSED[config.method]:
        here, usual = (functools.reduce(getattr, key.split("."), of) for of in (config, default))
        if here != usual:
            shown = here.model_dump(exclude_defaults=True) if isinstance(here, BaseModel) else here
            problems.append((key, shown, f"method {config.method} does not use it: leave it out"))
    return problems


def _rule_udasa_needs_model_and_prompts(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    if config.model.name_or_path is None:
        problems.append(("model.name_or_path", None, "method udasa aligns a trained model: folder or hub name"))
    if config.rollout.prompt_file is None:
        problems.append(("rollout.prompt_file", None, "method udasa needs a file of prompts, .txt or .jsonl"))
    return problems


def _rule_thresholds(config: Config) -> list[Problem]:
    curriculum = config.udasa.curriculum
    thresholds = curriculum.thresholds
    if sorted(set(thresholds)) != thresholds:
        return [("udasa.curriculum.thresholds", thresholds, "must be ascending, each once")]
    if curriculum.threshold_kind == "quantile" and any(threshold >= 1 for threshold in thresholds):
        return [("udasa.curriculum.thresholds", thresholds, "quantiles lie between 0 and 1")]
    return []


def _rule_distinct_uncertainties(config: Config) -> list[Problem]:
    names = config.udasa.uncertainties
    return [("udasa.uncertainties", names, "each at most once")] if len(set(names)) < len(names) else []


Rule = Callable[["Config"], list[Problem]]
COMMON_RULES: tuple[Rule, ...] = (
    _rule_used_by_method,
    _rule_files_exist,
    _rule_context,
    _rule_devices,
    _rule_tensor_parallel,
)
RULES: dict[str, tuple[Rule, ...]] = {
    "asa": (
        _rule_one_tokenizer,
        _rule_pretrained_brings_its_tokenizer,
        _rule_sources_have_a_location,
        _rule_heads_divide_width,
        _rule_batches_divide,
        _rule_leases_divide,
        _rule_prompt_lengths,
        _rule_prompt_variants,
        _rule_fall_back,
        _rule_deadlines,
        _rule_shared_placement,
        _rule_raw_embedding,
        _rule_intrinsic_weights,
        _rule_distinct_principles,
        _rule_profile_steps,
    ),
    "udasa": (_rule_udasa_needs_model_and_prompts, _rule_thresholds, _rule_distinct_uncertainties),
}


def broken_rules(config: Config) -> list[Problem]:
    """What contradicts itself in a config whose fields are sound each by itself."""
    return [problem for rule in (*COMMON_RULES, *RULES[config.method]) for problem in rule(config)]

"""The ``udasa`` section of the config: how uncertainty is measured, and the curriculum of DPO that follows from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from asa_dist.config_section import Fraction, PositiveInt, Section


class SemanticConfig(Section):
    encoder: str | None = Field(None, description="sentence encoder, folder or hub name; null = the measured model's own last states, averaged")
    per: Literal["response", "prompt"] = Field("response", description="1 − mean cosine with the siblings, of each response; prompt = their mean for all (equation 2)")


class FactualConfig(Section):
    judge: Literal["self_judge", "nli"] = Field("self_judge", description="the measured model's own yes or no, or an NLI model")
    model: str | None = Field(None, description="NLI model, folder or hub name; its config names the labels")
    question: str = Field("Is this answer true?", description="self_judge: asked behind prompt and response")


class ValueConfig(Section):
    judge: Literal["self_judge", "classifier", "endpoint"] = Field("self_judge", description="the measured model's own yes or no, a safety classifier, or a moderation endpoint")
    model: str | None = Field(None, description="safety classifier, folder or hub name; or the endpoint's model")
    unsafe_label: str | None = Field(None, description="classifier: its label for what is unsafe")
    question: str = Field("Is this answer harmless?", description="self_judge: asked behind prompt and response")
    url: str | None = Field(None, description="endpoint: address of an OpenAI-compatible /moderations")
    api_key_variable: str | None = Field(None, description="endpoint: environment variable that holds the key")
    timeout_seconds: float = Field(30.0, gt=0, description="endpoint: longest wait for an answer")
    requests_per_second: float = Field(5.0, gt=0, description="endpoint: rate limit")
    max_attempts: PositiveInt = Field(6, description="endpoint: tries of one request, with growing pauses")


class CurriculumConfig(Section):
    thresholds: list[Annotated[float, Field(gt=0)]] = Field([0.4, 0.7], description="τ, ascending: K thresholds make K + 1 stages, from clear pairs to doubtful ones; none = one stage")
    threshold_kind: Literal["absolute", "quantile"] = Field("absolute", description="of Δu itself, or of its distribution over the pairs")
    order: Literal["clear_first", "random"] = Field("clear_first", description="of the stages")
    learning_rates: list[Annotated[float, Field(ge=0)]] = Field([3e-6, 5e-6], min_length=1, description="of the first stage, the second, …; the last one stays")
    max_warmup_steps: int = Field(500, ge=0, description="linear warm-up of each stage, at most")
    warmup_fraction: Fraction = Field(0.1, description="linear warm-up, as a share of the stage's planned steps, at most")
    decay_fraction: Fraction = Field(0.1, description="linear decay over the last planned steps, as a share of them")
    max_steps: PositiveInt = Field(3000, description="steps of a stage, at most")
    max_epochs: PositiveInt = Field(1, description="passes over a stage's pairs, at most")
    pairs_per_step: PositiveInt = Field(32, description="pairs per optimizer step, over all ranks, at most")
    heldout_fraction: Fraction = Field(0.1, description="of a stage's pairs, kept for evaluation")
    eval_every_steps: PositiveInt = Field(50, description="held-out loss and margin every N steps of a stage")
    patience: PositiveInt = Field(3, description="evaluations in a row without a lower held-out loss, or without a larger margin, that end a stage")


class DpoConfig(Section):
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="of the margin between chosen and rejected")
    beta: float = Field(0.1, gt=0, description="β, strength of the tie to the reference")
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="share of pairs believed to be the wrong way round")
    length_normalized: bool = Field(False, description="mean instead of sum of token log-probabilities")
    reference: Literal["stage_start", "base"] = Field("stage_start", description="the model before the stage, or before the first one")
    kl_weight: float = Field(0.05, ge=0, description="of the KL penalty to the reference, in the last stage")


class UdasaConfig(Section):
    sampling: Literal["independent", "one_prompt"] = Field("independent", description="N samples of the prompt, or one that asks for N responses and is split (the paper)")
    uncertainties: list[Literal["semantic", "factual", "value"]] = Field(["semantic", "factual", "value"], min_length=1, description="which are measured and fused")
    fusion: Literal["softmax", "mean"] = Field("softmax", description="weights of the uncertainties: equations 5 and 6, or equal ones")
    scorers: PositiveInt = Field(1, description="actors that measure uncertainty, beside the rollout actors")
    gpus_per_scorer: int = Field(0, ge=0, le=1, description="GPUs of each scorer; 0 = CPU")
    scorer_timeout_seconds: float = Field(1800.0, gt=0, description="longest call of a scorer; an endpoint that is down may take minutes to be given up")
    scorer_batch: PositiveInt = Field(32, description="texts that a scorer runs through a model at once")
    prompts: PositiveInt | None = Field(None, description="the first so many prompts of rollout.prompt_file; null = all")
    rounds: PositiveInt = Field(1, description="measure, pair and train so often, each time with the updated model")
    semantic: SemanticConfig = Field(SemanticConfig(), description="spread of the responses")
    factual: FactualConfig = Field(FactualConfig(), description="doubt about what they say")
    value: ValueConfig = Field(ValueConfig(), description="doubt about their harmlessness")
    curriculum: CurriculumConfig = Field(CurriculumConfig(), description="stages of training")
    dpo: DpoConfig = Field(DpoConfig(), description="the preference loss")

"""README.md of an export: what the model is, where it comes from, and what its training does not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asa_dist import __version__
from asa_dist.config_udasa import FactualConfig, UdasaConfig, ValueConfig
from asa_dist.evaluation.checkpoint_model import AsaCheckpoint, CheckpointModel


def asa_card(checkpoint: AsaCheckpoint, dtype: str, evaluator: Mapping[str, Any]) -> str:
    """
    Args:
        evaluator: content of evaluator.json.
    """
    corpus, rollout = (f"{checkpoint.counter(f'tokens/{kind}'):,.0f}" for kind in ("corpus", "rollout"))
    weights = ", ".join(f"{name} {value:.3f}" for name, value in evaluator["omega"].items())
    name_or_path = checkpoint.config.model.name_or_path
    begun = "trained from scratch" if name_or_path is None else f"begun from `{name_or_path}`"
    return f"""{_heading(checkpoint.run_dir.resolve().name, checkpoint.step)}
A causal language model that aligned itself while it learned (ASA-LLM), {begun} by
asa-dist {__version__}: {checkpoint.step:,} steps, {corpus} corpus tokens, {rollout} tokens of its own responses.
{_how_to_load(dtype)}
`evaluator.safetensors` and `evaluator.json` hold the evaluator that came out of the same run; the model does not need
them. At this step: trust τ = {evaluator["tau"]:.3f}; weights ω: {weights}.

**τ is agreement, not truth.** It says how far the learned reward orders a prompt's responses as the measured one does.
Neither of them has seen a fact checked: high rewards and a high τ do not mean that what the model says is true.
"""


def udasa_card(checkpoint: CheckpointModel, dtype: str) -> str:
    """Of a round: its folder is RUN/round-K."""
    config, folder = checkpoint.config, checkpoint.run_dir.resolve()
    steps, tokens = f"{checkpoint.step:,}", f"{checkpoint.counter('tokens/rollout'):,.0f}"
    measured = "\n".join(f"- {line}" for line in _uncertainties(config.udasa))
    return f"""{_heading(f"{folder.parent.name}, {folder.name}", checkpoint.step)}
A causal language model aligned by its own uncertainty (UDASA), begun from `{config.model.name_or_path}` by
asa-dist {__version__}: {steps} steps of preference learning on {tokens} tokens of responses,
all by the model that it began from. Of those to a prompt the least uncertain one was to be preferred to a more
uncertain one.
{_how_to_load(dtype)}
Uncertainty, fused by {config.udasa.fusion}:

{measured}

**Low uncertainty is not truth.** What a model judges of its own responses is agreement with itself, and a classifier's
opinion is no check of a fact: that the model has come to prefer certain answers does not mean that they are true.
"""


def _uncertainties(udasa: UdasaConfig) -> Iterator[str]:
    """A line for each that was measured, with what measured it."""
    named = {
        "semantic": f"spread of the responses to a prompt, by {_model(udasa.semantic.encoder)}",
        "factual": f"doubt about what they say, by {_judge(udasa.factual)}",
        "value": f"doubt about their harmlessness, by {_judge(udasa.value)}",
    }
    for name in udasa.uncertainties:
        yield f"{name}: {named[name]}"


def _judge(estimator: FactualConfig | ValueConfig) -> str:
    if estimator.judge == "self_judge":
        return f'the model\'s own answer to "{estimator.question}"'
    if estimator.judge == "endpoint":
        return f"a moderation endpoint ({estimator.model or 'its own choice of model'})"
    return _model(estimator.model)


def _model(name_or_path: str | None) -> str:
    return "the model's own states" if name_or_path is None else f"`{name_or_path}`"


def _heading(name: str, step: int) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}, step {step}
"""


def _how_to_load(dtype: str) -> str:
    return f"""Weights: {dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
"""

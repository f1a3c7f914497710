"""What the ranks of test_gradients.py run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch

from asa_dist.asa.objective import (
    corpus_loss,
    evaluator_loss,
    generator_loss,
    head_losses,
    importance_weights,
    meta_loss,
    score_groups,
)
from asa_dist.asa.states import pool_states
from asa_dist.runtime import engine as engine_module
from asa_dist.runtime.engine import Placement
from asa_dist.runtime.model import PHI, PSI, XI, named_parts
from tests.distributed import tiny

Gradients = dict[str, np.ndarray]
Outcome = tuple[Gradients, float, np.ndarray]  # see fused_gradients


def fused_gradients(
    placement: Placement, stage: int, accumulation_steps: int, checkpointing: bool = False
) -> Outcome:
    """Of one step of the real engine: gradients by part and name, corpus loss, responses with each token [V]."""
    from deepspeed.utils import safe_get_full_grad

    settings = tiny.config(
        stage, placement.num_ranks, accumulation_steps, model__activation_checkpointing=checkpointing
    )
    engine = tiny.engine(tiny.model(settings), settings, placement)
    seen: Gradients = {}

    def capture(*arguments: Any) -> dict[str, float]:
        for part, name, parameter in named_parts(engine.engine.module):
            seen[f"{part}.{name}"] = safe_get_full_grad(parameter).detach().float().numpy().copy()
        return engine_module_clip(*arguments)

    engine_module_clip = engine_module.clip_by_part
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, accumulation_steps)
    with mock.patch.object(engine_module, "clip_by_part", capture):
        result = engine.train_step(batches, tiny.inputs(), {PSI: 0.0, PHI: 0.0, XI: 0.0})
    corpus = float(engine.sum_over_ranks(result.sums["loss/mle"]))
    responses_with_V = engine.sum_over_ranks(result.sums["responses_with_token"]).numpy()
    engine.engine.destroy()
    return seen, corpus, responses_with_V


def all_stages(placement: Placement, accumulation_steps: int) -> dict[int, Outcome]:
    return {stage: fused_gradients(placement, stage, accumulation_steps) for stage in (0, 1, 2, 3)}


def with_recomputation(placement: Placement) -> dict[int, Outcome]:
    return {3: fused_gradients(placement, 3, 1, checkpointing=True)}


def separate_gradients() -> Gradients:
    """Each loss differentiated on its own, over the whole batch, without DeepSpeed, then added up by part."""
    settings = tiny.config(stage=0)
    model, batch, inputs = tiny.model(settings), tiny.micro_batches(1, 0, 1)[0], tiny.inputs()
    groups, coefficients = batch.groups, inputs.coefficients
    middle_NH, final_NH = model.trunk_states(batch)
    scores = model.token_scores(batch, final_NH)
    states = pool_states(middle_NH, final_NH, inputs.center_H, inputs.scale, groups, "learned")
    heads = model.evaluator(states.evaluator_response_PGH, states.evaluator_claim_CH, groups.content_length_PG > 0)
    scored = score_groups(
        scores,
        states,
        heads,
        model.meta(inputs.progress_F),
        batch,
        inputs,
        settings.evaluator,
        settings.objective,
    )
    weight_N, _ = importance_weights(scores, groups, "token", settings.objective.importance_cap)
    meta = meta_loss(scored, settings.objective.meta_loss, inputs.counts)
    per_part = {
        PSI: [
            (coefficients.alpha, corpus_loss(scores.logprob_N, batch, inputs.counts)),
            (coefficients.beta, generator_loss(scored, scores, weight_N, groups, inputs.counts)),
        ],
        PHI: [
            (coefficients.beta, evaluator_loss(scored, groups, "centred", inputs.counts)),
            (coefficients.gamma, meta),
            (1.0, head_losses(heads, scored, groups, settings.objective, inputs.counts)),
        ],
        XI: [(coefficients.gamma, meta)],
    }
    gradients: Gradients = {}
    parameters = [(part, f"{part}.{name}", parameter) for part, name, parameter in named_parts(model)]
    for part, losses in per_part.items():
        mine = [(name, parameter) for owner, name, parameter in parameters if owner == part]
        for weight, loss in losses:
            found = torch.autograd.grad(loss, [p for _, p in mine], retain_graph=True, allow_unused=True)
            for (name, parameter), gradient in zip(mine, found, strict=True):
                added = weight * gradient.numpy() if gradient is not None else np.zeros(parameter.shape, np.float32)
                gradients[name] = gradients.get(name, 0) + added
    return gradients

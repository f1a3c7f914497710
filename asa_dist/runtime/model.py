"""ASA-LLM's module, one forward: trunk and language-model head (``trunk``), evaluator heads, meta-optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from asa_dist.asa.heads import Evaluator, MetaOptimizer
from asa_dist.asa.objective import FusedOutput, StepInputs, corpus_loss, fused_loss
from asa_dist.asa.packing import GroupTensors, MicroBatch
from asa_dist.asa.rewards import self_reward
from asa_dist.asa.states import pool_states
from asa_dist.config import Config, EvaluatorConfig, ObjectiveConfig
from asa_dist.runtime.trunk import PSI as PSI
from asa_dist.runtime.trunk import ModelError as ModelError
from asa_dist.runtime.trunk import TrunkModel, build_trunk
from asa_dist.runtime.trunk import trunk_config as trunk_config

PHI, XI = "phi", "xi"


class AsaModel(TrunkModel):
    """Generator ψ (``lm``), evaluator φ and meta-optimizer ξ. ``forward`` writes no state. Args: see ``TrunkModel``."""

    def __init__(
        self,
        lm: PreTrainedModel,
        evaluator: EvaluatorConfig,
        objective: ObjectiveConfig,
        chunk_tokens: int,
        temperature: float,
    ):
        super().__init__(lm, chunk_tokens, temperature)
        self._evaluator_config, self._objective_config = evaluator, objective
        embedding_size = evaluator.embedding_size if evaluator.embedding == "learned" else None
        self.evaluator = Evaluator(lm.config.hidden_size, embedding_size, len(evaluator.principles))
        self.meta = MetaOptimizer(evaluator.omega_floor)

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), PHI: self.evaluator, XI: self.meta}

    def forward(self, batch: MicroBatch, inputs: StepInputs) -> FusedOutput:
        """One micro-batch; without groups (evaluation) the corpus loss alone."""
        middle_NH, final_NH = self.trunk_states(batch)
        scores = self.token_scores(batch, final_NH)
        if batch.groups is None:
            mle = corpus_loss(scores.logprob_N, batch, inputs.counts)
            return FusedOutput(mle, {"loss/mle": mle.detach()}, {}, {})
        embedding = self._evaluator_config.embedding
        states = pool_states(middle_NH, final_NH, inputs.center_H, inputs.scale, batch.groups, embedding)
        heads = self.evaluator(
            states.evaluator_response_PGH, states.evaluator_claim_CH, batch.groups.content_length_PG > 0
        )
        return fused_loss(
            batch,
            scores,
            states,
            heads,
            self.meta(inputs.progress_F),
            inputs,
            self._evaluator_config,
            self._objective_config,
        )

    def self_reward(
        self, evaluated: tuple[Any, ...], groups: GroupTensors, terms: Mapping[str, Tensor], omega_3: Tensor
    ) -> Tensor:
        """R_self [P, G] with φ as it is now, of responses that a forward has scored before (to observe, not to train).

        It calls no module, so that ZeRO-3 does not take it for another forward: φ has to be gathered around it.

        Args:
            evaluated: the evaluator's arguments in that forward.
            terms: of that forward's rewards; ψ's share in them is taken over.
            omega_3: ξ's share.
        """
        heads = self.evaluator.forward(*evaluated)
        mean_entropy_PG = terms["uncertainty"] * math.log(self.vocab_size)
        weight = self._evaluator_config.uncertainty_weight
        rewards = self_reward(heads, groups, mean_entropy_PG, self.vocab_size, weight, terms["substance"])
        return rewards.total(omega_3)


# --- building ---------------------------------------------------------------------------------------------------
def build_model(config: Config, vocab_size: int, eos_token_id: int, on_cuda: bool) -> AsaModel:
    """The whole module in float32 on the CPU, the same on every rank: from ``config.seed``, or pretrained.

    Every rank builds it and ``deepspeed.initialize`` partitions it: under ``zero.Init`` transformers' own
    initialisation does not reach partitioned weights.
    """
    lm = build_trunk(config.model, config.seed, vocab_size, eos_token_id, config.data.sequence_length, on_cuda)
    return around_trunk(lm, config)


def around_trunk(lm: PreTrainedModel, config: Config) -> AsaModel:
    """The module as configured, around a trunk that exists (or stands on the meta device)."""
    return AsaModel(
        lm, config.evaluator, config.objective, config.model.logprob_chunk_tokens, config.rollout.temperature
    )


def named_parts(model: TrunkModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) of what is trained; ψ under its transformers names, tied weights once."""
    for part, module in model.parts().items():
        for name, parameter in module.named_parameters():
            yield part, name, parameter


def count_parameters(model: TrunkModel) -> dict[str, int]:
    """Number of parameters of each part."""
    counts = dict.fromkeys(model.parts(), 0)
    for part, _, parameter in named_parts(model):
        counts[part] += parameter.numel()
    return counts

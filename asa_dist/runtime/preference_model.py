"""UDASA's module: the trunk alone, trained by the log-probabilities of chosen and rejected responses."""

from __future__ import annotations

from typing import overload

from torch import Tensor
from transformers import PreTrainedModel

from asa_dist.asa.objective import FusedOutput, sum_per_response
from asa_dist.asa.packing import MicroBatch
from asa_dist.runtime.trunk import TrunkModel
from asa_dist.udasa.objective import PairInputs, preference_loss


class PreferenceModel(TrunkModel):
    """Generator ψ alone. ``forward`` writes no state.

    A pair is a group of two responses, the chosen one first, whose ``Response.logprob_T`` is the reference's.

    Args: see ``TrunkModel``; nothing is sampled, so no temperature.
    """

    def __init__(self, lm: PreTrainedModel, chunk_tokens: int):
        super().__init__(lm, chunk_tokens, temperature=1.0)

    @overload
    def forward(self, batch: MicroBatch, inputs: PairInputs) -> FusedOutput: ...
    @overload
    def forward(self, batch: MicroBatch, inputs: None) -> Tensor: ...
    def forward(self, batch: MicroBatch, inputs: PairInputs | None) -> FusedOutput | Tensor:
        """The preference loss of one micro-batch, which may be without pairs.

        Without ``inputs`` what a reference is asked for: log-probability of every position's target, float32 [N].
        """
        _, final_NH = self.trunk_states(batch)
        logprob_N = self.token_scores(batch, final_NH).logprob_N
        if inputs is None:
            return logprob_N
        groups = batch.responses
        return preference_loss(
            sum_per_response(logprob_N, groups),
            sum_per_response(groups.sampled_logprob_N, groups),
            groups.length_PG,
            inputs.dpo,
            inputs.kl_weight,
            inputs.counts,
        )

"""What `step.py` lets take turns on two ranks: our fused step, plain language-model steps, and the unfused way.

All train the same trunk (the same seed) with the same DeepSpeed engine and optimizer on the same made-up tokens.

Shapes: R rows, T tokens of a row, N = R·T, M tokens that are scored, P groups, G responses of a group, S = P·G,
H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from step_case import EOS, FUSED, GROUP_SIZE, PLAIN, RANKS, SEED, WHOLE, Case
from torch import Tensor, nn
from transformers import PreTrainedModel

from asa_dist.asa.objective import FusedOutput, GlobalCounts, StepCoefficients, StepInputs, corpus_loss
from asa_dist.asa.packing import IGNORED, MicroBatch, TextTables, corpus_batch, join, pack_groups
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.runtime.engine import Placement, TrainEngine, deepspeed_settings
from asa_dist.runtime.model import PHI, PSI, XI, build_model
from asa_dist.runtime.trunk import TrunkModel, build_trunk
from asa_kernels.cpu_linear import linear

RATES = {PSI: 1e-4, PHI: 1e-4, XI: 1e-4}
KL_WEIGHT = 0.1


# --- made-up data -----------------------------------------------------------------------------------------------
def corpus_rows(case: Case, rng: np.random.Generator) -> MicroBatch:
    shape = case.corpus_rows, case.row_tokens
    ids_RT = torch.from_numpy(rng.integers(1, case.vocab_size, shape))
    target_RT = ids_RT.roll(-1, 1)
    target_RT[:, -1] = IGNORED
    return corpus_batch(ids_RT, torch.arange(case.row_tokens).expand(shape).contiguous(), torch.zeros_like(ids_RT),
                        target_RT)


def rollout_rows(case: Case, rng: np.random.Generator) -> MicroBatch:
    """One group a row, without padding; every other response has ended, one token in 16 ends a claim."""
    length = case.row_tokens // GROUP_SIZE
    prompt_tokens = length // 4
    token_V = np.arange(case.vocab_size)
    tables = TextTables(token_V % 16 == 1, token_V % 32 == 1, token_V == EOS)
    groups = []
    for index in range(case.rollout_rows):
        prompt = Prompt(index, 0, rng.integers(1, case.vocab_size, prompt_tokens).astype(np.int32))
        responses = []
        for sibling in range(GROUP_SIZE):
            ids_T = rng.integers(1, case.vocab_size, length - prompt_tokens).astype(np.int32)
            if has_ended := sibling % 2 == 0:
                ids_T[-1] = EOS
            logprob_T = (rng.normal(0, 0.1, len(ids_T)) - math.log(case.vocab_size)).astype(np.float32)
            responses.append(Response(ids_T, logprob_T, logprob_T, has_ended, ((0, 0),)))
        groups.append(RolloutGroup(0, index, prompt, tuple(responses)))
    return pack_groups(groups, case.row_tokens, tables, version=0)


# --- models that are not ours -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PassInputs:
    """Args: advantage_PG: of the responses; None: their tokens are text like any other."""

    counts: GlobalCounts
    advantage_PG: Tensor | None = None


class WholeLogitsHead(nn.Module):
    """The output projection as it is mostly written: all logits at once, kept for the backward pass."""

    def __init__(self, weight_VH: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VH

    def forward(self, hidden_NH: Tensor, target_N: Tensor, is_sampled_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token_M = (target_N != IGNORED).nonzero().squeeze(1)
        loss_M = F.cross_entropy(linear(hidden_NH[token_M], self.weight), target_N[token_M], reduction="none")
        logprob_N = hidden_NH.new_zeros(len(target_N)).index_put((token_M,), -loss_M)
        return logprob_N, logprob_N.detach(), torch.zeros_like(logprob_N)


class LanguageModel(TrunkModel):
    """The trunk alone: mean negative log-probability of text, REINFORCE for responses with an advantage."""

    def __init__(self, lm: PreTrainedModel, chunk_tokens: int, has_whole_logits: bool = False) -> None:
        super().__init__(lm, chunk_tokens, temperature=1.0)
        if has_whole_logits:
            lm.set_output_embeddings(WholeLogitsHead(lm.get_output_embeddings().weight))

    def forward(self, batch: MicroBatch, inputs: PassInputs | None) -> FusedOutput | Tensor:
        """Without inputs the log-probabilities, float32 [N]: what a reference is asked for."""
        _, final_NH = self.trunk_states(batch)
        logprob_N = self.token_scores(batch, final_NH).logprob_N
        if inputs is None:
            return logprob_N
        counts = inputs.counts
        if batch.groups is None:
            loss = corpus_loss(logprob_N, batch, counts)
        elif inputs.advantage_PG is None:
            loss = -logprob_N.sum() / (counts.corpus_tokens + counts.response_tokens)
        else:
            predicts_N = batch.groups.predicts_N
            advantage_N = inputs.advantage_PG.flatten()[predicts_N.clamp(min=0)] * (predicts_N >= 0)
            loss = -(advantage_N * logprob_N).sum() / counts.response_tokens
        return FusedOutput(loss, {"loss/total": loss.detach()}, {}, {})


class RewardModel(TrunkModel):
    """A scalar at the last token of every response, [P, G]."""

    def __init__(self, lm: PreTrainedModel, chunk_tokens: int) -> None:
        super().__init__(lm, chunk_tokens, temperature=1.0)
        self.score = nn.Linear(lm.config.hidden_size, 1)

    def forward(self, batch: MicroBatch) -> Tensor:
        _, final_NH = self.trunk_states(batch)
        groups = batch.responses
        slot_N = torch.where(groups.response_N < 0, groups.num_groups * groups.group_size, groups.response_N)
        last_S = torch.zeros(groups.num_groups * groups.group_size + 1, dtype=torch.int64)
        last_S = last_S.scatter_reduce(0, slot_N, torch.arange(len(slot_N)), "amax")[:-1]
        return self.score(final_NH[last_S]).view(groups.num_groups, groups.group_size)


def frozen(model: TrunkModel, case: Case) -> nn.Module:
    """Without gradients and optimizer; partitioned under ZeRO-3, else whole on every rank."""
    model.requires_grad_(False).eval()
    if case.zero_stage < 3:
        return model
    config = case.config
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_settings(config.train, config.model.dtype, RANKS))
    engine.eval()
    return engine


# --- one step of every variant ----------------------------------------------------------------------------------
def make_step(variant: str, case: Case, placement: Placement) -> Callable[[], float]:
    """One step on this rank's rows; it returns the loss, summed over its micro-batches."""
    config = case.config
    rng = np.random.default_rng([SEED, placement.rank])
    corpus, rollouts = corpus_rows(case, rng), rollout_rows(case, rng)
    batch = join(corpus, rollouts)
    counts = GlobalCounts(*(RANKS * GlobalCounts.of(batch)).tolist())  # as many on every rank
    chunk_tokens = config.model.logprob_chunk_tokens

    def trunk() -> PreTrainedModel:
        return build_trunk(config.model, SEED, case.vocab_size, EOS, case.row_tokens, on_cuda=False)

    def engine(model: TrunkModel, accumulation_steps: int = 1) -> TrainEngine:
        train = config.train.model_copy(update={"accumulation_steps": accumulation_steps})
        return TrainEngine(model, train, config.optimizer, config.model.dtype, placement)

    if variant == FUSED:
        return fused_step(engine(build_model(config, case.vocab_size, EOS, on_cuda=False)), batch, counts, case)
    if variant in (PLAIN, WHOLE):
        plain = engine(LanguageModel(trunk(), chunk_tokens, has_whole_logits=variant == WHOLE))
        return lambda: float(plain.train_step([batch], PassInputs(counts), RATES).sums["loss/total"])  # type: ignore[arg-type]
    policy = engine(LanguageModel(trunk(), chunk_tokens), accumulation_steps=2)
    reward = frozen(RewardModel(trunk(), chunk_tokens), case)
    reference = frozen(LanguageModel(trunk(), chunk_tokens), case)
    return unfused_step(policy, reward, reference, corpus, rollouts, counts)


def fused_step(engine: TrainEngine, batch: MicroBatch, counts: GlobalCounts, case: Case) -> Callable[[], float]:
    inputs = fused_inputs(case, counts)
    return lambda: float(engine.train_step([batch], inputs, RATES).sums["loss/total"])


def fused_inputs(case: Case, counts: GlobalCounts) -> StepInputs:
    return StepInputs(StepCoefficients(alpha=0.5, beta=0.4, gamma=0.1, tau=0.6), counts, torch.zeros(case.hidden_size),
                      1.0, torch.tensor([0.7, 0.1, -0.2, 0.3, 0.05]), torch.ones(case.vocab_size))


def unfused_step(policy: TrainEngine, reward: nn.Module, reference: nn.Module, corpus: MicroBatch,
                 rollouts: MicroBatch, counts: GlobalCounts) -> Callable[[], float]:
    """Reward model, reference, then both trainings as two micro-batches of one update."""
    groups = rollouts.responses

    def step() -> float:
        with torch.no_grad():
            reward_PG = reward(batch=rollouts)
            gap_N = (groups.sampled_logprob_N - reference(batch=rollouts, inputs=None)) * (groups.predicts_N >= 0)
            slot_N = torch.where(groups.predicts_N < 0, reward_PG.numel(), groups.predicts_N)
            gap_PG = torch.zeros(reward_PG.numel() + 1).index_add(0, slot_N, gap_N)[:-1].view_as(reward_PG)
            advantage_PG = reward_PG - KL_WEIGHT * gap_PG
            advantage_PG = advantage_PG - advantage_PG.mean(1, keepdim=True)
        inputs: Any = PassInputs(counts, advantage_PG)
        return float(policy.train_step([corpus, rollouts], inputs, RATES).sums["loss/total"])

    return step

"""What the ranks of test_preferences.py run: three DPO steps of the real engine; and the same with plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from asa_dist.asa.packing import MicroBatch
from asa_dist.config import Config
from asa_dist.config_udasa import DpoConfig
from asa_dist.records import MeasuredResponse, PreferencePair
from asa_dist.runtime import engine as engine_module
from asa_dist.runtime.data.preferences import PreferenceFeed
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PSI, named_parts
from asa_dist.runtime.preference_model import PreferenceModel
from asa_dist.runtime.trunk import build_trunk
from asa_dist.udasa.objective import PairCounts, PairInputs, preference_loss
from tests.asa import worlds
from tests.distributed import tiny

DPO, KL_WEIGHT, LEARNING_RATE = DpoConfig(beta=0.5, label_smoothing=0.1), 0.05, 0.5
STEPS = [[3, 6, 4, 0, 5], [4, 0, 6], [5, 3, 0, 6, 4]]  # prompt ids; the second has fewer pairs than 2 × 2 micro-batches
HELDOUT = [1, 2]
Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """The same on every rank."""

    reference: np.ndarray  # float32, of all tokens by ascending prompt id, chosen responses first
    sums: list[dict[str, float]]  # of each step, then of the held-out pairs
    gradients: Gradients  # of the last step, by name


def pairs() -> list[PreferencePair]:
    """Seven, of odd lengths; one response is cut off, one is end-of-text alone."""
    rng = np.random.default_rng(21)

    def measured(num_content: int, finished: bool = True) -> MeasuredResponse:
        token_ids = worlds.response(rng, worlds.Shape(num_content, finished)).token_ids
        return MeasuredResponse(str(token_ids), token_ids, finished, None, None, None, None)

    made = []
    for prompt_id in range(7):
        prompt = rng.integers(1, worlds.VOCAB, 1 + 2 * prompt_id).astype(np.int32)
        chosen = measured(3 + 4 * prompt_id, finished=prompt_id != 3)
        rejected = measured(0 if prompt_id == 4 else 29 - prompt_id)
        made.append(PreferencePair(prompt_id, str(prompt), prompt, chosen, rejected, 0, 1, 0.5, 0, 7))
    return made


def config(stage: int, num_ranks: int = 1, accumulation_steps: int = 1) -> Config:
    """A large ε makes Adam's update proportional to the gradient: else it would turn rounding errors into steps."""
    return tiny.config(stage, num_ranks, accumulation_steps, optimizer__adam_eps=1.0, optimizer__weight_decay=0.0)


def trunk() -> Any:
    """Weights five times as large as usual, so that no token's distribution is near uniform."""
    settings = tiny.config(stage=0)
    lm = build_trunk(settings.model, settings.seed, worlds.VOCAB, worlds.EOS, tiny.ROW, on_cuda=False)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return lm


def model() -> PreferenceModel:
    return PreferenceModel(trunk(), chunk_tokens=37)


def feed(engine: Any, folder: Path, accumulation_steps: int = 1, rank: int = 0, num_ranks: int = 1) -> PreferenceFeed:
    return PreferenceFeed(
        pairs(), engine, folder, worlds.TABLES, row_length=tiny.ROW, pairs_per_step=5,
        accumulation_steps=accumulation_steps, rank=rank, num_ranks=num_ranks,
    )


def counted(batches: Sequence[MicroBatch], engine: Any) -> PairInputs:
    local = torch.stack([PairCounts.of(batch.responses.length_PG) for batch in batches]).sum(0)
    return PairInputs(PairCounts(*engine.sum_over_ranks(local).tolist()), DPO, KL_WEIGHT)


# --- the real engine --------------------------------------------------------------------------------------------
def both_stages(placement: Placement, accumulation_steps: int, folder: Path) -> dict[int, Outcome]:
    return {stage: dpo_steps(placement, stage, accumulation_steps, folder / str(stage)) for stage in (0, 3)}


def dpo_steps(placement: Placement, stage: int, accumulation_steps: int, folder: Path) -> Outcome:
    settings = config(stage, placement.num_ranks, accumulation_steps)
    engine = TrainEngine(model(), settings.train, settings.optimizer, "float32", placement)
    share = {"accumulation_steps": accumulation_steps, "rank": placement.rank, "num_ranks": placement.num_ranks}
    first, resumed = feed(engine, folder, **share), feed(engine, folder, **share)
    first.compute_reference("stage-0", range(7))
    resumed.load_reference("stage-0", range(7))
    sums, gradients = [], {}
    for number, prompt_ids in enumerate(STEPS):
        batches = (resumed if number else first).train_batches(prompt_ids)
        gradients, result = _captured(engine, batches, counted(batches, engine))
        assert result.gradient_norms.keys() == {PSI} and not result.skipped_because
        sums.append(_over_ranks(engine, result.sums))
    batches = resumed.heldout_batches(HELDOUT)
    sums.append(_over_ranks(engine, engine.evaluate(batches, counted(batches, engine))))
    engine.close()
    return Outcome(load_file(folder / "stage-0.safetensors")["logprob_N"].numpy(), sums, gradients)


def _captured(engine: TrainEngine, batches: Sequence[MicroBatch], inputs: PairInputs) -> tuple[Gradients, Any]:
    """One step, and its gradients before clipping."""
    from deepspeed.utils import safe_get_full_grad

    seen: Gradients = {}
    clip_by_part = engine_module.clip_by_part

    def capture(*arguments: Any) -> Any:
        for _, name, parameter in named_parts(engine.engine.module):
            seen[name] = safe_get_full_grad(parameter).detach().float().numpy().copy()
        return clip_by_part(*arguments)

    with mock.patch.object(engine_module, "clip_by_part", capture):
        return seen, engine.train_step(batches, inputs, {PSI: LEARNING_RATE})


def _over_ranks(engine: TrainEngine, sums: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(engine.sum_over_ranks(value)) for name, value in sums.items()}


# --- plain torch and transformers -------------------------------------------------------------------------------
def token_logprobs(lm: Any, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """Of a response's tokens, [T], by one sequence of its own, without any mask; ``lm`` has its own output layer."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64)).unsqueeze(0)
    logprob_TV = lm(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return logprob_TV.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)


def plain_steps() -> Outcome:
    """The same steps on whole batches."""
    lm, by_id, settings = trunk(), {pair.prompt_id: pair for pair in pairs()}, config(0).optimizer
    optimizer = torch.optim.AdamW(
        lm.parameters(), LEARNING_RATE, (settings.adam_beta1, settings.adam_beta2), settings.adam_eps, weight_decay=0.0
    )

    def scores(prompt_id: int) -> list[Tensor]:
        pair = by_id[prompt_id]
        return [token_logprobs(lm, pair.prompt_token_ids, r.token_ids) for r in (pair.chosen, pair.rejected)]

    with torch.no_grad():
        reference = {prompt_id: scores(prompt_id) for prompt_id in by_id}
    sums, gradients = [], {}
    for prompt_ids in [*STEPS, HELDOUT]:
        logprob_P2 = torch.stack([torch.stack([t.sum() for t in scores(i)]) for i in prompt_ids])
        reference_P2 = torch.stack([torch.stack([t.sum() for t in reference[i]]) for i in prompt_ids])
        length_P2 = torch.tensor([[len(t) for t in reference[i]] for i in prompt_ids])
        counts = PairCounts(*PairCounts.of(length_P2).tolist())
        output = preference_loss(logprob_P2, reference_P2, length_P2, DPO, KL_WEIGHT, counts)
        sums.append({name: float(value) for name, value in output.sums.items()})
        if prompt_ids is not HELDOUT:
            optimizer.zero_grad()
            output.loss.backward()
            gradients = {name: parameter.grad.numpy().copy() for name, parameter in lm.named_parameters()}
            optimizer.step()
    return Outcome(torch.cat([t for i in sorted(reference) for t in reference[i]]).numpy(), sums, gradients)

"""The preference model: what it yields is what plain transformers yields, and no pairs are no obstacle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asa_dist.asa.objective import sum_per_response
from asa_dist.asa.packing import MicroBatch, pack_groups
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.runtime.model import PSI, count_parameters, named_parts
from asa_dist.udasa.objective import PairCounts, PairInputs, preference_loss
from tests.asa import worlds
from tests.distributed import tiny
from tests.distributed.preference_cases import DPO, KL_WEIGHT, model, pairs, token_logprobs, trunk

REFERENCE = -3.0  # log-probability of every token


def batch_of(num_pairs: int) -> MicroBatch:
    groups = []
    for pair in pairs()[:num_pairs]:
        logprobs = [np.full(len(r.token_ids), REFERENCE, np.float32) for r in (pair.chosen, pair.rejected)]
        responses = tuple(
            Response(measured.token_ids, logprob_T, logprob_T, measured.finished, ((0, 0),))
            for measured, logprob_T in zip((pair.chosen, pair.rejected), logprobs, strict=True)
        )
        groups.append(RolloutGroup(0, 0, Prompt(pair.prompt_id, 0, pair.prompt_token_ids), responses))
    return pack_groups(groups, tiny.ROW, worlds.TABLES, version=0, group_size=2)


def test_it_is_the_generator_alone() -> None:
    built = model()
    assert count_parameters(built) == {PSI: sum(parameter.numel() for parameter in built.parameters())}
    assert {name for _, name, _ in named_parts(built)} == {name for name, _ in trunk().named_parameters()}


def test_logprobs_loss_and_gradients_equal_plain_transformers() -> None:
    built, plain, batch = model(), trunk(), batch_of(7)
    counts = PairCounts(pairs=9.0, response_tokens=300.0)  # of more than this micro-batch
    sequences = [(p.prompt_token_ids, r.token_ids) for p in pairs() for r in (p.chosen, p.rejected)]
    logprob_P2 = torch.stack([token_logprobs(plain, *sequence).sum() for sequence in sequences]).view(7, 2)
    length_P2 = torch.tensor([len(response) for _, response in sequences]).view(7, 2)
    with torch.no_grad():
        found_P2 = sum_per_response(built(batch=batch, inputs=None), batch.responses)
    torch.testing.assert_close(found_P2, logprob_P2.detach(), atol=1e-5, rtol=1e-5)

    expected = preference_loss(logprob_P2, REFERENCE * length_P2, length_P2, DPO, KL_WEIGHT, counts)
    found = built(batch=batch, inputs=PairInputs(counts, DPO, KL_WEIGHT))
    assert found.sums.keys() == {"udasa/loss", "udasa/margin", "udasa/accuracy", "udasa/kl"} and not found.maxima
    for name, value in expected.sums.items():
        torch.testing.assert_close(found.sums[name], value, atol=1e-5, rtol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for (_, name, parameter), other in zip(named_parts(built), plain.parameters(), strict=True):
        assert other.grad.abs().max() > 1e-3, f"{name} has no gradient to compare"
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_without_pairs_every_weight_has_a_gradient_of_zeros() -> None:
    """ZeRO-3 needs the same forward and backward on every rank."""
    built, batch = model(), batch_of(0)
    assert batch.input_ids_RT.shape == (1, tiny.ROW) and (batch.segment_RT == -1).all()
    assert batch.responses.content_PGT.shape == (0, 2, 1) and batch.responses.length_PG.dtype == torch.int64
    output = built(batch=batch, inputs=PairInputs(PairCounts(5.0, 90.0), DPO, KL_WEIGHT))
    output.loss.backward()
    assert {name: float(value) for name, value in output.sums.items()} == dict.fromkeys(output.sums, 0.0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in built.parameters())


def test_no_groups_of_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size has to be given"):
        pack_groups([], tiny.ROW, worlds.TABLES, version=0)

"""Packing: every token has its place and its purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from asa_dist.asa.packing import IGNORED, MicroBatch, claim_spans, content_of, corpus_batch, join, pack_groups
from asa_dist.records import Prompt, Response, RolloutGroup
from tests.asa import worlds

ENDS = worlds.TABLES.claim_end_V  # ids 3, 5, 7, 11 end a claim


@pytest.mark.parametrize(
    ("content", "spans"),
    [
        ([], []),
        ([20, 21, 22], []),  # no end
        ([20, 21, 3], [(0, 3)]),
        ([20, 21, 3, 30, 31], [(0, 3)]),  # what follows the last end is no claim
        ([20, 21, 3, 30, 3], [(0, 5)]),  # a short one joins the one before
        ([20, 3, 30, 31, 3], [(0, 5)]),  # a short first one joins the one after
        ([3, 3], []),  # never three tokens
        ([3, 3, 3], [(0, 3)]),
        ([20, 21, 3, 30, 31, 5, 40, 41, 42, 7], [(0, 3), (3, 6), (6, 10)]),
    ],
)
def test_claim_spans(content: list[int], spans: list[tuple[int, int]]) -> None:
    assert claim_spans(np.array(content, dtype=np.int32), ENDS) == spans


def sequences(batch: MicroBatch) -> Iterator[np.ndarray]:
    """Token ids of every segment, in row order."""
    for ids_T, segment_T in zip(batch.input_ids_RT.numpy(), batch.segment_RT.numpy(), strict=True):
        for segment in range(segment_T.max() + 1):
            yield ids_T[segment_T == segment]


def test_siblings_take_turns_at_the_phrasings() -> None:
    prompt = Prompt(0, 0, np.array([1], np.int32), (np.array([2], np.int32), np.array([3], np.int32)))
    assert [prompt.tokens_for(sibling).tolist() for sibling in range(6)] == [[1], [2], [3], [1], [2], [3]]
    alone = Prompt(0, 0, prompt.token_ids)
    assert [alone.tokens_for(sibling).tolist() for sibling in range(3)] == [[1], [1], [1]]


@pytest.mark.parametrize("num_variants", [0, 1])
@pytest.mark.parametrize("row_length", [48, 64, 200])
def test_every_sequence_is_there_once(row_length: int, num_variants: int) -> None:
    groups = worlds.groups(np.random.default_rng(0), 4, num_variants=num_variants)
    batch = pack_groups(groups, row_length, worlds.TABLES, version=3)
    wanted = sorted(
        tuple(np.concatenate([g.prompt.tokens_for(sibling), r.token_ids]))
        for g in groups
        for sibling, r in enumerate(g.responses)
    )
    assert sorted(tuple(ids) for ids in sequences(batch)) == wanted
    used = int((batch.segment_RT >= 0).sum())
    assert batch.input_ids_RT.shape[0] <= 2 * -(-used // row_length), "first-fit decreasing wastes less than half"
    assert batch.groups is not None
    assert batch.groups.age_P.tolist() == [3.0] * len(groups)


@pytest.mark.parametrize("num_variants", [0, 1, 2])
def test_marks_lead_back_to_the_responses(num_variants: int) -> None:
    groups = worlds.groups(np.random.default_rng(1), 6, num_variants=num_variants)
    batch = pack_groups(groups, 64, worlds.TABLES, version=0)
    tensors = batch.groups
    assert tensors is not None
    ids_N, target_N, position_N = (
        batch.input_ids_RT.flatten(),
        batch.target_RT.flatten(),
        batch.position_ids_RT.flatten(),
    )
    for index, (group, response) in enumerate((g, r) for g in groups for r in g.responses):
        assert ids_N[tensors.response_N == index].tolist() == response.token_ids.tolist()
        phrasing = group.prompt.phrasings[index % 6 % (1 + num_variants)]
        assert ids_N[tensors.prompt_N == index].tolist() == phrasing.tolist()
        predicting_N = tensors.predicts_N == index
        assert target_N[predicting_N].tolist() == response.token_ids.tolist()
        assert target_N[tensors.says_N == index].tolist() == content_of(response).tolist()
        np.testing.assert_array_equal(tensors.behaviour_logprob_N[predicting_N].numpy(), response.behaviour_logprob_T)
        np.testing.assert_array_equal(tensors.sampled_logprob_N[predicting_N].numpy(), response.logprob_T)
        here_N = (tensors.prompt_N == index) | (tensors.response_N == index)
        assert position_N[here_N].tolist() == list(range(int(here_N.sum())))
        content = content_of(response)
        spans = claim_spans(content, ENDS) or ([(0, len(content))] if len(content) else [])
        found = [
            ids_N[tensors.claim_N == claim].tolist()
            for claim in (tensors.claim_response_C == index).nonzero().flatten().tolist()
        ]
        assert found == [content[start:end].tolist() for start, end in spans]
    assert (target_N[tensors.predicts_N < 0] == IGNORED).all()


def test_join_keeps_both_parts() -> None:
    rollouts = pack_groups(worlds.groups(np.random.default_rng(2), 2, num_variants=1), 64, worlds.TABLES, version=0)
    ids = torch.arange(128).view(2, 64)
    corpus = corpus_batch(ids, ids % 64, torch.zeros_like(ids), ids + 1)
    both = join(corpus, rollouts)
    assert both.groups is not None and rollouts.groups is not None
    assert torch.equal(both.input_ids_RT, torch.cat([ids, rollouts.input_ids_RT]))
    assert torch.equal(both.groups.predicts_N[128:], rollouts.groups.predicts_N)
    assert torch.equal(both.groups.says_N[128:], rollouts.groups.says_N)
    assert (both.groups.predicts_N[:128] == -1).all() and (both.groups.says_N[:128] == -1).all()
    assert both.is_corpus_RT.sum() == 128
    moved = both.to(torch.device("meta")).groups
    assert moved is not None and moved.says_N.device.type == "meta"


def test_refusals() -> None:
    rng = np.random.default_rng(3)
    prompt = Prompt(0, 0, rng.integers(1, 9, 5).astype(np.int32))
    long = worlds.response(rng, worlds.Shape(60, True))
    with pytest.raises(ValueError, match="66 tokens does not fit a row of 64"):
        pack_groups([RolloutGroup(0, 0, prompt, (long, long))], 64, worlds.TABLES, version=0)
    short: Response = worlds.response(rng, worlds.Shape(4, True))
    with pytest.raises(ValueError, match="unequal size"):
        pack_groups(
            [RolloutGroup(0, 0, prompt, (short, short)), RolloutGroup(0, 1, prompt, (short,))],
            64,
            worlds.TABLES,
            version=0,
        )
    in_two = replace(prompt, variants=(prompt.token_ids,))
    with pytest.raises(ValueError, match=r"unequal numbers of phrasings: \[1, 2\]"):
        pack_groups(
            [RolloutGroup(0, 0, prompt, (short, short)), RolloutGroup(0, 1, in_two, (short, short))],
            64,
            worlds.TABLES,
            version=0,
        )

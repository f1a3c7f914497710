"""The measured signals, each against a slow count; votes; the registry against the config."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from asa_dist.asa.intrinsic import (
    PRINCIPLE_SIGNALS,
    SignalInputs,
    non_repetition,
    self_consistency,
    sibling_votes,
)
from asa_dist.asa.packing import pack_groups
from asa_dist.asa.states import pool_states
from asa_dist.config import EvaluatorConfig
from asa_dist.records import Prompt, RolloutGroup
from tests.asa import worlds


def test_the_config_names_exactly_the_principles_there_are() -> None:
    (choices,) = get_args(EvaluatorConfig.model_fields["principles"].annotation)
    assert set(get_args(choices)) == set(PRINCIPLE_SIGNALS)
    assert set(EvaluatorConfig().principles) == set(PRINCIPLE_SIGNALS)


def test_non_repetition_counts_distinct_trigrams() -> None:
    rng = np.random.default_rng(8)
    contents = [rng.integers(1, 4, length) for length in (0, 1, 2, 3, 4, 9, 30, 41)]
    responses = tuple(worlds.of_tokens(rng, content.astype(np.int32), finished=False) for content in contents)
    batch = pack_groups([RolloutGroup(0, 0, Prompt(0, 0, np.array([1], np.int32)), responses)], 64, worlds.TABLES, 0)
    assert batch.groups is not None
    states_NH = torch.zeros(batch.input_ids_RT.numel(), 2)
    states = pool_states(states_NH, states_NH, torch.zeros(2), 1.0, batch.groups, "learned")
    measured_PG = non_repetition(SignalInputs(batch.groups, states, torch.zeros(1, len(contents))))
    for content, value in zip(contents, measured_PG[0].tolist(), strict=True):
        grams = [tuple(content[i : i + 3]) for i in range(len(content) - 2)]
        assert value == np.float32(len(set(grams)) / len(grams) if grams else 1.0)


# --- siblings' votes ------------------------------------------------------------------------------------------------
def consistency(surety_G: list[float], length_G: list[int], sharpness: float, f1_GG: list[list[float]]) -> list[float]:
    vote_PGG = sibling_votes(torch.tensor([surety_G]), torch.tensor([length_G]), sharpness)
    return self_consistency(torch.tensor([f1_GG]), vote_PGG)[0].tolist()


# the first agrees with the second a little, with the third a lot
F1 = [[1.0, 0.2, 0.8], [0.2, 1.0, 0.0], [0.8, 0.0, 1.0]]


def test_a_sure_sibling_counts_more() -> None:
    assert consistency([-1, -0.5, -1.5], [4, 4, 4], 0.0, F1) == pytest.approx([0.5, 0.1, 0.4])
    odds = np.exp(2.0)  # of the second against the third at sharpness 2
    wanted = (0.2 * odds + 0.8) / (odds + 1)
    assert consistency([-1, -0.5, -1.5], [4, 4, 4], 2.0, F1)[0] == pytest.approx(wanted)
    # only differences count, and nobody votes on himself
    assert consistency([-9, -0.5, -1.5], [4, 4, 4], 2.0, F1)[0] == pytest.approx(wanted)
    assert consistency([-1, -5.5, -6.5], [4, 4, 4], 2.0, F1)[0] == pytest.approx(wanted)


def test_siblings_without_content_have_no_vote() -> None:
    f1_GG = [[1.0, 0.0, 0.8], [0.0] * 3, [0.8, 0.0, 1.0]]
    for sharpness in (0.0, 4.0):
        first, _, third = consistency([-3.0, 0.0, -1.0], [4, 0, 4], sharpness, f1_GG)
        assert (first, third) == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize("sharpness", [0.0, 4.0, 100.0])
def test_a_group_without_content_has_no_consistency(sharpness: float) -> None:
    assert consistency([0.0] * 3, [0] * 3, sharpness, [[0.0] * 3] * 3) == [0.0] * 3
    only_one = [[0.0] * 3, [0.0, 1.0, 0.0], [0.0] * 3]
    assert consistency([0.0, -2.0, 0.0], [0, 5, 0], sharpness, only_one) == [0.0] * 3


def test_beside_a_much_surer_response_the_others_still_vote_on_it() -> None:
    """exp(100 · −7) is 0 in float32 and in float64."""
    first, *_ = consistency([-0.1, -8.0, -7.5], [4, 4, 4], 100.0, F1)
    assert first == pytest.approx(0.8)


def test_a_probability_that_is_not_a_number_is_not_hidden() -> None:
    """It must reach the loss, on which all ranks skip the step together."""
    first, *_ = consistency([-1.0, np.nan, -1.5], [4, 4, 4], 4.0, F1)
    assert np.isnan(first)

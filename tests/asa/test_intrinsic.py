"""The measured signals, each against a slow count, and the registry against the config."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

from asa_dist.asa.intrinsic import PRINCIPLE_SIGNALS, SignalInputs, non_repetition
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

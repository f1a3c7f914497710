"""The three uncertainties and their fusion: the spec's check values, loops in float64, and what cannot be measured."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from asa_dist.config import ConfigError
from asa_dist.config_udasa import SemanticConfig, UdasaConfig
from asa_dist.udasa.uncertainty import (
    NliLabels,
    factual_uncertainty,
    fuse,
    nli_labels,
    self_judge_uncertainty,
    semantic_uncertainty,
    unsafe_label,
    value_uncertainty,
)

Fusion = Literal["softmax", "mean"]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- fusion: (5), (6) -----------------------------------------------------------------------------------------------
def fused_by_loop(values: list[float], fusion: Fusion) -> float:
    weights = [math.exp(value) if fusion == "softmax" else 1.0 for value in values]
    return sum(weight / sum(weights) * value for weight, value in zip(weights, values, strict=True))


@pytest.mark.parametrize(
    ("values", "softmax", "mean"),
    [
        ((0.7, 0.2, 0.1), 0.406518861, 1 / 3),
        ((0.2, 0.8, 0.1), 0.469063407, 1.1 / 3),
        ((0.1, 0.2, 0.7), 0.406518861, 1 / 3),
        ((0.1, 0.1, 0.1), 0.1, 0.1),
    ],
)
def test_fusion_gives_the_check_values(values: tuple[float, ...], softmax: float, mean: float) -> None:
    u_PNK = torch.tensor([[values]], dtype=torch.float64)
    assert fuse(u_PNK, "softmax").item() == pytest.approx(softmax, abs=1e-8)
    assert fuse(u_PNK, "mean").item() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("fusion", get_args(UdasaConfig.model_fields["fusion"].annotation))
@pytest.mark.parametrize("num_measured", [1, 2, 3])
def test_fusion_of_the_uncertainties_that_are_measured(fusion: Fusion, num_measured: int) -> None:
    u_PNK = random_tensor(5, 7, num_measured).sigmoid()
    total_PN = fuse(u_PNK, fusion)
    assert total_PN.dtype == torch.float64
    for p in range(5):
        for n in range(7):
            assert total_PN[p, n].item() == pytest.approx(fused_by_loop(u_PNK[p, n].tolist(), fusion), abs=1e-12)
    if num_measured == 1:
        assert torch.equal(total_PN, u_PNK[..., 0])


@pytest.mark.parametrize("fusion", ["softmax", "mean"])
def test_a_missing_uncertainty_leaves_one_response_without_total(fusion: Fusion) -> None:
    u_PNK = random_tensor(2, 3, 3).sigmoid()
    wanted_PN = fuse(u_PNK, fusion)
    wanted_PN[1, 2] = u_PNK[1, 2, 0] = torch.nan
    torch.testing.assert_close(fuse(u_PNK, fusion), wanted_PN, rtol=0, atol=0, equal_nan=True)


def test_fusion_of_nothing() -> None:
    assert fuse(torch.zeros(0, 5, 3), "softmax").shape == (0, 5)
    with pytest.raises(ValueError, match="K = 0"):
        fuse(torch.zeros(2, 5, 0), "softmax")


# --- semantic: (1), (2) ---------------------------------------------------------------------------------------------
def cosine_by_loop(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))


def semantic_by_loop(embeddings: list[list[float]], says: list[bool]) -> list[float]:
    uncertainties = []
    for i, own in enumerate(embeddings):
        similarity = 0.0
        for j, other in enumerate(embeddings):
            if i != j and says[i] and says[j]:
                similarity += cosine_by_loop(own, other)
        uncertainties.append(1 - similarity / (len(embeddings) - 1))
    return uncertainties


@pytest.mark.parametrize(("num_responses", "size"), [(2, 1), (5, 63), (7, 3)])
@pytest.mark.parametrize("some_empty", [False, True])
def test_semantic_uncertainty_equals_the_loop(num_responses: int, size: int, some_empty: bool) -> None:
    embedding_PND = random_tensor(4, num_responses, size)
    says_PN = random_tensor(4, num_responses, seed=1) > 0 if some_empty else torch.ones(4, num_responses).bool()
    assert some_empty == (not says_PN.all())
    response_PN = semantic_uncertainty(embedding_PND, says_PN, "response")
    prompt_PN = semantic_uncertainty(embedding_PND, says_PN, "prompt")
    assert response_PN.dtype == prompt_PN.dtype == torch.float64
    assert response_PN.shape == prompt_PN.shape == (4, num_responses)
    for p in range(4):
        wanted = semantic_by_loop(embedding_PND[p].tolist(), says_PN[p].tolist())
        assert response_PN[p].tolist() == pytest.approx(wanted, abs=1e-12)
        assert prompt_PN[p].tolist() == pytest.approx([sum(wanted) / num_responses] * num_responses, abs=1e-12)


def test_per_prompt_is_one_minus_the_mean_cosine_of_all_pairs() -> None:
    """Equations (1) and (2) as printed, with their 2/(N(N − 1)) over i < j."""
    embedding_PND = random_tensor(1, 5, 8)
    (embeddings,) = embedding_PND.tolist()
    similarity = sum(cosine_by_loop(embeddings[i], embeddings[j]) for i in range(5) for j in range(i + 1, 5))
    measured_PN = semantic_uncertainty(embedding_PND, torch.ones(1, 5).bool(), "prompt")
    assert measured_PN[0].tolist() == pytest.approx([1 - 2 / (5 * 4) * similarity] * 5, abs=1e-12)


def test_the_config_names_both_kinds() -> None:
    assert get_args(SemanticConfig.model_fields["per"].annotation) == ("response", "prompt")


def test_equal_responses_are_certain_and_opposite_ones_the_contrary() -> None:
    equal_PND = torch.full((1, 5, 3), 0.3)
    says_PN = torch.ones(1, 5).bool()
    assert semantic_uncertainty(equal_PND, says_PN, "response")[0].tolist() == pytest.approx([0.0] * 5, abs=1e-12)
    assert (semantic_uncertainty(equal_PND, says_PN, "response") >= 0).all()
    opposite_PND = torch.tensor([[[2.0, 0.0], [-5.0, 0.0]]])
    assert semantic_uncertainty(opposite_PND, says_PN[:, :2], "response").tolist() == [[2.0, 2.0]]


def test_an_empty_response_is_wholly_uncertain_and_its_row_is_not_read() -> None:
    embedding_PND = torch.ones(1, 3, 4)
    embedding_PND[0, 1] = torch.nan
    says_PN = torch.tensor([[True, False, True]])
    assert semantic_uncertainty(embedding_PND, says_PN, "response")[0].tolist() == pytest.approx([0.5, 1.0, 0.5])
    nobody_PN = torch.zeros(1, 3).bool()
    assert semantic_uncertainty(embedding_PND, nobody_PN, "response").tolist() == [[1.0] * 3]


def test_a_broken_embedding_spoils_its_prompt_alone() -> None:
    embedding_PND = random_tensor(2, 3, 4)
    embedding_PND[0, 1, 2] = torch.nan
    u_PN = semantic_uncertainty(embedding_PND, torch.ones(2, 3).bool(), "response")
    assert u_PN[0].isnan().all() and not u_PN[1].isnan().any()


def test_embeddings_of_low_precision_are_compared_in_float64() -> None:
    embedding_PND = random_tensor(2, 5, 33).bfloat16()
    says_PN = torch.ones(2, 5).bool()
    measured_PN = semantic_uncertainty(embedding_PND, says_PN, "response")
    assert torch.equal(measured_PN, semantic_uncertainty(embedding_PND.double(), says_PN, "response"))


def test_one_response_has_no_siblings() -> None:
    with pytest.raises(ValueError, match="N = 1"):
        semantic_uncertainty(torch.ones(2, 1, 4), torch.ones(2, 1).bool(), "response")
    assert semantic_uncertainty(torch.ones(0, 3, 4), torch.ones(0, 3).bool(), "prompt").shape == (0, 3)


# --- factual: (3) ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("id2label", "labels"),
    [
        ({0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, NliLabels(2, 1, 0)),
        ({0: "contradiction", 1: "entailment", 2: "neutral"}, NliLabels(1, 2, 0)),
        ({0: " Entails", 1: "unrelated", 2: "contradicts", 3: "neutral"}, NliLabels(0, 3, 2)),
    ],
)
def test_nli_labels_are_told_apart(id2label: dict[int, str], labels: NliLabels) -> None:
    assert nli_labels(id2label) == labels


@pytest.mark.parametrize(
    ("id2label", "unclear"),
    [
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, "entail, neutral, contradict"),
        ({0: "entailment", 1: "not_entailment"}, "neutral, contradict"),
        ({0: "entailment", 1: "neutral", 2: "entails", 3: "contradiction"}, "entail"),
        ({}, "entail, neutral, contradict"),
    ],
)
def test_labels_that_cannot_be_told_apart(id2label: dict[int, str], unclear: str) -> None:
    with pytest.raises(ConfigError, match=rf"udasa\.factual\.model.*for {unclear} that is not so.*id2label") as error:
        nli_labels(id2label)
    for name in id2label.values():
        assert name in str(error.value)


def test_factual_uncertainty_is_what_is_not_entailed() -> None:
    logit_SL = random_tensor(9, 4) * 5
    measured_S = factual_uncertainty(logit_SL, NliLabels(entailment=2, neutral=3, contradiction=0))
    assert measured_S.dtype == torch.float64
    for row, measured in zip(logit_SL.tolist(), measured_S.tolist(), strict=True):
        whole = sum(math.exp(logit) for logit in row)
        assert measured == pytest.approx((math.exp(row[3]) + math.exp(row[0])) / whole, abs=1e-12)
    assert factual_uncertainty(torch.zeros(0, 3), NliLabels(0, 1, 2)).shape == (0,)


# --- value: (4) -----------------------------------------------------------------------------------------------------
def test_unsafe_label_by_name() -> None:
    id2label = {0: "safe", 1: "Unsafe", 2: "unsafe_ish"}
    assert unsafe_label(id2label, "unsafe") == 1
    for name, labels in (("toxic", id2label), ("unsafe", {0: "unsafe", 1: "UNSAFE"}), ("unsafe", {})):
        with pytest.raises(ConfigError, match=rf"udasa\.value\.unsafe_label: '{name}' .*{', '.join(labels.values())}"):
            unsafe_label(labels, name)


def test_value_uncertainty_is_the_unsafe_class_probability() -> None:
    logit_SL = random_tensor(9, 3) * 5
    softmax_S = value_uncertainty(logit_SL, 1, independent=False)
    sigmoid_S = value_uncertainty(logit_SL, 1, independent=True)
    assert softmax_S.dtype == sigmoid_S.dtype == torch.float64
    for row, softmax, sigmoid in zip(logit_SL.tolist(), softmax_S.tolist(), sigmoid_S.tolist(), strict=True):
        assert softmax == pytest.approx(math.exp(row[1]) / sum(map(math.exp, row)), abs=1e-12)
        assert sigmoid == pytest.approx(1 / (1 + math.exp(-row[1])), abs=1e-12)


def test_a_single_label_is_not_always_certain() -> None:
    """Its softmax would be 1 for everything."""
    measured_S = value_uncertainty(torch.tensor([[0.0], [math.log(3)]]), 0, independent=False)
    assert measured_S.tolist() == pytest.approx([0.5, 0.75])


# --- self-judge -----------------------------------------------------------------------------------------------------
def test_self_judge_is_the_normalised_probability_of_no() -> None:
    p_yes, p_no = [0.3, 0.01, 0.5, 1e-9], [0.1, 0.04, 0.5, 1e-12]
    measured_S = self_judge_uncertainty(torch.tensor(p_yes).double().log(), torch.tensor(p_no).double().log())
    assert measured_S.dtype == torch.float64
    wanted = [no / (yes + no) for yes, no in zip(p_yes, p_no, strict=True)]
    assert measured_S.tolist() == pytest.approx(wanted, rel=1e-6)


def test_self_judge_of_what_is_hardly_ever_said() -> None:
    """Probabilities of e^−2000 are 0 in float64; their ratio is not lost."""
    yes_S = torch.tensor([-2000.0, -2000.0, -math.inf, -1.0, -math.inf], dtype=torch.float64)
    no_S = torch.tensor([-2000.0 + math.log(3), -math.inf, -3.0, -900.0, -math.inf], dtype=torch.float64)
    *measured, nothing = self_judge_uncertainty(yes_S, no_S).tolist()
    assert measured == pytest.approx([0.75, 0.0, 1.0, 0.0], abs=1e-12)
    assert math.isnan(nothing)

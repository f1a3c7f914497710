"""The pieces of the slow reference, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.asa.reference_parts import (
    average_ranks,
    binary_cross_entropy,
    claims_of,
    spearman,
    token_f1,
    token_weights,
)


@pytest.mark.parametrize(
    ("content", "claims"),
    [
        ("abc.def.", [(0, 4), (4, 8)]),
        ("abc.def", [(0, 4)]),  # the end that has no full stop is no claim
        ("abc..def.", [(0, 5), (5, 9)]),  # short: joins the one before
        ("a.bcd.efg.", [(0, 6), (6, 10)]),  # the first, short: joins the one after
        (".a.bcd.", [(0, 3), (3, 7)]),  # two short ones make a long one
        ("..bcd.", [(0, 6)]),
        ("abcdef", [(0, 6)]),  # none: the whole
        ("a.bcdef", [(0, 7)]),  # none of three tokens: the whole
        ("a", [(0, 1)]),
    ],
)
def test_claims(content: str, claims: list[tuple[int, int]]) -> None:
    assert claims_of([ord(letter) for letter in content], {ord(".")}) == claims


def test_spearman_with_ties() -> None:
    assert average_ranks([0.3, 0.1, 0.3, 0.9]) == [2.5, 1, 2.5, 4]
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert spearman([1, 2, 2, 3], [10, 20, 30, 99]) == pytest.approx(4.5 / math.sqrt(22.5))
    # a textbook's ten pairs (IQ, hours of television): −29/165
    iq = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert spearman([1, 2, 3], [0.5, 0.5, 0.5]) is None
    assert spearman([1, 2, 3], [0.5, 0.501, 0.502]) is None  # std 0.0008


def test_token_f1_counts_repetitions() -> None:
    assert token_f1([7, 7, 2], [7, 2, 2, 2], np.ones(8)) == pytest.approx(4 / 7)
    assert token_f1([7], [], np.ones(8)) == 0


def test_token_f1_weighs_tokens() -> None:
    weight_V = np.array([0, 0, 3, 0, 0, 0, 0, 0.5])
    # of {7, 7, 2} = 4 and {7, 2, 2, 2} = 9.5 they share {7, 2} = 3.5
    assert token_f1([7, 7, 2], [7, 2, 2, 2], weight_V) == pytest.approx(7 / 13.5)
    assert token_f1([7, 2], [2, 7], weight_V * 1e-6) == pytest.approx(1)


def test_token_weights() -> None:
    assert token_weights([], 0.5, 3).tolist() == [1, 1, 1]
    # in every response, in e⁻³ of them, in one of a million
    shares = np.array([1, math.exp(-3), 1e-6])
    assert token_weights([shares], 0.5, 3) == pytest.approx([1e-6, (3 / math.log(1000)) ** 2, 1])
    # three steps, of which the last counts most: (¼ · 0.7 + ½ · 0.4 + 1 · 0.1) / 1.75
    history = [np.array([share]) for share in (0.7, 0.4, 0.1)]
    assert token_weights(history, 0.5, 1) == pytest.approx([(math.log(0.475 / 1.75) / math.log(1000)) ** 2])


def test_binary_cross_entropy_of_saturated_logits() -> None:
    assert binary_cross_entropy(2.0, 0.25) == pytest.approx(
        -0.25 * math.log(1 / (1 + math.exp(-2))) - 0.75 * math.log(1 / (1 + math.exp(2)))
    )
    assert binary_cross_entropy(-1000.0, 1.0) == pytest.approx(1000)

"""token_f1 against counting by hand and against its float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asa_kernels import token_f1, token_f1_reference


def _check(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor) -> None:
    f1_PGG = token_f1(tokens_PGT, lengths_PG, weight_V)
    assert f1_PGG.dtype == torch.float32
    expected = token_f1_reference(tokens_PGT, lengths_PG, weight_V)
    torch.testing.assert_close(f1_PGG.double(), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 3), st.integers(2, 7), st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(num_prompts: int, num_responses: int, num_tokens: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens_PGT = torch.randint(0, vocabulary, (num_prompts, num_responses, num_tokens), generator=generator)
    lengths_PG = torch.randint(0, num_tokens + 1, (num_prompts, num_responses), generator=generator)
    _check(tokens_PGT, lengths_PG, torch.ones(vocabulary))
    _check(tokens_PGT, lengths_PG, 48 * torch.rand(vocabulary, generator=generator) ** 3 + 1e-6)


def test_by_hand() -> None:
    tokens_PGT = torch.tensor([[[7, 7, 2, 0], [7, 2, 2, 2], [5, 0, 0, 0], [0, 0, 0, 0]]])
    lengths_PG = torch.tensor([[3, 4, 1, 0]])
    # {7, 7, 2} and {7, 2, 2, 2} share one 7 and one 2: 2 · 2 / (3 + 4)
    expected = [[1, 4 / 7, 0, 0], [4 / 7, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(token_f1(tokens_PGT, lengths_PG, torch.ones(8)), torch.tensor([expected]))


def test_weights_by_hand() -> None:
    tokens_PGT = torch.tensor([[[7, 2, 7, 0], [2, 7, 2, 2], [2, 5, 7, 5]]])
    weight_V = torch.tensor([9.0, 9.0, 3.0, 9.0, 9.0, 0.25, 9.0, 0.5])
    # {7, 7, 2} = 4, {7, 2, 2, 2} = 9.5 and {2, 5, 5, 7} = 4 share 7 and 2 = 3.5
    expected = [[1, 7 / 13.5, 7 / 8], [7 / 13.5, 1, 7 / 13.5], [7 / 8, 7 / 13.5, 1]]
    torch.testing.assert_close(token_f1(tokens_PGT, torch.tensor([[3, 4, 4]]), weight_V), torch.tensor([expected]))


def test_equal_texts_overlap_fully_whatever_their_tokens_weigh() -> None:
    tokens_PGT = torch.tensor([[[3, 1, 2, 1], [1, 2, 1, 3], [4, 4, 4, 4]]])
    weight_V = torch.tensor([1.0, 1e-6, 1e-6, 1e-6, 48.0])
    expected = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    torch.testing.assert_close(token_f1(tokens_PGT, torch.full((1, 3), 4), weight_V), expected)


def test_padding_is_never_looked_at() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_PGT = torch.randint(0, 5, (2, 3, 6), generator=generator)
    lengths_PG = torch.tensor([[6, 2, 0], [1, 3, 5]])
    weight_V = torch.rand(5, generator=generator) + 0.1
    expected = token_f1(tokens_PGT, lengths_PG, weight_V)
    outside_PGT = torch.arange(6) >= lengths_PG.unsqueeze(-1)
    for padding in (-100, 0, 3, 2**31 - 1):
        assert torch.equal(token_f1(tokens_PGT.masked_fill(outside_PGT, padding), lengths_PG, weight_V), expected)


def test_large_ids_do_not_collide() -> None:
    """(token, repetition) is packed into one integer: neighbouring ids near the end of int32 must stay apart."""
    last = 2**31 - 1
    tokens_PGT = torch.tensor([[[last, last], [last, last - 1], [last - 1, last - 1], [0, 1]]], dtype=torch.int32)
    _check(tokens_PGT, torch.full((1, 4), 2), torch.ones(1).expand(last + 1))  # a view of one number


def test_identical_responses_and_many_repetitions() -> None:
    tokens_PGT = torch.full((1, 3, 501), 4)
    assert torch.equal(token_f1(tokens_PGT, torch.full((1, 3), 501), torch.ones(5)), torch.ones(1, 3, 3))
    _check(tokens_PGT, torch.tensor([[501, 63, 1]]), torch.full((5,), 0.3))


def test_non_contiguous() -> None:
    tokens_PGT = torch.randint(0, 4, (9, 3, 4), generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    lengths_PG = torch.tensor([[9, 0, 1], [3, 2, 8], [5, 5, 5], [1, 9, 9]]).T
    assert not tokens_PGT.is_contiguous()
    assert not lengths_PG.is_contiguous()
    _check(tokens_PGT, lengths_PG, torch.arange(1.0, 9.0)[::2])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    f1_PGG = token_f1(torch.zeros(shape, dtype=torch.long), torch.zeros(shape[:2], dtype=torch.long), torch.ones(1))
    assert f1_PGG.shape == (shape[0], 3, 3)
    assert not f1_PGG.any()


@pytest.mark.parametrize("length", [-1, 5])
def test_impossible_length(length: int) -> None:
    with pytest.raises(ValueError, match="T = 4"):
        token_f1(torch.zeros(1, 2, 4, dtype=torch.long), torch.tensor([[0, length]]), torch.ones(1))

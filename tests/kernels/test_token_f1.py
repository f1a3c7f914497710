"""token_f1 against counting by hand and against its float64 reference, in PyTorch and as a kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asa_kernels import token_f1, token_f1_reference
from asa_kernels.backend import Backend

for_both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def _check(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor | None, backend: Backend) -> None:
    f1_PGG = token_f1(tokens_PGT, lengths_PG, weight_V, backend=backend)
    assert f1_PGG.dtype == torch.float32
    assert torch.equal(f1_PGG.diagonal(dim1=1, dim2=2), (lengths_PG > 0).float())
    expected = token_f1_reference(tokens_PGT, lengths_PG, weight_V)
    torch.testing.assert_close(f1_PGG.double(), expected, rtol=1e-6, atol=1e-6)


def _group(shape: tuple[int, int, int], vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_PGT, lengths_PG, weight_V) at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens_PGT = torch.randint(0, vocabulary, shape, generator=generator)
    lengths_PG = torch.randint(0, shape[2] + 1, shape[:2], generator=generator)
    return tokens_PGT, lengths_PG, 48 * torch.rand(vocabulary, generator=generator) ** 3 + 1e-6


@for_both_backends
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(
    backend: Backend, num_prompts: int, num_responses: int, num_tokens: int, vocabulary: int, seed: int
) -> None:
    tokens_PGT, lengths_PG, weight_V = _group((num_prompts, num_responses, num_tokens), vocabulary, seed)
    _check(tokens_PGT, lengths_PG, None, backend)
    _check(tokens_PGT, lengths_PG, weight_V, backend)


@for_both_backends
def test_by_hand(backend: Backend) -> None:
    tokens_PGT = torch.tensor([[[7, 7, 2, 0], [7, 2, 2, 2], [5, 0, 0, 0], [0, 0, 0, 0]]])
    lengths_PG = torch.tensor([[3, 4, 1, 0]])
    # {7, 7, 2} and {7, 2, 2, 2} share one 7 and one 2: 2 · 2 / (3 + 4)
    expected = torch.tensor([[[1, 4 / 7, 0, 0], [4 / 7, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(token_f1(tokens_PGT, lengths_PG, backend=backend), expected)
    torch.testing.assert_close(token_f1(tokens_PGT, lengths_PG, torch.ones(8), backend=backend), expected)


@for_both_backends
def test_weights_by_hand(backend: Backend) -> None:
    tokens_PGT = torch.tensor([[[7, 2, 7, 0], [2, 7, 2, 2], [2, 5, 7, 5]]])
    lengths_PG = torch.tensor([[3, 4, 4]])
    weight_V = torch.tensor([9.0, 9.0, 3.0, 9.0, 9.0, 0.25, 9.0, 0.5])
    # {7, 7, 2} = 4, {7, 2, 2, 2} = 9.5 and {2, 5, 5, 7} = 4 share 7 and 2 = 3.5
    expected = torch.tensor([[[1, 7 / 13.5, 7 / 8], [7 / 13.5, 1, 7 / 13.5], [7 / 8, 7 / 13.5, 1]]])
    torch.testing.assert_close(token_f1(tokens_PGT, lengths_PG, weight_V, backend=backend), expected)


@for_both_backends
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_equal_texts_overlap_fully_whatever_their_tokens_weigh(backend: Backend, scale: float) -> None:
    tokens_PGT = torch.tensor([[[3, 1, 2, 1], [1, 2, 1, 3], [4, 4, 4, 4]]])
    weight_V = scale * torch.tensor([1.0, 1e-6, 1e-6, 1e-6, 48.0])
    expected = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    torch.testing.assert_close(token_f1(tokens_PGT, torch.full((1, 3), 4), weight_V, backend=backend), expected)


@for_both_backends
def test_padding_is_never_looked_at(backend: Backend) -> None:
    tokens_PGT, _, weight_V = _group((2, 3, 6), vocabulary=5)
    lengths_PG = torch.tensor([[6, 2, 0], [1, 3, 5]])
    expected = token_f1(tokens_PGT, lengths_PG, weight_V, backend=backend)
    outside_PGT = torch.arange(6) >= lengths_PG.unsqueeze(-1)
    for padding in (-100, 0, 3, 2**31 - 1, 2**40):
        padded_PGT = tokens_PGT.masked_fill(outside_PGT, padding)
        assert torch.equal(token_f1(padded_PGT, lengths_PG, weight_V, backend=backend), expected)


@for_both_backends
def test_large_ids_do_not_collide(backend: Backend) -> None:
    """(token, repetition) is packed into one integer: neighbouring ids near the end of int32 must stay apart."""
    last = 2**31 - 1
    tokens_PGT = torch.tensor([[[last, last], [last, last - 1], [last - 1, last - 1], [0, 1]]], dtype=torch.int32)
    weight_V = torch.ones(1).expand(last + 1)  # a view of one number
    _check(tokens_PGT, torch.full((1, 4), 2), weight_V, backend)
    _check(tokens_PGT.long(), torch.full((1, 4), 2), None, backend)


@for_both_backends
def test_identical_responses_and_many_repetitions(backend: Backend) -> None:
    tokens_PGT = torch.full((1, 2, 501), 4)
    assert torch.equal(token_f1(tokens_PGT, torch.full((1, 2), 501), backend=backend), torch.ones(1, 2, 2))
    _check(tokens_PGT, torch.tensor([[501, 63]]), torch.full((5,), 0.3), backend)


@for_both_backends
@pytest.mark.parametrize(("num_responses", "num_tokens"), [(3, 127), (2, 128), (2, 129), (3, 257)])
def test_responses_of_several_blocks(backend: Backend, num_responses: int, num_tokens: int) -> None:
    tokens_PGT, _, weight_V = _group((1, num_responses, num_tokens), vocabulary=7)
    lengths_PG = torch.tensor([[num_tokens, num_tokens // 2, 0]])[:, :num_responses]
    _check(tokens_PGT, lengths_PG, weight_V, backend)
    _check(tokens_PGT.flip(1), lengths_PG.flip(1), None, backend)


@for_both_backends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    tokens_PGT, lengths_PG, weight_V = _group((2, 3, 9), vocabulary=200)
    _check((tokens_PGT + 56).to(dtype), lengths_PG.to(dtype), torch.cat([torch.ones(56), weight_V]), backend)


@for_both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weight_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    tokens_PGT, lengths_PG, weight_V = _group((2, 5, 9), vocabulary=4)
    _check(tokens_PGT, lengths_PG, weight_V.to(dtype), backend)


@for_both_backends
def test_non_contiguous(backend: Backend) -> None:
    tokens_PGT = torch.randint(0, 4, (9, 3, 4), generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    lengths_PG = torch.tensor([[9, 0, 1], [3, 2, 8], [5, 5, 5], [1, 9, 9]]).T
    assert not tokens_PGT.is_contiguous()
    assert not lengths_PG.is_contiguous()
    _check(tokens_PGT, lengths_PG, torch.arange(1.0, 9.0)[::2], backend)


@pytest.mark.usefixtures("addresses_are_free")
@for_both_backends
@pytest.mark.parametrize("far_dimension", [0, 1, 2])
def test_tokens_more_than_two_to_the_31_apart(backend: Backend, far_dimension: int) -> None:
    """The stride fits into 32 bits, an offset does not. It takes 2 GiB of address space, but a few pages of memory."""
    tokens_PGT, lengths_PG, weight_V = _group((3, 3, 3), vocabulary=4)
    strides = [9, 3, 1]
    strides[far_dimension] = 2**30 + 8
    far_PGT = torch.empty_strided((3, 3, 3), strides, dtype=torch.uint8).copy_(tokens_PGT)
    _check(far_PGT, lengths_PG.clamp(min=3), weight_V, backend)


@pytest.mark.usefixtures("addresses_are_free")
@for_both_backends
def test_weights_more_than_two_to_the_31_apart(backend: Backend) -> None:
    tokens_PGT, lengths_PG, weight_V = _group((2, 3, 5), vocabulary=3)
    far_V = torch.empty_strided((3,), (2**30 + 8,), dtype=torch.bfloat16).copy_(weight_V)
    _check(tokens_PGT, lengths_PG, far_V, backend)


@for_both_backends
def test_no_gradient(backend: Backend) -> None:
    tokens_PGT, lengths_PG, weight_V = _group((1, 3, 5), vocabulary=3)
    assert not token_f1(tokens_PGT, lengths_PG, weight_V.requires_grad_(), backend=backend).requires_grad


@for_both_backends
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(backend: Backend, shape: tuple[int, int, int]) -> None:
    tokens_PGT, lengths_PG = torch.zeros(shape, dtype=torch.long), torch.zeros(shape[:2], dtype=torch.long)
    f1_PGG = token_f1(tokens_PGT, lengths_PG, torch.ones(1), backend=backend)
    assert f1_PGG.shape == (shape[0], shape[1], shape[1])
    assert not f1_PGG.any()


@for_both_backends
@pytest.mark.parametrize("length", [-1, 5])
def test_impossible_length(backend: Backend, length: int) -> None:
    tokens_PGT = torch.zeros(1, 2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"lengths_PG must lie in 0 … 4, got .*{length}"):
        token_f1(tokens_PGT, torch.tensor([[0, length]]), backend=backend)


@for_both_backends
@pytest.mark.parametrize("token", [-1, 3])
def test_token_outside_the_vocabulary(backend: Backend, token: int) -> None:
    tokens_PGT = torch.tensor([[[0, token], [token, token]]])
    lengths_PG = torch.tensor([[1, 0]])
    token_f1(tokens_PGT, lengths_PG, torch.ones(3), backend=backend)  # it stands beyond the lengths
    with pytest.raises(ValueError, match=rf"ids in tokens_PGT must lie in 0 … 2, got .*{token}"):
        token_f1(tokens_PGT, lengths_PG + 1, torch.ones(3), backend=backend)


@for_both_backends
def test_an_id_beyond_32_bits(backend: Backend) -> None:
    with pytest.raises(ValueError, match="must lie in 0 … 2147483647, got 0 … 2147483648"):
        token_f1(torch.tensor([[[0, 2**31]]]), torch.tensor([[2]]), backend=backend)


@for_both_backends
def test_lengths_of_another_shape(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"lengths_PG \[1, 3\].*tokens_PGT \[2, 3, 4\]"):
        token_f1(torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), backend=backend)

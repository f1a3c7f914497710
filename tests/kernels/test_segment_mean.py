"""segment_mean against its float64 reference: values and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asa_kernels import segment_mean, segment_mean_reference, segment_means


def _inputs(num_tokens: int, size: int, num_segments: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, size, generator=generator)
    return hidden_NH, torch.randint(-1, num_segments, (num_tokens,), generator=generator)


def _run(
    function: Callable[..., Any], hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int
) -> tuple[Tensor, Tensor]:
    leaf = hidden_NH.detach().requires_grad_()
    pooled_SH = function(leaf, segment_ids_N, num_segments)
    weight_SH = torch.randn(pooled_SH.shape, generator=torch.Generator().manual_seed(99))
    (pooled_SH * weight_SH).sum().backward()
    return pooled_SH.detach(), leaf.grad


def _check(hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int) -> None:
    actual = _run(segment_mean, hidden_NH, segment_ids_N, num_segments)
    expected = _run(segment_mean_reference, hidden_NH.double(), segment_ids_N, num_segments)
    for value, reference in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_tokens", "size", "num_segments"), [(1, 1, 1), (63, 63, 7), (501, 5, 3), (5, 4, 40)])
def test_values_and_gradient_at_odd_sizes(num_tokens: int, size: int, num_segments: int) -> None:
    hidden_NH, segment_ids_N = _inputs(num_tokens, size, num_segments)
    _check(hidden_NH, segment_ids_N, num_segments)
    _check(hidden_NH, segment_ids_N.sort().values, num_segments)
    _check(hidden_NH, segment_ids_N.int(), num_segments)


def test_empty_segment_is_zero_and_tokens_outside_are_not_read() -> None:
    hidden_NH = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 6.0]]).requires_grad_()
    pooled_SH = segment_mean(hidden_NH, torch.tensor([1, -1, 1]), 3)
    assert torch.equal(pooled_SH, torch.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 0.0]]))
    pooled_SH.sum().backward()
    assert torch.equal(hidden_NH.grad, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]))


def test_non_contiguous() -> None:
    hidden_NH, segment_ids_N = _inputs(22, 6, 4)
    _check(hidden_NH.T.contiguous().T, segment_ids_N, 4)
    _check(hidden_NH[::2], segment_ids_N[::2], 4)


def test_several_segmentations_equal_one_at_a_time() -> None:
    hidden_NH, responses_N = _inputs(50, 6, 4)
    _, claims_N = _inputs(50, 6, 11, seed=1)
    leaf = hidden_NH.requires_grad_()
    pooled = segment_means(leaf, ((responses_N, 4), (claims_N, 11)))
    single = [segment_mean(leaf, responses_N, 4), segment_mean(leaf, claims_N, 11)]
    assert all(torch.equal(a, b) for a, b in zip(pooled, single, strict=True))
    (together,) = torch.autograd.grad(sum(p.square().sum() for p in pooled), leaf)
    (separate,) = torch.autograd.grad(sum(p.square().sum() for p in single), leaf)
    torch.testing.assert_close(together, separate)


def test_bfloat16_is_accumulated_in_float32() -> None:
    hidden_NH = torch.full((1001, 1), 1.0).bfloat16()  # a bfloat16 sum would stop at 256
    leaf = hidden_NH.requires_grad_()
    pooled_SH = segment_mean(leaf, torch.zeros(1001, dtype=torch.long), 1)
    assert pooled_SH.dtype == torch.float32
    assert pooled_SH.item() == 1.0
    pooled_SH.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_no_tokens_and_no_segments() -> None:
    assert torch.equal(segment_mean(*_inputs(0, 3, 2), 2), torch.zeros(2, 3))
    hidden_NH, _ = _inputs(4, 3, 2)
    assert segment_mean(hidden_NH, torch.full((4,), -1), 0).shape == (0, 3)


@pytest.mark.parametrize("segment_id", [-2, 3])
def test_ids_out_of_range_are_refused(segment_id: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        segment_mean(torch.ones(2, 2), torch.tensor([0, segment_id]), 3)

"""segment_mean and segment_means against the float64 reference: values and gradient, in PyTorch and in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asa_kernels import segment_mean, segment_mean_reference, segment_means
from asa_kernels.backend import Backend
from asa_kernels.segment_mean import TOKENS_PER_RUN, _backward_kernel, _run_bounds

Segmentations = Sequence[tuple[Tensor, int]]

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def _inputs(
    num_tokens: int, size: int, num_segments: int, seed: int = 0, tokens_per_id: int = 1
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, size, generator=generator)
    ids = torch.randint(-1, num_segments, (num_tokens // tokens_per_id + 1,), generator=generator)
    return hidden_NH, ids.repeat_interleave(tokens_per_id)[:num_tokens]


def _weighted_sum(pooled: Sequence[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return sum((pooled_SH * torch.randn(pooled_SH.shape, generator=generator)).sum() for pooled_SH in pooled)


def _check(
    hidden_NH: Tensor, segmentations: Segmentations, backend: Backend, rtol: float = 1e-5, scale: float = 1.0
) -> None:
    """Values and gradient; ``rtol`` is the gradient's, whose dtype is that of ``hidden_NH``."""
    leaf_NH = hidden_NH.detach().requires_grad_()
    actual = segment_means(leaf_NH, segmentations, backend=backend)
    _weighted_sum(actual).backward()
    leaf64_NH = hidden_NH.detach().double().requires_grad_()
    expected = [segment_mean_reference(leaf64_NH, ids_N, num_segments) for ids_N, num_segments in segmentations]
    # "+ 0": without a token in any segment the reference does not depend on the states at all.
    (_weighted_sum(expected) + 0 * leaf64_NH.sum()).backward()
    for value, reference in zip(actual, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6 * scale)
    assert leaf_NH.grad.dtype == hidden_NH.dtype
    torch.testing.assert_close(leaf_NH.grad.double(), leaf64_NH.grad, rtol=rtol, atol=1e-6)


@both_backends
@pytest.mark.parametrize(
    ("num_tokens", "size", "num_segments", "tokens_per_id"),
    [(1, 1, 1, 1), (63, 63, 7, 1), (501, 5, 3, 37), (5, 4, 40, 1), (21, 500, 3, 5)],
)
def test_values_and_gradient_at_odd_sizes(
    num_tokens: int, size: int, num_segments: int, tokens_per_id: int, backend: Backend
) -> None:
    hidden_NH, segment_ids_N = _inputs(num_tokens, size, num_segments, tokens_per_id=tokens_per_id)
    for ids_N in (segment_ids_N, segment_ids_N.sort().values, segment_ids_N.int()):
        _check(hidden_NH, [(ids_N, num_segments)], backend)


@both_backends
def test_several_segmentations_of_long_and_short_segments(backend: Backend) -> None:
    hidden_NH, responses_N = _inputs(501, 7, 4, tokens_per_id=170)
    _, claims_N = _inputs(501, 7, 11, seed=1, tokens_per_id=29)
    _, prompts_N = _inputs(501, 7, 2, seed=2, tokens_per_id=250)
    _check(hidden_NH, [(responses_N, 4), (claims_N, 11), (prompts_N, 3)], backend)


@both_backends
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.bfloat16, 2**-7),  # Triton's interpreter truncates to bfloat16; GPUs and PyTorch round
        (torch.float16, 2**-11),
        (torch.float64, 1e-5),
    ],
)
def test_other_dtypes(dtype: torch.dtype, rtol: float, backend: Backend) -> None:
    hidden_NH, segment_ids_N = _inputs(40, 300, 3, tokens_per_id=6)
    _check(hidden_NH.to(dtype), [(segment_ids_N, 3), (segment_ids_N.flip(0), 3)], backend, rtol=rtol)


@both_backends
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_values(scale: float, backend: Backend) -> None:
    hidden_NH, segment_ids_N = _inputs(40, 6, 3, tokens_per_id=6)
    _check(hidden_NH * scale, [(segment_ids_N, 3)], backend, scale=scale)


@both_backends
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject, backend: Backend) -> None:
    num_tokens = data.draw(st.integers(0, 12), "tokens")
    segmentations = []
    for num_segments in data.draw(st.lists(st.integers(0, 5), max_size=3), "segments"):
        ids = st.lists(st.integers(-1, num_segments - 1), min_size=num_tokens, max_size=num_tokens)
        segmentations.append((torch.tensor(data.draw(ids, "ids"), dtype=torch.long), num_segments))
    hidden_NH, _ = _inputs(num_tokens, data.draw(st.integers(1, 9), "size"), 1)
    if segmentations:
        _check(hidden_NH, segmentations, backend)
    else:
        assert segment_means(hidden_NH, segmentations, backend=backend) == ()


@both_backends
def test_empty_segment_is_zero_and_tokens_outside_are_not_read(backend: Backend) -> None:
    hidden_NH = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 6.0]]).requires_grad_()
    pooled_SH = segment_mean(hidden_NH, torch.tensor([1, -1, 1]), 3, backend=backend)
    assert torch.equal(pooled_SH, torch.tensor([[0.0, 0.0], [2.0, 4.0], [0.0, 0.0]]))
    pooled_SH.sum().backward()
    assert torch.equal(hidden_NH.grad, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]))


@both_backends
def test_gradient_of_an_empty_segment_reaches_no_token(backend: Backend) -> None:
    hidden_NH = torch.ones(3, 2).requires_grad_()
    pooled_SH = segment_mean(hidden_NH, torch.tensor([1, -1, 1]), 3, backend=backend)
    pooled_SH.backward(torch.tensor([[torch.nan] * 2, [4.0] * 2, [torch.nan] * 2]))
    assert torch.equal(hidden_NH.grad, torch.tensor([[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]))


@both_backends
def test_non_contiguous(backend: Backend) -> None:
    hidden_NH, segment_ids_N = _inputs(22, 6, 4)
    _check(hidden_NH.T.contiguous().T, [(segment_ids_N, 4)], backend)
    _check(hidden_NH[::2, 1:4], [(segment_ids_N[::2], 4)], backend)


@pytest.mark.usefixtures("addresses_are_free")
def test_offsets_past_2_to_the_31_elements() -> None:
    # 4 GB of addresses, of which only the pages of the three rows become memory. The stride itself fits into 32 bits.
    hidden_NH = torch.empty_strided((3, 3), (2**30 + 8, 1), dtype=torch.bfloat16)
    for row in range(3):
        hidden_NH[row] = row
    pooled_SH = segment_mean(hidden_NH, torch.tensor([0, 1, 1]), 2, backend="triton")
    assert torch.equal(pooled_SH, torch.tensor([[0.0] * 3, [1.5] * 3]))


@pytest.mark.usefixtures("addresses_are_free")
def test_gradient_offsets_past_2_to_the_31_elements() -> None:
    size = 2**30 + 8  # of a row, of which the one block of columns that runs covers 4
    d_pooled_SH = torch.empty_strided((3, 4), (size, 1))
    d_pooled_SH[:] = torch.arange(1.0, 13.0).reshape(3, 4)
    d_hidden_NH = torch.empty_strided((4, 4), (size, 1), dtype=torch.bfloat16)
    segment_RK, bound = torch.tensor([[0], [2], [1]]), torch.tensor([0, 1, 3, 4])
    count_S = torch.tensor([1.0, 1.0, 2.0])
    _backward_kernel[(3, 1)](d_pooled_SH, count_S, segment_RK, bound, d_hidden_NH, 1, size, BLOCK_N=2, BLOCK_H=4)
    expected_SH = d_pooled_SH / count_S.unsqueeze(1)
    assert torch.equal(d_hidden_NH, expected_SH[[0, 2, 2, 1]].bfloat16())


@both_backends
def test_several_segmentations_equal_one_at_a_time(backend: Backend) -> None:
    hidden_NH, responses_N = _inputs(50, 6, 4)
    _, claims_N = _inputs(50, 6, 11, seed=1)
    leaf_NH = hidden_NH.requires_grad_()
    segmentations = ((responses_N, 4), (claims_N, 11))
    pooled = segment_means(leaf_NH, segmentations, backend=backend)
    single = tuple(segment_mean(leaf_NH, *ids_and_count, backend=backend) for ids_and_count in segmentations)
    torch.testing.assert_close(pooled, single)
    (together_NH,) = torch.autograd.grad(sum(p.square().sum() for p in pooled), leaf_NH)
    (separate_NH,) = torch.autograd.grad(sum(p.square().sum() for p in single), leaf_NH)
    torch.testing.assert_close(together_NH, separate_NH)


def test_one_run_wherever_no_id_changes() -> None:
    responses_N = torch.tensor([0] * (TOKENS_PER_RUN + 9) + [1] * 5 + [-1] * 6)
    claims_N = torch.tensor([0] * 4 + [1] * (TOKENS_PER_RUN + 10) + [-1] * 6)
    bound = _run_bounds(torch.stack([responses_N, claims_N], dim=1))
    assert (bound - TOKENS_PER_RUN).tolist() == [-TOKENS_PER_RUN, 4 - TOKENS_PER_RUN, 0, 9, 14, 20]


@both_backends
def test_low_precision_is_accumulated_in_float32(backend: Backend) -> None:
    leaf_NH = torch.full((1001, 1), 1.0).bfloat16().requires_grad_()  # a bfloat16 sum would stop at 256
    pooled_SH = segment_mean(leaf_NH, torch.zeros(1001, dtype=torch.long), 1, backend=backend)
    assert pooled_SH.dtype == torch.float32
    assert pooled_SH.item() == 1.0
    pooled_SH.sum().backward()
    assert leaf_NH.grad.dtype == torch.bfloat16


@both_backends
def test_no_tokens_and_no_segments(backend: Backend) -> None:
    assert torch.equal(segment_mean(*_inputs(0, 3, 2), 2, backend=backend), torch.zeros(2, 3))
    hidden_NH, _ = _inputs(4, 3, 2)
    leaf_NH = hidden_NH.requires_grad_()
    pooled_SH = segment_mean(leaf_NH, torch.full((4,), -1), 0, backend=backend)
    assert pooled_SH.shape == (0, 3)
    pooled_SH.sum().backward()
    assert torch.equal(leaf_NH.grad, torch.zeros(4, 3))


@both_backends
@pytest.mark.parametrize("segment_id", [-2, 3])
def test_ids_out_of_range_are_refused(segment_id: int, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        segment_mean(torch.ones(2, 2), torch.tensor([0, segment_id]), 3, backend=backend)


@both_backends
def test_another_number_of_ids_than_tokens_is_refused(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=r"segment ids \[3\]: 2 tokens need one id each"):
        segment_mean(torch.ones(2, 2), torch.tensor([0, 1, 1]), 2, backend=backend)

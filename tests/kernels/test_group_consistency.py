"""group_consistency against its float64 reference: values and every gradient, through every output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asa_kernels import group_consistency, group_consistency_reference

NAMES = ("consistency", "cosine", "indicator", "d_embedding", "d_w_left", "d_w_right", "d_bias")


@pytest.fixture(params=["torch", "triton"])
def operation(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, ...]]:
    return partial(group_consistency, return_indicator=True, backend=request.param)


def _inputs(num_prompts: int, num_responses: int, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_prompts, num_responses, size), (size,), (size,), ())
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _run(function: Callable[..., Any], inputs: tuple[Tensor, ...], valid_PG: Tensor | None = None) -> list[Tensor]:
    """Outputs, then the gradients of a random weighting of all three outputs by every input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves, valid_PG)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [*(output.detach() for output in outputs), *gradients]


def _check(
    operation: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    valid_PG: Tensor | None = None,
    tolerance: float = 2e-5,
) -> None:
    actual = _run(operation, inputs, valid_PG)
    expected = _run(group_consistency_reference, tuple(tensor.double() for tensor in inputs), valid_PG)
    for value, dtype in zip(actual, [torch.float32] * 3 + [tensor.dtype for tensor in inputs], strict=True):
        assert value.dtype == dtype
    for name, value, reference in zip(NAMES, actual, expected, strict=True):
        rounding = 2 * torch.finfo(value.dtype).eps  # of a gradient in a low precision
        torch.testing.assert_close(
            value.double(),
            reference,
            rtol=max(tolerance, rounding),
            atol=max(tolerance, rounding if value.dtype == torch.float16 else 0),
            msg=lambda m, n=name: f"{n}: {m}",
        )


# One program's tile holds 16, 32 or 64 responses and up to 256 of D; a chunk at least 4 prompts: sizes around those.
@pytest.mark.parametrize(
    ("num_prompts", "num_responses", "size"),
    [(1, 2, 1), (2, 3, 63), (1, 5, 500), (3, 7, 8), (11, 4, 5), (2, 16, 16), (1, 17, 130), (1, 33, 9)],
)
def test_values_and_gradients_at_odd_sizes(
    operation: Callable[..., tuple[Tensor, ...]], num_prompts: int, num_responses: int, size: int
) -> None:
    _check(operation, _inputs(num_prompts, num_responses, size))


def test_chunks_of_more_prompts_than_the_fewest(
    operation: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("asa_kernels.group_consistency"), "_MAX_CHUNK_PROGRAMS", 2)
    _check(operation, _inputs(11, 3, 5))  # a chunk of 6 and one of 5


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(1, 70)),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share_valid=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_shape_mask_and_dtype(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype, share_valid: float
) -> None:
    inputs = tuple(tensor.to(dtype) for tensor in _inputs(*shape, seed=seed))
    valid_PG = torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed)) < share_valid
    for backend in ("torch", "triton"):
        _check(partial(group_consistency, return_indicator=True, backend=backend), inputs, valid_PG)


@pytest.mark.parametrize("chosen", range(3))
def test_gradients_of_each_output_alone(operation: Callable[..., tuple[Tensor, ...]], chosen: int) -> None:
    inputs = _inputs(2, 3, 5)

    def gradients(function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        function(*leaves)[chosen].square().sum().backward()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    expected = gradients(group_consistency_reference, torch.float64)
    for value, reference in zip(gradients(operation, torch.float32), expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("needed", [{0}, {1}, {2}, {3}, {0, 3}])
def test_only_the_gradients_that_are_needed(operation: Callable[..., tuple[Tensor, ...]], needed: set[int]) -> None:
    inputs = _inputs(5, 3, 5)
    expected = _run(operation, inputs)[3:]
    leaves = [tensor.clone().requires_grad_(i in needed) for i, tensor in enumerate(inputs)]
    outputs = operation(*leaves)
    generator = torch.Generator().manual_seed(99)  # the weights of _run
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    for i, (leaf, reference) in enumerate(zip(leaves, expected, strict=True)):
        assert torch.equal(leaf.grad, reference) if i in needed else leaf.grad is None


def test_the_indicator_is_only_returned_on_request(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    inputs = _inputs(2, 3, 5)
    with_indicator = operation(*inputs)
    without = operation(*inputs, return_indicator=False)
    assert len(with_indicator) == 3 and len(without) == 2
    assert all(torch.equal(a, b) for a, b in zip(without, with_indicator[:2], strict=True))


def test_invalid_responses_count_as_zero_vectors(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    valid_PG = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
    inputs = _inputs(3, 4, 9)
    _check(operation, inputs, valid_PG)
    consistency_PG, cosine_PGG, _ = operation(*inputs, valid_PG)
    assert (consistency_PG[~valid_PG] == 0).all()
    assert consistency_PG[1, 3] == 0  # no valid sibling
    assert not cosine_PGG[~valid_PG].any()
    assert not cosine_PGG.mT[~valid_PG].any()


def test_nan_in_an_invalid_response_stays_there(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    valid_PG = torch.tensor([[True, False, True]])
    inputs = _inputs(1, 3, 5)
    clean = _run(operation, inputs, valid_PG)
    inputs[0][0, 1] = torch.nan
    for value, reference in zip(_run(operation, inputs, valid_PG), clean, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter: 0 · ∞ of the siblings
def test_no_gradient_of_an_invalid_response_whatever_arrives(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    valid_PG = torch.tensor([[True, False, True, True], [True] * 4])
    masked_PGG = ~(valid_PG.unsqueeze(-1) & valid_PG.unsqueeze(-2))
    embedding_PGD, *others = _inputs(2, 4, 5)
    outputs = operation(embedding_PGD.requires_grad_(), *others, valid_PG)
    arriving = [torch.ones_like(output).masked_fill(masked_PGG, torch.inf) for output in outputs[1:]]
    torch.autograd.backward(outputs, [torch.where(valid_PG, 1.0, torch.nan), *arriving])
    assert (embedding_PGD.grad[~valid_PG] == 0).all()
    assert embedding_PGD.grad[1].isfinite().all()
    assert embedding_PGD.grad[1].any()


def test_divisor_is_always_the_number_of_siblings(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    embedding_PGD = torch.ones(1, 4, 3)
    zeros_D = torch.zeros(3)
    valid_PG = torch.tensor([[True, True, False, False]])
    consistency_PG, _, _ = operation(embedding_PGD, zeros_D, zeros_D, torch.zeros(1), valid_PG)
    torch.testing.assert_close(consistency_PG, torch.tensor([[0.5 / 3, 0.5 / 3, 0, 0]]))


def test_identical_and_zero_vectors(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    inputs = _inputs(1, 4, 7)
    inputs[0][0, 1] = inputs[0][0, 0]
    inputs[0][0, 3] = 0
    _check(operation, inputs)
    _, cosine_PGG, _ = operation(*inputs)
    assert cosine_PGG[0, 0, 1] == pytest.approx(1.0, abs=1e-6)
    assert (cosine_PGG[0, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e30, 1e30), (1e-30, 1e30)])
def test_cosine_of_tiny_and_huge_vectors(
    operation: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, scales: tuple[float, float]
) -> None:
    embedding_PGD, _, _, bias = _inputs(1, 4, 16)
    embedding_PGD = (embedding_PGD * torch.tensor(scales).repeat(2)[:, None]).to(dtype)
    zeros_D = torch.zeros(16)
    weight_PGG = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for function, leaf in ((operation, embedding_PGD), (group_consistency_reference, embedding_PGD.double())):
        leaf = leaf.detach().requires_grad_()
        _, cosine_PGG, _ = function(leaf, zeros_D.to(leaf.dtype), zeros_D.to(leaf.dtype), bias.to(leaf.dtype))
        (cosine_PGG * weight_PGG).sum().backward()
        results.append((cosine_PGG.detach(), leaf.grad))
    (cosine_PGG, d_embedding_PGD), (expected_cosine_PGG, expected_d_embedding_PGD) = results
    torch.testing.assert_close(cosine_PGG.double(), expected_cosine_PGG, rtol=1e-5, atol=1e-5)
    fits_PGD = expected_d_embedding_PGD.abs() < torch.finfo(dtype).max  # d cos / d e grows as 1 / |e|
    assert fits_PGD.any()
    torch.testing.assert_close(
        d_embedding_PGD[fits_PGD].double(),
        expected_d_embedding_PGD[fits_PGD],
        rtol=max(1e-4, 2 * torch.finfo(dtype).eps),
        atol=1e-5 * expected_d_embedding_PGD.abs().min().item(),
    )


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (1e-20, 1e20)), (torch.float16, (6e-8, 6e4))])
@pytest.mark.parametrize("flip", [False, True])
def test_values_that_grow_or_shrink_along_a_row(
    operation: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, sizes: tuple[float, float], flip: bool
) -> None:
    """The kernel learns a row's scale while it sums; each row grows at another place, far from the others."""
    embedding_PGD, _, _, bias = _inputs(1, 3, 400)
    for response, place in enumerate((130, 260, 399)):
        embedding_PGD[0, response] = embedding_PGD[0, response].clamp(-1, 1)
        embedding_PGD[0, response, :place] *= sizes[0]
        embedding_PGD[0, response, place:] *= sizes[1]
    embedding_PGD = (embedding_PGD.flip(-1) if flip else embedding_PGD).to(dtype)
    zeros_D = torch.zeros(400)
    _, cosine_PGG, _ = operation(embedding_PGD, zeros_D, zeros_D, bias)
    _, expected, _ = group_consistency_reference(
        embedding_PGD.double(), zeros_D.double(), zeros_D.double(), bias.double()
    )
    torch.testing.assert_close(cosine_PGG.double(), expected, rtol=1e-5, atol=1e-5)


def test_non_contiguous_and_one_element_bias(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    embedding_PDG, *_, bias = _inputs(5, 4, 3)
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    strided = (embedding_PDG.mT, weights[:, 0], weights[:, 1], bias.reshape(1))
    assert not strided[0].is_contiguous()
    _check(operation, strided)
    _check(operation, (embedding_PDG.transpose(0, 1), *_inputs(4, 5, 3)[1:]))  # rows in one piece, in another order


@pytest.mark.usefixtures("addresses_are_free")
@pytest.mark.parametrize("strides", [(2**30 + 8, 16, 1), (16, 2**30 + 8, 1)])
def test_offsets_beyond_32_bits(operation: Callable[..., tuple[Tensor, ...]], strides: tuple[int, int, int]) -> None:
    """The last prompt, or response, lies more than 2³¹ elements after the first; pages between are never touched."""
    *_, w_left_D, w_right_D, bias = _inputs(3, 3, 16)
    near_PGD = _inputs(3, 3, 16)[0].bfloat16()
    far_PGD = torch.empty_strided((3, 3, 16), strides, dtype=torch.bfloat16).copy_(near_PGD)
    assert 2 * max(far_PGD.stride()) > 2**31
    expected = _run(operation, (near_PGD, w_left_D, w_right_D, bias))
    for value, reference in zip(_run(operation, (far_PGD, w_left_D, w_right_D, bias)), expected, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(operation: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    inputs = tuple(tensor.to(dtype) for tensor in _inputs(2, 3, 133))
    _check(operation, inputs)
    _check(operation, (inputs[0], *_inputs(2, 3, 133)[1:]))  # weights in float32


def test_the_same_bits_every_time(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    inputs = _inputs(9, 3, 70)
    for value, again in zip(_run(operation, inputs), _run(operation, inputs), strict=True):
        assert torch.equal(value, again)


def test_empty_batch_has_empty_outputs_and_zero_gradients(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    consistency_PG, *_, d_w_left_D, d_w_right_D, d_bias = _run(operation, _inputs(0, 3, 4))
    assert consistency_PG.shape == (0, 3)
    for gradient in (d_w_left_D, d_w_right_D, d_bias):
        assert not gradient.any()


def test_a_single_response_has_no_siblings(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    with pytest.raises(ValueError, match="G = 1"):
        operation(*_inputs(1, 1, 4))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.ones(3, 4), r"embedding_PGD must be \[P, G, D ≥ 1\], not \[3, 4\]"),
        (0, torch.ones(2, 3, 0), r"D ≥ 1"),
        (1, torch.ones(5), r"w_left_D must be \[D = 4\].*not \[5\]"),
        (2, torch.ones(4, 1), r"w_right_D must be \[D = 4\].*not \[4, 1\]"),
        (3, torch.ones(2), r"bias must be one number, not \[2\]"),
        (4, torch.ones(2, 2, dtype=torch.bool), r"valid_PG must be bool, \[P, G\] = \[2, 3\], not .*\[2, 2\]"),
        (4, torch.ones(2, 3), "not torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(
    operation: Callable[..., tuple[Tensor, ...]], position: int, wrong: Tensor, message: str
) -> None:
    arguments = [*_inputs(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        operation(*arguments)


def test_groups_too_large_for_the_kernels() -> None:
    inputs = _inputs(1, 65, 3)
    with pytest.raises(ValueError, match="G ≤ 64, not 65"):
        group_consistency(*inputs, backend="triton")
    consistency_PG, _ = group_consistency(*inputs, backend="auto")
    torch.testing.assert_close(consistency_PG, group_consistency_reference(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_the_concatenation_is_never_built(operation: Callable[..., tuple[Tensor, ...]]) -> None:
    """Nothing kept for the backward pass is larger than the embedding itself (here much larger than [P, G, G])."""
    inputs = [tensor.requires_grad_() for tensor in _inputs(2, 8, 256)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        operation(*inputs)
    assert max(kept) == inputs[0].numel()

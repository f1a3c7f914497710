"""group_consistency against its float64 reference: values and every gradient, through every output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asa_kernels import group_consistency, group_consistency_reference


def _inputs(num_prompts: int, num_responses: int, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_prompts, num_responses, size), (size,), (size,), ())
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _run(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], valid_PG: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs, then the gradients of a random weighting of all three outputs by every input."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    outputs = function(*leaves, valid_PG)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return [tensor.detach() for tensor in (*outputs, *(leaf.grad for leaf in leaves))]


def _check(inputs: tuple[Tensor, ...], valid_PG: Tensor | None = None) -> None:
    actual = _run(group_consistency, inputs, valid_PG, torch.float32)
    expected = _run(group_consistency_reference, inputs, valid_PG, torch.float64)
    names = ("consistency", "cosine", "indicator", "d_embedding", "d_w_left", "d_w_right", "d_bias")
    for name, value, reference in zip(names, actual, expected, strict=True):
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("num_prompts", "num_responses", "size"), [(1, 2, 1), (2, 3, 63), (1, 5, 500), (3, 7, 8)])
def test_values_and_gradients_at_odd_sizes(num_prompts: int, num_responses: int, size: int) -> None:
    _check(_inputs(num_prompts, num_responses, size))


def test_invalid_responses_count_as_zero_vectors() -> None:
    valid_PG = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
    inputs = _inputs(3, 4, 9)
    _check(inputs, valid_PG)
    consistency_PG, cosine_PGG, _ = group_consistency(*inputs, valid_PG)
    assert (consistency_PG[~valid_PG] == 0).all()
    assert consistency_PG[1, 3] == 0  # no valid sibling
    assert not cosine_PGG[~valid_PG].any()
    assert not cosine_PGG.mT[~valid_PG].any()


def test_nan_in_an_invalid_response_stays_there() -> None:
    valid_PG = torch.tensor([[True, False, True]])
    inputs = _inputs(1, 3, 5)
    clean = _run(group_consistency, inputs, valid_PG, torch.float32)
    inputs[0][0, 1] = torch.nan
    for value, reference in zip(_run(group_consistency, inputs, valid_PG, torch.float32), clean, strict=True):
        assert torch.equal(value, reference)


def test_divisor_is_always_the_number_of_siblings() -> None:
    embedding_PGD = torch.ones(1, 4, 3)
    zeros_D = torch.zeros(3)
    valid_PG = torch.tensor([[True, True, False, False]])
    consistency_PG, _, _ = group_consistency(embedding_PGD, zeros_D, zeros_D, torch.zeros(1), valid_PG)
    torch.testing.assert_close(consistency_PG, torch.tensor([[0.5 / 3, 0.5 / 3, 0, 0]]))


def test_identical_and_zero_vectors() -> None:
    inputs = _inputs(1, 4, 7)
    inputs[0][0, 1] = inputs[0][0, 0]
    inputs[0][0, 3] = 0
    _check(inputs)
    _, cosine_PGG, _ = group_consistency(*inputs)
    assert cosine_PGG[0, 0, 1] == pytest.approx(1.0, abs=1e-6)
    assert (cosine_PGG[0, 3] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosine_of_tiny_and_huge_vectors(scale: float) -> None:
    embedding_PGD, w_left_D, w_right_D, bias = _inputs(1, 3, 16)
    _, expected, _ = group_consistency(embedding_PGD, w_left_D, w_right_D, bias)
    _, cosine_PGG, _ = group_consistency(embedding_PGD * scale, w_left_D, w_right_D, bias)
    torch.testing.assert_close(cosine_PGG, expected)


def test_non_contiguous_and_one_element_bias() -> None:
    embedding_PDG, *_, bias = _inputs(5, 4, 3)
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    strided = (embedding_PDG.mT, weights[:, 0], weights[:, 1], bias.reshape(1))
    assert not strided[0].is_contiguous()
    _check(strided)


def test_bfloat16_input_is_computed_in_float32() -> None:
    inputs = tuple(tensor.bfloat16() for tensor in _inputs(2, 3, 33))
    expected = group_consistency_reference(*(tensor.double() for tensor in inputs))
    for value, reference in zip(group_consistency(*inputs), expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)


def test_empty_batch_has_empty_outputs_and_zero_gradients() -> None:
    consistency_PG, *_, d_w_left_D, d_w_right_D, d_bias = _run(group_consistency, _inputs(0, 3, 4), None, torch.float32)
    assert consistency_PG.shape == (0, 3)
    for gradient in (d_w_left_D, d_w_right_D, d_bias):
        assert not gradient.any()


def test_a_single_response_has_no_siblings() -> None:
    with pytest.raises(ValueError, match="G = 1"):
        group_consistency(*_inputs(1, 1, 4))


def test_the_concatenation_is_never_built() -> None:
    """Nothing kept for the backward pass is larger than the embedding itself (here much larger than [P, G, G])."""
    inputs = [tensor.requires_grad_() for tensor in _inputs(2, 8, 256)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        group_consistency(*inputs)
    assert max(kept) == inputs[0].numel()

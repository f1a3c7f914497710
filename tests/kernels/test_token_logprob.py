"""token_logprob against its float64 reference: values, every gradient, and what is kept and computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asa_kernels import token_logprob, token_logprob_reference


def _inputs(num_tokens: int, size: int, vocabulary: int, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(num_tokens, size, generator=generator)
    weight_VH = torch.randn(vocabulary, size, generator=generator)
    target_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    if ignored:
        target_N[1::3] = -100
    return hidden_NH, weight_VH, target_N


def _run(
    function: Callable[..., Any],
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    through: str = "both",
    **options: Any,
) -> list[Tensor]:
    """Outputs, then the gradients of a random weighting of the outputs named by ``through``."""
    leaves = [hidden_NH.detach().requires_grad_(), weight_VH.detach().requires_grad_()]
    logprob_N, entropy_N = function(*leaves, target_N, **options)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(target_N.shape, generator=generator) for _ in range(2)]
    loss = torch.zeros(())
    if through in ("both", "logprob"):
        loss = loss + (logprob_N * weights[0]).sum()
    if through in ("both", "entropy"):
        loss = loss + (entropy_N * weights[1]).sum()
    loss.backward()
    return [logprob_N.detach(), entropy_N.detach(), *(leaf.grad for leaf in leaves)]


def _check(
    inputs: tuple[Tensor, Tensor, Tensor], through: str = "both", temperature: float = 1.0, chunk_tokens: int = 1024
) -> None:
    hidden_NH, weight_VH, target_N = inputs
    actual = _run(token_logprob, *inputs, through, temperature=temperature, chunk_tokens=chunk_tokens)
    double = (hidden_NH.double(), weight_VH.double(), target_N)
    expected = _run(token_logprob_reference, *double, through, temperature=temperature)
    for name, value, reference in zip(("logprob", "entropy", "d_hidden", "d_weight"), actual, expected, strict=True):
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("num_tokens", "size", "vocabulary", "chunk_tokens"),
    [(1, 1, 2, 1), (63, 7, 1003, 16), (501, 5, 63, 100), (5, 63, 500, 1024)],
)
@pytest.mark.parametrize("through", ["both", "logprob", "entropy"])
def test_odd_sizes(num_tokens: int, size: int, vocabulary: int, chunk_tokens: int, through: str) -> None:
    _check(_inputs(num_tokens, size, vocabulary), through=through, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature(temperature: float) -> None:
    _check(_inputs(20, 6, 33), temperature=temperature, chunk_tokens=7)


def test_gradient_of_either_input_alone() -> None:
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    _, _, d_hidden_NH, d_weight_VH = _run(token_logprob, hidden_NH, weight_VH, target_N)
    for index, expected in ((0, d_hidden_NH), (1, d_weight_VH)):
        leaves = [hidden_NH.clone(), weight_VH.clone()]
        leaves[index].requires_grad_()
        generator = torch.Generator().manual_seed(99)
        loss = sum((output * torch.randn(9, generator=generator)).sum() for output in token_logprob(*leaves, target_N))
        loss.backward()
        assert torch.equal(leaves[index].grad, expected)
        assert leaves[1 - index].grad is None


def test_ignored_rows_are_zero_everywhere() -> None:
    hidden_NH, weight_VH, target_N = _inputs(10, 4, 11)
    ignored_N = target_N == -100
    hidden_NH[ignored_N] = torch.nan  # never read
    logprob_N, entropy_N, d_hidden_NH, d_weight_VH = _run(token_logprob, hidden_NH, weight_VH, target_N)
    for zero in (logprob_N[ignored_N], entropy_N[ignored_N], d_hidden_NH[ignored_N]):
        assert (zero == 0).all()
    assert d_weight_VH.isfinite().all()
    assert d_weight_VH.any()


def test_extreme_logits_stay_finite() -> None:
    hidden_NH = torch.tensor([[1e4], [-1e4], [1e-30], [0.0]])
    weight_VH = torch.tensor([[1.0], [-1.0], [0.5]])
    _check((hidden_NH, weight_VH, torch.tensor([0, 0, 1, 2])))


def test_non_contiguous() -> None:
    hidden_NH, weight_VH, target_N = _inputs(24, 6, 20)
    _check((hidden_NH.T.contiguous().T, weight_VH.T.contiguous().T, target_N), chunk_tokens=5)
    _check((hidden_NH[::2], weight_VH[::2], target_N[::2].clamp(max=9)), chunk_tokens=5)


@pytest.mark.parametrize("target_N", [torch.zeros(0, dtype=torch.long), torch.full((5,), -100)])
def test_nothing_to_do(target_N: Tensor) -> None:
    hidden_NH, weight_VH, _ = _inputs(len(target_N), 4, 7)
    outputs = _run(token_logprob, hidden_NH, weight_VH, target_N)
    assert outputs[0].shape == target_N.shape
    assert not any(output.any() for output in outputs)


def test_bfloat16_is_accumulated_in_float32() -> None:
    """More weight rows than one block, so that the block-wise widening is on the path."""
    hidden_NH, weight_VH, target_N = _inputs(7, 16, 5001)
    hidden_NH, weight_VH = hidden_NH.bfloat16(), weight_VH.bfloat16()
    actual = _run(token_logprob, hidden_NH, weight_VH, target_N, chunk_tokens=3)
    expected = _run(token_logprob_reference, hidden_NH.double(), weight_VH.double(), target_N)
    for value, reference in zip(actual[:2], expected[:2], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    for value, reference in zip(actual[2:], expected[2:], strict=True):
        assert value.dtype == torch.bfloat16  # rounded once, at the very end
        torch.testing.assert_close(value.double(), reference, rtol=2**-8, atol=1e-5)


def test_weight_freed_and_refilled_between_the_passes() -> None:
    """What ZeRO-3 does to a parameter: its data is empty between forward and backward, and comes back elsewhere."""
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    expected = _run(token_logprob, hidden_NH, weight_VH, target_N)
    hidden_NH.requires_grad_()
    weight = torch.nn.Parameter(weight_VH.clone())
    outputs = token_logprob(hidden_NH, weight, target_N)
    assert outputs[0].grad_fn.saved_tensors[1] is weight  # a copy would hold the gathered weight until the backward
    generator = torch.Generator().manual_seed(99)
    loss = sum((output * torch.randn(9, generator=generator)).sum() for output in outputs)
    weight.data = torch.empty(0)
    weight.data = weight_VH.clone()
    loss.backward()
    assert torch.equal(hidden_NH.grad, expected[2])
    assert torch.equal(weight.grad, expected[3])


def test_nothing_is_kept_under_no_grad() -> None:
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    hidden = weakref.ref(hidden_NH)
    with torch.no_grad():
        logprob_N, entropy_N = token_logprob(hidden_NH.requires_grad_(), weight_VH.requires_grad_(), target_N)
    del hidden_NH
    assert logprob_N.grad_fn is None
    assert entropy_N.grad_fn is None
    assert hidden() is None


class _Recorder(TorchDispatchMode):
    """Sizes of all tensors made, and names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    num_tokens, vocabulary, chunk_tokens = 64, 101, 8
    hidden_NH, weight_VH, target_N = _inputs(num_tokens, 3, vocabulary, ignored=False)
    with _Recorder() as recorder:
        _run(token_logprob, hidden_NH, weight_VH, target_N, chunk_tokens=chunk_tokens)
    assert recorder.largest == chunk_tokens * vocabulary


def test_no_work_for_the_gradient_of_the_entropy_without_one() -> None:
    """Its only mark is a second tensor of probabilities beside the log-probabilities: an `exp` that is not in place."""
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    hidden_NH.requires_grad_()
    exponentials = {}
    for index in range(2):
        output_N = token_logprob(hidden_NH, weight_VH, target_N)[index]
        with _Recorder() as recorder:
            output_N.sum().backward()
        exponentials[index] = recorder.operations.count("exp")
    assert exponentials == {0: 0, 1: 1}


@pytest.mark.parametrize("target", [-1, 11])
def test_targets_outside_the_vocabulary_are_refused(target: int) -> None:
    hidden_NH, weight_VH, _ = _inputs(1, 4, 11)
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_logprob(hidden_NH, weight_VH, torch.tensor([target]))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": float("nan")}, {"chunk_tokens": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        token_logprob(*_inputs(2, 4, 11), **options)

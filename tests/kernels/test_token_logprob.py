"""token_logprob against its float64 reference, in PyTorch and in Triton: values, gradients, memory, work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asa_kernels import token_logprob, token_logprob_reference
from asa_kernels.backend import Backend
from asa_kernels.token_logprob import _triton_backward, _triton_forward

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


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
    inputs: tuple[Tensor, Tensor, Tensor],
    backend: Backend,
    through: str = "both",
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> None:
    hidden_NH, weight_VH, target_N = inputs
    options = {"temperature": temperature, "chunk_tokens": chunk_tokens, "backend": backend}
    actual = _run(token_logprob, *inputs, through, **options)
    double = (hidden_NH.double(), weight_VH.double(), target_N)
    expected = _run(token_logprob_reference, *double, through, temperature=temperature)
    for name, value, reference in zip(("logprob", "entropy", "d_hidden", "d_weight"), actual, expected, strict=True):
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("num_tokens", "size", "vocabulary", "chunk_tokens"),
    [(1, 1, 1, 1), (1, 1, 2, 1), (63, 7, 1003, 16), (501, 5, 63, 100), (5, 63, 500, 1024), (2, 3, 9001, 2)],
)
@pytest.mark.parametrize("through", ["both", "logprob", "entropy"])
@both_backends
def test_odd_sizes(
    num_tokens: int, size: int, vocabulary: int, chunk_tokens: int, through: str, backend: Backend
) -> None:
    _check(_inputs(num_tokens, size, vocabulary), backend, through=through, chunk_tokens=chunk_tokens)


@both_backends
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 9),
    size=st.integers(1, 9),
    vocabulary=st.integers(1, 70),
    ignored=st.booleans(),
    temperature=st.floats(0.2, 3.0),
    chunk_tokens=st.integers(1, 10),
)
def test_any_shape(
    backend: Backend,
    num_tokens: int,
    size: int,
    vocabulary: int,
    ignored: bool,
    temperature: float,
    chunk_tokens: int,
) -> None:
    inputs = _inputs(num_tokens, size, vocabulary, ignored=ignored)
    _check(inputs, backend, temperature=temperature, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@both_backends
def test_temperature(temperature: float, backend: Backend) -> None:
    _check(_inputs(20, 6, 33), backend, temperature=temperature, chunk_tokens=7)


@both_backends
def test_gradient_of_either_input_alone(backend: Backend) -> None:
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    _, _, d_hidden_NH, d_weight_VH = _run(token_logprob, hidden_NH, weight_VH, target_N, backend=backend)
    for index, expected in ((0, d_hidden_NH), (1, d_weight_VH)):
        leaves = [hidden_NH.clone(), weight_VH.clone()]
        leaves[index].requires_grad_()
        generator = torch.Generator().manual_seed(99)
        outputs = token_logprob(*leaves, target_N, backend=backend)
        sum((output * torch.randn(9, generator=generator)).sum() for output in outputs).backward()
        assert torch.equal(leaves[index].grad, expected)
        assert leaves[1 - index].grad is None


@both_backends
def test_ignored_rows_are_zero_everywhere(backend: Backend) -> None:
    inputs = hidden_NH, _, target_N = _inputs(10, 4, 11)
    ignored_N = target_N == -100
    hidden_NH[ignored_N] = torch.nan  # never read
    logprob_N, entropy_N, d_hidden_NH, d_weight_VH = _run(token_logprob, *inputs, backend=backend)
    for zero in (logprob_N[ignored_N], entropy_N[ignored_N], d_hidden_NH[ignored_N]):
        assert (zero == 0).all()
    assert d_weight_VH.isfinite().all()
    assert d_weight_VH.any()


@both_backends
def test_nan_is_not_swallowed(backend: Backend) -> None:
    hidden_NH, weight_VH, target_N = _inputs(3, 4, 11, ignored=False)
    weight_VH[7] = torch.nan
    assert all(output.isnan().all() for output in _run(token_logprob, hidden_NH, weight_VH, target_N, backend=backend))


@both_backends
def test_extreme_logits_stay_finite(backend: Backend) -> None:
    hidden_NH = torch.tensor([[1e4], [-1e4], [1e-30], [0.0], [1e30]])
    weight_VH = torch.tensor([[1.0], [-1.0], [0.5]])
    _check((hidden_NH, weight_VH, torch.tensor([0, 0, 1, 2, 1])), backend)


@both_backends
def test_a_maximum_that_grows_from_block_to_block(backend: Backend) -> None:
    weight_VH = torch.linspace(-1, 1, 9001).unsqueeze(1)
    _check((torch.tensor([[30.0], [-30.0], [0.1]]), weight_VH, torch.tensor([9000, 9000, 5000])), backend)


@both_backends
def test_non_contiguous(backend: Backend) -> None:
    hidden_NH, weight_VH, target_N = _inputs(24, 6, 20)
    _check((hidden_NH.T.contiguous().T, weight_VH.T.contiguous().T, target_N), backend, chunk_tokens=5)
    _check((hidden_NH[::2], weight_VH[::2], target_N[::2].clamp(max=9)), backend, chunk_tokens=5)


@pytest.mark.parametrize("target_N", [torch.zeros(0, dtype=torch.long), torch.full((5,), -100)])
@both_backends
def test_nothing_to_do(target_N: Tensor, backend: Backend) -> None:
    hidden_NH, weight_VH, _ = _inputs(len(target_N), 4, 7)
    outputs = _run(token_logprob, hidden_NH, weight_VH, target_N, backend=backend)
    assert outputs[0].shape == target_N.shape
    assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_backends
def test_low_precision_is_accumulated_in_float32(dtype: torch.dtype, backend: Backend) -> None:
    """More weight rows than one block, so that the block-wise widening is on the path."""
    hidden_NH, weight_VH, target_N = _inputs(7, 16, 5001)
    hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
    actual = _run(token_logprob, hidden_NH, weight_VH, target_N, chunk_tokens=3, backend=backend)
    expected = _run(token_logprob_reference, hidden_NH.double(), weight_VH.double(), target_N)
    for value, reference in zip(actual[:2], expected[:2], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    for value, reference in zip(actual[2:], expected[2:], strict=True):
        assert value.dtype == dtype
        # PyTorch rounds once, at the very end; Triton also the logits' gradient, whose sums partly cancel.
        atol = 1e-5 if backend == "torch" else 2**-7 * reference.abs().max().item()
        torch.testing.assert_close(value.double(), reference, rtol=2**-8, atol=atol)


@both_backends
def test_mixed_dtypes(backend: Backend) -> None:
    """Widened to float32 on both sides: nothing is rounded on the way."""
    hidden_NH, weight_VH, target_N = _inputs(7, 16, 33)
    inputs = hidden_NH.bfloat16(), weight_VH, target_N
    expected = _run(token_logprob_reference, inputs[0].double(), weight_VH.double(), target_N)
    for value, reference in zip(_run(token_logprob, *inputs, backend=backend), expected, strict=True):
        rounding = 2**-8 if value.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(value.double(), reference, rtol=rounding, atol=1e-5)


@pytest.mark.usefixtures("addresses_are_free")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_past_2_to_the_31_elements(dtype: torch.dtype) -> None:
    # 8 GB of addresses, of which only the pages of the three rows become memory. The stride alone is an int32.
    logits_CV = torch.empty_strided((3, 5), (2**30 + 8, 1))
    logits_CV[:] = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    logprob_CV = logits_CV.double().log_softmax(dim=-1)
    target_C = torch.tensor([4, 1, 0])
    logprob_C, entropy_C, log_normaliser_C = torch.empty(3, 3)
    _triton_forward(logits_CV, target_C, logprob_C, entropy_C, log_normaliser_C)
    torch.testing.assert_close(logprob_C.double(), logprob_CV[[0, 1, 2], target_C])
    torch.testing.assert_close(entropy_C.double(), -(logprob_CV.exp() * logprob_CV).sum(dim=-1))
    d_logits_CV = _triton_backward(logits_CV, target_C, log_normaliser_C, entropy_C, torch.ones(3), None, dtype)
    expected_CV = torch.nn.functional.one_hot(target_C, 5) - logprob_CV.exp()
    torch.testing.assert_close(d_logits_CV, expected_CV.to(dtype))
    assert (d_logits_CV.data_ptr() == logits_CV.data_ptr()) == (dtype == torch.float32)


@both_backends
def test_weight_freed_and_refilled_between_the_passes(backend: Backend) -> None:
    """What ZeRO-3 does to a parameter: its data is empty between forward and backward, and comes back elsewhere."""
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    expected = _run(token_logprob, hidden_NH, weight_VH, target_N, backend=backend)
    hidden_NH.requires_grad_()
    weight = torch.nn.Parameter(weight_VH.clone())
    outputs = token_logprob(hidden_NH, weight, target_N, backend=backend)
    assert outputs[0].grad_fn.saved_tensors[1] is weight  # a copy would hold the gathered weight until the backward
    generator = torch.Generator().manual_seed(99)
    loss = sum((output * torch.randn(9, generator=generator)).sum() for output in outputs)
    weight.data = torch.empty(0)
    weight.data = weight_VH.clone()
    loss.backward()
    assert torch.equal(hidden_NH.grad, expected[2])
    assert torch.equal(weight.grad, expected[3])


@both_backends
def test_nothing_is_kept_under_no_grad(backend: Backend) -> None:
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    hidden = weakref.ref(hidden_NH)
    with torch.no_grad():
        leaves = hidden_NH.requires_grad_(), weight_VH.requires_grad_()
        logprob_N, entropy_N = token_logprob(*leaves, target_N, backend=backend)
    del hidden_NH, leaves
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
            if isinstance(tensor, Tensor) and tensor.dtype != torch.uint8:  # as which the interpreter moves storage
                self.largest = max(self.largest, tensor.numel())
        return result


@both_backends
def test_no_tensor_is_larger_than_a_chunk_of_logits(backend: Backend) -> None:
    num_tokens, vocabulary, chunk_tokens = 64, 101, 8
    hidden_NH, weight_VH, target_N = _inputs(num_tokens, 3, vocabulary, ignored=False)
    with _Recorder() as recorder:
        _run(token_logprob, hidden_NH, weight_VH, target_N, chunk_tokens=chunk_tokens, backend=backend)
    assert recorder.largest == chunk_tokens * vocabulary


def test_no_work_for_the_gradient_of_the_entropy_without_one() -> None:
    """Its only mark is a second tensor of probabilities beside the log-probabilities: an `exp` that is not in place."""
    hidden_NH, weight_VH, target_N = _inputs(9, 4, 11)
    hidden_NH.requires_grad_()
    exponentials = {}
    for index in range(2):
        output_N = token_logprob(hidden_NH, weight_VH, target_N, backend="torch")[index]
        with _Recorder() as recorder:
            output_N.sum().backward()
        exponentials[index] = recorder.operations.count("exp")
    assert exponentials == {0: 0, 1: 1}


@both_backends
def test_the_entropy_is_not_read_for_a_gradient_without_it(backend: Backend) -> None:
    inputs = _inputs(9, 4, 11)
    *_, expected_NH, _ = _run(token_logprob, *inputs, through="logprob", backend=backend)
    hidden_NH = inputs[0].requires_grad_()
    logprob_N, _ = token_logprob(*inputs, backend=backend)
    logprob_N.grad_fn.saved_tensors[-1].data.fill_(torch.nan)
    (d_hidden_NH,) = torch.autograd.grad(
        logprob_N, hidden_NH, torch.randn(9, generator=torch.Generator().manual_seed(99))
    )
    assert torch.equal(d_hidden_NH, expected_NH)


@pytest.mark.parametrize("target", [-1, 11])
@both_backends
def test_targets_outside_the_vocabulary_are_refused(target: int, backend: Backend) -> None:
    hidden_NH, weight_VH, _ = _inputs(1, 4, 11)
    with pytest.raises(RuntimeError, match=r"out of bounds: must be 0 … 10, or -100"):
        token_logprob(hidden_NH, weight_VH, torch.tensor([target]), backend=backend)


@pytest.mark.parametrize(("num_targets", "size"), [(1, 4), (3, 4), (2, 5)])
@both_backends
def test_shapes_that_do_not_fit_are_refused(num_targets: int, size: int, backend: Backend) -> None:
    hidden_NH, weight_VH, _ = _inputs(2, 4, 11)
    with pytest.raises(RuntimeError, match=r"shapes do not fit: hidden_NH \(2, 4\)"):
        token_logprob(hidden_NH, weight_VH[:, :1].expand(11, size), torch.zeros(num_targets).long(), backend=backend)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": float("nan")}, {"chunk_tokens": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        token_logprob(*_inputs(2, 4, 11), **options)

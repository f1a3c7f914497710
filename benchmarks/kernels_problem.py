"""What an operation is to the kernels benchmark: ways to call it, with inputs; sizes; what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

SEED = 0
Sizes = dict[str, int]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, and what flows back into it.

    Args:
        arguments: of the public function; tensors, or (nested) sequences with tensors.
        differentiable: those of them that have a gradient.
        output_gradients: one for each output, float32.
        linear_in: tensors of ``arguments`` that no gradient depends on.
    """

    arguments: tuple[Any, ...]
    differentiable: Outputs
    output_gradients: Outputs
    linear_in: Outputs = ()

    def forward(self, function: Callable[..., Outputs]) -> Outputs:
        return function(*self.arguments)

    def backward(self, outputs: Outputs) -> tuple[Tensor | None, ...]:
        """The gradients of ``differentiable``; None for those that do not take part."""
        arriving = {output: gradient for output, gradient in zip(outputs, self.output_gradients, strict=False)
                    if output.requires_grad}
        if not arriving:
            return ()
        return torch.autograd.grad(list(arriving), self.differentiable, list(arriving.values()), allow_unused=True)

    @property
    def minimum_bytes(self) -> tuple[int, int]:
        """Forward and backward, when each input is read once and each output written once."""
        read = sum(tensor.nbytes for tensor in tensors_in(self.arguments))
        outputs = sum(tensor.nbytes for tensor in self.output_gradients)
        gradients = sum(tensor.nbytes for tensor in self.differentiable)
        needed = read - sum(tensor.nbytes for tensor in self.linear_in)
        return read + outputs, (needed + outputs + gradients if self.differentiable else 0)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    return list(chain.from_iterable(map(tensors_in, values))) if isinstance(values, (list, tuple)) else []


@dataclass(frozen=True)
class Promise:
    """Of forward + backward in PyTorch on a CPU, as shares of the naive form's."""

    time_at_most: float
    memory_at_most: float


@dataclass(frozen=True)
class Call:
    """One way to use an operation.

    Args:
        make: inputs for (sizes, dtype, device).
        function: the public one, with keyword ``backend``.
        reference: the same on float64 inputs.
    """

    make: Callable[[Sizes, torch.dtype, str], Problem]
    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]


@dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        calls: as it is used; the first is the one that is measured. Together they launch every version of its kernels.
        naive: how one would write the first of ``calls`` without this package.
        operations: additions and multiplications of (forward, backward) that no algorithm does without.
        compile_sizes: few prompts or tokens, but every entry of its table of block sizes; at last sizes that nothing
            divides.
        traffic_sizes, traffic_options: for the interpreter, in the proportions of ``gpu_sizes``.
        check_sizes: for the comparison with the reference on a GPU.
        cpu_sizes, short_sizes: for the comparison with ``naive`` on a CPU.
        gpu_sizes: as in training a model of 7 B parameters.
        hard_calls: with inputs that no kernel is compiled anew for, but that a wrong one stumbles over.
        dtypes: of its float inputs.
    """

    name: str
    calls: tuple[Call, ...]
    naive: Callable[..., Outputs]
    operations: Callable[[Sizes], tuple[int, int]]
    compile_sizes: tuple[Sizes, ...]
    traffic_sizes: Sizes
    check_sizes: tuple[Sizes, ...]
    cpu_sizes: Sizes
    short_sizes: Sizes
    gpu_sizes: Sizes
    hard_calls: tuple[Call, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    traffic_options: dict[str, Any] = field(default_factory=dict)
    promise: Promise | None = None

    def problem(self, sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
        """Inputs of the call that is measured."""
        return self.calls[0].make(sizes, dtype, device)


class Random:
    """Seeded tensors, drawn on the CPU, so that every device gets the same."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._dtype, self._device = dtype, device

    def input(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, differentiable."""
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self._device, self._dtype).requires_grad_()

    def gradients(self, *shapes: tuple[int, ...]) -> Outputs:
        """Normal, float32."""
        return tuple(torch.randn(shape, generator=self._generator).to(self._device) for shape in shapes)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low … high − 1."""
        return torch.randint(low, high, shape, generator=self._generator).to(self._device)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values; from the first row to the last it is more than 2³¹ elements.

    Its stride is less (larger ones are int64 by themselves, and hide the mistake), and divisible by 16, as usual.
    """
    stride = (2**31 // (len(tensor) - 1) // 16 + 1) * 16
    far = torch.empty_strided(
        tensor.shape, (stride, *tensor.stride()[1:]), dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
    return far.requires_grad_(tensor.requires_grad)


def largest_difference(value: Tensor, right: Tensor) -> float:
    """As a share of the right one's largest value; NaN if either holds one."""
    value, right = value.detach().cpu().double(), right.detach().cpu().double()
    return float((value - right).abs().max() / right.abs().max().clamp(min=1e-30))


def sizes_text(sizes: Sizes) -> str:
    return ", ".join(f"{name} = {value:,}" for name, value in sizes.items())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

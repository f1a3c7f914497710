"""Linear layers in float32 on CPUs, by oneDNN: PyTorch takes it for lower precision alone, and MKL for float32.

Both compute in the same precision. But on CPUs that are not Intel's MKL leaves AVX-512 unused (what a core's wider
registers are worth to a whole run: benchmarks/peers.py, "AVX2 only"). Few rows are left to MKL: a step of decoding is
many small products, and oneDNN prepares each of them.

PyTorch has no public name for the operation (`torch.compile` emits it); setup.py pins the version that this one is of.

Shapes: N rows (all dimensions but the last one), I features in, O features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_ROWS = 64


def takes_onednn(left_NI: Tensor, right_OI: Tensor) -> bool:
    """Whether :func:`product` can multiply these, and sooner than MKL."""
    is_float32 = left_NI.dtype == right_OI.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    has_rows = left_NI.numel() >= MIN_ROWS * right_OI.shape[-1]
    return left_NI.is_cpu and is_float32 and has_rows and torch.backends.mkldnn.is_available()


def product(left_NI: Tensor, right_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """left · rightᵀ + bias by oneDNN, float32, on a CPU, of any strides; not differentiable."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left_NI, right_OI, bias_O, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # The weight itself, not a copy: ZeRO-3 frees and refills the parameter's data between the two passes.
        ctx.save_for_backward(x_NI, weight_OI)
        return product(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_flat_NO = d_out_NO.reshape(-1, d_out_NO.shape[-1])
        d_x_NI = product(d_flat_NO, weight_OI.T).view_as(x_NI) if needs_x else None
        d_weight_OI = product(d_flat_NO.T, x_NI.reshape(-1, x_NI.shape[-1]).T) if needs_weight else None
        return d_x_NI, d_weight_OI, d_flat_NO.sum(dim=0) if needs_bias else None


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """As ``functional.linear``; by oneDNN, and once differentiable, where :func:`takes_onednn` says so."""
    if takes_onednn(x_NI, weight_OI):
        out_NO: Tensor = _Linear.apply(x_NI, weight_OI, bias_O)
        return out_NO
    return nn.functional.linear(x_NI, weight_OI, bias_O)


class CpuLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x_NI: Tensor) -> Tensor:
        return linear(x_NI, self.weight, self.bias)


def use_cpu_linear(model: nn.Module) -> None:
    """Every plain ``nn.Linear`` in it becomes a :class:`CpuLinear`, with the same parameters."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear

"""Which implementation runs: Triton kernels for tensors on a GPU, vectorised PyTorch elsewhere.

The only file that imports Triton, of which there are builds for Linux alone: elsewhere PyTorch does all the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INTERPRETED", "Backend", "jit", "tl", "triton", "uses_triton"]

Backend = Literal["auto", "triton", "torch"]

# Under TRITON_INTERPRET=1, read when kernels are defined, they run in Python on the CPU: for tests and debuggers.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def jit(kernel: Callable[..., None]) -> Any:
    """``triton.jit``; without Triton the function as it is, which nobody launches."""
    return kernel if triton is None else triton.jit(kernel)


def uses_triton(backend: Backend, tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` (and what else it is given, on the same device) launches Triton kernels.

    Raises:
        ValueError: no such backend.
        RuntimeError: ``"triton"`` where it cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend = {backend!r} must be one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "torch":
        return False
    if backend == "triton" and triton is None:
        raise RuntimeError("backend = 'triton', but triton is not installed: use backend='auto'")
    if backend == "triton" and not (tensor.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"backend = 'triton', but the tensor is on {tensor.device.type}: kernels run on GPUs, or, slowly, on CPU "
            "tensors in a process that was started with TRITON_INTERPRET=1"
        )
    return backend == "triton" or (triton is not None and tensor.is_cuda)

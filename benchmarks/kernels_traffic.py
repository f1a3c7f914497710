"""Counts the bytes that an operation moves: its kernels' loads and stores, and the reads and writes of its PyTorch.

    TRITON_INTERPRET=1 python benchmarks/kernels_traffic.py        (kernels.py compile starts it)

Runs in Triton's interpreter, where every load and store passes by. A load counts each address once; that several
programs load the same (from a GPU's L2 cache, mostly) counts again. float32 throughout: what does not depend on the
device. One JSON object on stdout.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from kernels_cases import OPS
from kernels_problem import Op, sizes_text, tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

PYTORCH = "PyTorch"
_MOVES_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")
_ONLY_WRITES = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "fill_", "zero_")


class Traffic(TorchDispatchMode):
    """Bytes by kernel, and of PyTorch's operations, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._kernel: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._kernel is None and not func.is_view and name not in _MOVES_NOTHING:
            touched = _read_and_written(name, args, kwargs or {}, result)
            self.bytes[PYTORCH] += sum(map(_touched_bytes, tensors_in(touched)))
        return result

    @contextmanager
    def of_kernels(self) -> Iterator[None]:
        """Kernels count too."""
        run = GridExecutor.__call__
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._kernel = executor.fn.__name__
            try:
                run(executor, *args, **kwargs)
            finally:
                self._kernel = None

        def counted_load(builder: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
            self._count(ptrs, mask)
            return load(builder, ptrs, mask, *others)

        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
            self._count(ptrs, mask)
            return store(builder, ptrs, value, mask, *others)

        with (
            mock.patch.object(GridExecutor, "__call__", counted_run),
            mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        ):
            yield

    def _count(self, ptrs: Any, mask: Any) -> None:
        num_addresses = np.unique(ptrs.data[mask.data.astype(bool)]).size
        self.bytes[str(self._kernel)] += num_addresses * max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _read_and_written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Any, Any]:
    """Tensors, or others with as many bytes."""
    if name in _ONLY_WRITES:
        return (), result
    if name == "copy_" or (name in ("addmm", "addmm_") and kwargs.get("beta") == 0):
        return args[1:], result
    if name == "index":  # the rows that are taken, not all there are
        return (args[1], result), result
    if name == "index_put_":
        return args[1:3], args[2]
    return args, result


def _touched_bytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # the first counts what is expanded again and again


def traffic(op: Op) -> dict[str, Any]:
    """Bytes moved, by kernel, and the minimum; forward and backward."""
    problem = op.problem(op.traffic_sizes, torch.float32, "cpu")
    moved: dict[str, Counter[str]] = {}
    for direction in ("forward", "backward"):
        with Traffic() as counter, counter.of_kernels():
            if direction == "forward":
                outputs = op.calls[0].function(*problem.arguments, backend="triton", **op.traffic_options)
            else:
                problem.backward(outputs)
        moved[direction] = counter.bytes
    minimum = dict(zip(moved, problem.minimum_bytes, strict=True))
    return {"sizes": sizes_text(op.traffic_sizes), "minimum_bytes": minimum, "moved_bytes": moved}


if __name__ == "__main__":
    print(json.dumps({name: traffic(op) for name, op in OPS.items()}))

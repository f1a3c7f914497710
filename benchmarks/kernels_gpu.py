"""On a GPU: first whether the kernels are right, then how fast they are against what one would use instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernels_cases import OPS, Op, Outputs, Problem, dtype_name, largest_difference, sizes_text
from kernels_cpu import forward_backward
from live_run import Progress
from torch import Tensor

# Of each output and gradient, as a share of the reference's largest value. Float32 sums differ in their order; a
# low-precision gradient, and the low-precision factors of the products it comes from, are rounded.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
KERNELS, EAGER, COMPILED, TORCH, LIGER = "kernels", "eager", "torch.compile", "torch path", "Liger-Kernel"


def errors(device: str, progress: Progress) -> list[str]:
    """Every output and gradient that is not what the float64 reference gives; empty: all are right."""
    wrong = []
    for op in OPS.values():
        for dtype in op.dtypes:
            for sizes in op.check_sizes:
                wrong += [f"{op.name} ({dtype_name(dtype)}, {sizes_text(sizes)}): {error}"
                          for error in errors_of(op, op.make(sizes, dtype, device), LARGEST_ERROR[dtype])]
        progress.say(f"{op.name}: checked")
    return wrong


def errors_of(op: Op, problem: Problem, largest_error: float) -> Iterator[str]:
    exact = in_float64(problem)
    expected = forward_backward(exact, op.reference)
    got = forward_backward(problem, lambda *arguments: op.calls[0](*arguments, backend="triton"))
    for index, (value, right) in enumerate(zip(got, expected, strict=True)):
        difference = largest_difference(value, right)
        if not difference <= largest_error:  # NaN, too
            yield f"result {index} is off by {difference:.1e} of its largest value, allowed are {largest_error:.0e}"


def in_float64(problem: Problem) -> Problem:
    """The same numbers, on the CPU."""
    exact: dict[int, Tensor] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            wide = value.detach().cpu()
            wide = wide.double().requires_grad_(value.requires_grad) if value.is_floating_point() else wide
            return exact.setdefault(id(value), wide)
        return type(value)(map(widen, value)) if isinstance(value, (list, tuple)) else value

    arguments = widen(problem.arguments)
    return Problem(arguments, tuple(exact[id(value)] for value in problem.differentiable),
                   tuple(gradient.double().cpu() for gradient in problem.output_gradients))


def speeds(progress: Progress) -> dict[str, Any]:
    """Median milliseconds, and peak memory; in bfloat16, where an operation has it."""
    results = {}
    for op in OPS.values():
        problem = op.make(op.gpu_sizes, op.dtypes[0], "cuda")
        results[op.name] = {"sizes": sizes_text(op.gpu_sizes), "dtype": dtype_name(op.dtypes[0]),
                            "minimum_bytes": problem.minimum_bytes,
                            **{name: measured(problem, function) for name, function in variants(op).items()}}
        progress.say(f"{op.name}: {results[op.name]}")
    if importlib.util.find_spec("liger_kernel") is None:
        progress.say("Liger-Kernel is not installed: not compared")
    else:
        results["sum of log-probabilities"] = against_liger()
    return results


def variants(op: Op) -> dict[str, Callable[..., Outputs]]:
    ours = op.calls[0]
    return {KERNELS: lambda *arguments: ours(*arguments, backend="triton"),
            TORCH: lambda *arguments: ours(*arguments, backend="torch"),
            EAGER: op.naive, COMPILED: torch.compile(op.naive, dynamic=False)}


def measured(problem: Problem, function: Callable[..., Outputs]) -> dict[str, Any]:
    from triton.testing import do_bench

    try:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(problem, function)
        peak_bytes = torch.cuda.max_memory_allocated() - before
        result = {"forward_ms": do_bench(lambda: problem.forward(function), return_mode="median")}
        if problem.differentiable:
            both = do_bench(lambda: forward_backward(problem, function), return_mode="median")
            result["forward_backward_ms"] = both
        return {**result, "peak_bytes": peak_bytes}
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory_bytes": torch.cuda.get_device_properties(0).total_memory}


def against_liger() -> dict[str, Any]:
    """What both compute: Σ log p(target) and its gradients. Ours has the entropy beside it, without gradient."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    op = OPS["token_logprob"]
    inputs = op.make(op.gpu_sizes, op.dtypes[0], "cuda")
    problem = Problem(inputs.arguments, inputs.differentiable, (torch.ones((), device="cuda"),))

    def ours(*arguments: Tensor) -> Outputs:
        return (-op.calls[0](*arguments, backend="triton")[0].sum(),)

    def ligers(*arguments: Tensor) -> Outputs:
        loss = liger_fused_linear_cross_entropy(*arguments, reduction="sum")
        return ((loss[0] if isinstance(loss, tuple) else loss).float(),)

    return {"sizes": sizes_text(op.gpu_sizes), KERNELS: measured(problem, ours), LIGER: measured(problem, ligers)}

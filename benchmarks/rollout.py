"""Tokens per second through the rollout worker, beside bare ``vllm.LLM.generate``; engines `vllm` and `hf`.

    python benchmarks/rollout.py --out benchmarks/results/rollout.json

A four-layer Llama, float32, one core; 256 responses to 32 prompts: 64 tokens each (uniform), or 8 to 256, as an
end-of-text with probability 1/100 has it (mixed). vLLM changes torch for its whole process, so every kind of variant
(`rollout_variants.py`) has one of its own; they take turns, so that a machine that gets slower slows all alike. The
counter-based noise makes both engines sample the same lengths; the bare engine is told them.

One JSON line on stdout. Promise: the worker with engine vllm, all groups in one lease, reaches 0.95 of the bare engine
under every load; no other variant is promised anything. With --short one of the loads, with --smoke a tiny one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from live_run import Hang, Progress
from results import Ratio, add_sizes, make_result, write_result
from rollout_variants import (
    CORE,
    GROUP_SIZE,
    GROUPS,
    KINDS,
    OTHER_CORE,
    PROMPT_TOKENS,
    SEED,
    Load,
    Turn,
    serve,
    with_enough_to_say,
)

TARGET_RATIO = 0.95
PROMISED, ENGINE, BARE = "worker vllm, 1 lease", "engine", "bare"
BASELINE = "bare vllm.LLM.generate"
START_SECONDS = 300.0
NEVER = 1e-12
LOADS = {f"{name}, V = {vocab_size:,}": Load(vocab_size, *load) for vocab_size in (2048, 32000)
         for name, load in (("uniform", (64, NEVER)), ("mixed", (256, 0.01)))}
SHORT_LOAD = "mixed, V = 2,048"
SMOKE_LOADS = {"uniform, 8 tokens, V = 2,048": Load(2048, 8, NEVER)}
REPEATS = {"full": 3, "short": 3, "smoke": 1}


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
    """Tokens per second of every variant under one load, of all turns."""
    turns: dict[str, list[Turn]] = {}
    with servers(with_enough_to_say(load)) as running:
        for number in range(1, repeats + 1):
            for server in running:
                for variant in server.variants:
                    turns.setdefault(variant, []).append(server.turn(variant))
            progress.say(f"{name}: turn {number} of {repeats}")
    lengths = turns[BARE][0].lengths
    return {
        "response_tokens": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths),
                            "sum": sum(lengths)},
        "tokens_per_second": {variant: [round(sum(lengths) / turn.seconds) for turn in of_variant]
                              for variant, of_variant in turns.items()},
    }


def ratios_of_load(name: str, rates: Mapping[str, Sequence[float]]) -> list[Ratio]:
    """Every variant's median of the bare engine's; lowest and highest of the pairs that took turns."""
    found = []
    for variant, of_variant in rates.items():
        if variant == BARE:
            continue
        pairs = [rate / bare for rate, bare in zip(of_variant, rates[BARE], strict=True)]
        ratio = Ratio(
            f"{variant}: {name}", round(statistics.median(of_variant) / statistics.median(rates[BARE]), 3), BASELINE,
            "higher", round(min(pairs), 3), round(max(pairs), 3), TARGET_RATIO if variant == PROMISED else None, 1.0)
        found.append(replace(ratio, why=where_it_goes(rates)) if ratio.is_met is False else ratio)
    return found


def where_it_goes(rates: Mapping[str, Sequence[float]]) -> str:
    """A token's time through the worker, in its parts."""
    bare, engine, worker = (1e6 / statistics.median(rates[variant]) for variant in (BARE, ENGINE, PROMISED))
    return (f"µs per token: bare {bare:.0f}; our engine in process {engine - bare:+.0f}, for noise of its own over the "
            f"vocabulary, log-probs and groups; the round through Ray and the coordinator {worker - engine:+.0f}")


def loads_of(options: argparse.Namespace) -> dict[str, Load]:
    if options.size == "smoke":
        return SMOKE_LOADS
    only = options.only or (SHORT_LOAD if options.size == "short" else None)
    return {only: LOADS[only]} if only else LOADS


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns of every variant, after one to warm up; default 3, smoke 1")
    parser.add_argument("--only", choices=LOADS, help="one of the loads")
    add_sizes(parser)
    return parser.parse_args(arguments)


def settings(loads: Mapping[str, Load], repeats: int) -> dict[str, Any]:
    return {"repeats": repeats, "prompts": GROUPS, "responses_per_prompt": GROUP_SIZE, "prompt_tokens": PROMPT_TOKENS,
            "seed": SEED, "core_that_samples": CORE, "core_of_the_rest": OTHER_CORE,
            "loads": {name: {"vocab_size": load.vocab_size, "max_new_tokens": load.max_new_tokens,
                             "end_probability": load.end_probability} for name, load in loads.items()}}


def main() -> int:
    options = parse_arguments()
    if (os.cpu_count() or 1) < 2:
        sys.exit("rollout: needs two cores")
    progress = Progress()
    repeats = options.repeats or REPEATS[options.size]
    loads = loads_of(options)
    measured: dict[str, dict[str, Any]] = {}
    for name, load in loads.items():
        done = len(measured)
        eta = f"; about {progress.seconds / done * (len(loads) - done) / 60:.0f} minutes left" if done else ""
        progress.say(f"{name}: starting {', '.join(KINDS)}{eta}")
        measured[name] = measure(name, load, repeats, progress)
    ratios = [one for name, load in measured.items() for one in ratios_of_load(name, load["tokens_per_second"])]
    return write_result(make_result("rollout", options.size, ratios, settings(loads, repeats), measured), options.out)


if __name__ == "__main__":
    sys.exit(main())

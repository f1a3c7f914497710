"""What does fusing cost and save? Our step beside a plain language-model step, and beside the unfused way.

    python benchmarks/step.py --out benchmarks/results/step.json

A four-layer Llama (4.2 M parameters, V = 4,096, float32) on two ranks (gloo, one core each) takes steps of 2,560
made-up tokens (rows of 512: 2,048) through `TrainEngine`. Variants of one case take turns in one pair of processes
(`step_ranks.py`):

    fused                 our step: one forward, one backward, over corpus and rollout rows; evaluator, rewards, trust
    plain                 a language-model loss on the very same rows: same trunk, same masks, our chunked head
    plain, whole logits   the same with all logits at once, as trainers mostly have it: it takes their memory, and
                          spares computing them again. Both are limits
    unfused               corpus forward + backward, policy forward + backward (two micro-batches of one update),
                          reward model's forward, reference's forward; each model a trunk of its own, all sharded

Not in it: what the loop does around `train_step`, and generating. Operations are matrix products by formula, with the
logits that a chunked head computes again, which utilisation leaves out; bytes are those that a rank sends if
collectives go round a ring. ZeRO-3 gathers weights once per forward here, for models below 10⁹ parameters stay gathered
until their backward. Memory is of processes that run one variant only.

One JSON line on stdout. Promises, under ZeRO-3: fused ≤ 1.10 of either plain step; and at rollout:corpus rows of 1/4, 1
and 4 it saves at least what it saves in operations, to 10 %: fused of unfused in time ≤ 1.10 times the same in
operations. With --short these three cases; with --smoke one, tiny.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from efficiency_flops import Trunk
from live_run import Progress
from local_ranks import run_on_ranks
from results import Ratio, add_sizes, make_result, write_result
from step_case import FUSED, GROUP_SIZE, PLAIN, RANKS, SEED, UNFUSED, VARIANTS, WHOLE, Case

TARGET_OF_PLAIN = TARGET_OF_FLOPS = 1.10
CASE_SECONDS = 600.0
SHARES = {"rollout:corpus 1:4": Case(3, 128, 8, 2), "rollout:corpus 1:1": Case(3, 128, 5, 5),
          "rollout:corpus 4:1": Case(3, 128, 2, 8)}
EVEN = "rollout:corpus 1:1"
CASES = SHARES | {"rows of 320 tokens": Case(3, 320, 2, 2), "rows of 512 tokens": Case(3, 512, 1, 1)} | {
    f"ZeRO-{stage}": replace(SHARES[EVEN], zero_stage=stage) for stage in (0, 1, 2)}
SMOKE_CASES = {"smoke": Case(3, 64, 2, 2, vocab_size=512, hidden_size=64, num_layers=2)}
TURNS = {"full": 15, "short": 7, "smoke": 2}
MEMORY_TURNS = 1
Turns = Mapping[str, Sequence[Mapping[str, float]]]  # of every variant


# --- operations -------------------------------------------------------------------------------------------------
def scored_tokens(case: Case) -> dict[str, int]:
    """Of one rank, by kind of row."""
    length = case.row_tokens // GROUP_SIZE
    return {"corpus": case.corpus_rows * (case.row_tokens - 1),
            "rollout": case.rollout_rows * GROUP_SIZE * (length - length // 4)}


def passes(case: Case) -> dict[str, dict[str, float]]:
    """FLOPs of one rank's passes, by variant. A backward is two forwards; a chunked head computes its logits again."""
    trunk = Trunk.of(case.config, case.vocab_size)
    scored = scored_tokens(case)
    blocks = {"corpus": trunk.forward(case.corpus_rows, case.row_tokens),
              "rollout": trunk.forward(case.rollout_rows, case.row_tokens)}
    train = {rows: 3 * blocks[rows] + 4 * trunk.head(scored[rows]) for rows in scored}
    whole = {rows: 3 * blocks[rows] + 3 * trunk.head(scored[rows]) for rows in scored}
    responses = case.rollout_rows * GROUP_SIZE
    heads = 6 * responses * trunk.hidden_size * trunk.embedding_size
    return {
        FUSED: {"corpus and rollouts, forward and backward": sum(train.values()), "evaluator": heads},
        PLAIN: {"all rows, forward and backward": sum(train.values())},
        WHOLE: {"all rows, forward and backward": sum(whole.values())},
        UNFUSED: {"corpus, forward and backward": train["corpus"], "policy, forward and backward": train["rollout"],
                  "reward model, forward": blocks["rollout"],
                  "reference, forward": blocks["rollout"] + trunk.head(scored["rollout"])},
    }


def model_flops(case: Case) -> dict[str, float]:
    """As :func:`passes`, without what is computed a second time."""
    trunk, counted = Trunk.of(case.config, case.vocab_size), passes(case)
    again = trunk.head(sum(scored_tokens(case).values()))
    return {variant: sum(counted[variant].values()) - (0 if variant == WHOLE else again) for variant in VARIANTS}


# --- measuring --------------------------------------------------------------------------------------------------
def measure(case: Case, variants: Sequence[str], turns: int) -> list[dict[str, Any]]:
    """Of every rank what `step_ranks.py` found, in fresh processes; ``run_on_ranks`` says what it raises."""
    return run_on_ranks(RANKS, "step_ranks", (case, variants, turns), CASE_SECONDS)


def of_slowest_rank(of_ranks: Sequence[Mapping[str, Any]]) -> Turns:
    """Each turn as the slower rank took it; of losses and matmul rates the mean."""
    def merge(*turns: Mapping[str, float]) -> dict[str, float]:
        kinds: dict[str, Callable[[list[float]], float]] = {
            "loss": statistics.fmean, "matmul_flops_per_second": statistics.fmean}
        return {key: kinds.get(key, max)([turn[key] for turn in turns]) for key in turns[0]}

    return {variant: [merge(*turns) for turns in zip(*(rank["turns"][variant] for rank in of_ranks), strict=True)]
            for variant in of_ranks[0]["turns"]}


def median_of(turns: Turns, variant: str, key: str) -> float:
    return statistics.median(turn[key] for turn in turns[variant])


def measure_case(case: Case, turns: int) -> dict[str, Any]:
    found = of_slowest_rank(measure(case, VARIANTS, turns))
    flops = passes(case)
    rate = statistics.median(turn["matmul_flops_per_second"] for of_variant in found.values() for turn in of_variant)
    return {
        "case": asdict(case), "flops_of_rank": flops, "turns": found, "matmul_flops_per_second": round(rate),
        "utilisation": {variant: round(model / median_of(found, variant, "seconds") / rate, 3)
                        for variant, model in model_flops(case).items()},
    }


def measure_memory(case: Case) -> dict[str, Any]:
    """Of the rank that needs more, by variant."""
    found = {variant: measure(case, [variant], MEMORY_TURNS) for variant in VARIANTS}
    key = "peak_bytes_above_start"
    return {key: {variant: max(rank[key] for rank in of_ranks) for variant, of_ranks in found.items()}}


# --- figures ----------------------------------------------------------------------------------------------------
def ratio_of(turns: Turns, name: str, baseline: str, scale: float = 1.0) -> Ratio:
    """Fused of ``baseline`` in time, times ``scale``: median, lowest and highest of the pairs that took turns."""
    pairs = [scale * ours["seconds"] / theirs["seconds"]
             for ours, theirs in zip(turns[FUSED], turns[baseline], strict=True)]
    return Ratio(name, round(statistics.median(pairs), 3), baseline, "lower", round(min(pairs), 3),
                 round(max(pairs), 3))


def ratios_of_case(name: str, measured: Mapping[str, Any]) -> list[Ratio]:
    turns, stage = measured["turns"], measured["case"]["zero_stage"]
    totals = {variant: sum(of_passes.values()) for variant, of_passes in measured["flops_of_rank"].items()}
    target = TARGET_OF_PLAIN if name in CASES and stage == 3 else None
    plain = replace(ratio_of(turns, f"time of fused: {name}", PLAIN), baseline="plain language-model step, same rows",
                    limit=1.0, target=target)
    whole = replace(ratio_of(turns, f"time of fused, of whole logits: {name}", WHOLE),
                    baseline="plain language-model step, all logits at once", limit=1.0, target=target)
    unfused = replace(ratio_of(turns, f"time of fused, of unfused: {name}", UNFUSED), baseline="unfused step")
    flops = totals[FUSED] / totals[UNFUSED]
    fair = replace(ratio_of(turns, f"time saved by fusing, of operations saved: {name}", UNFUSED, 1 / flops),
                   baseline=f"fused of unfused in operations, {flops:.3f}",
                   target=TARGET_OF_FLOPS if name in SHARES else None)
    sent = {variant: median_of(turns, variant, "sent_bytes") for variant in VARIANTS}
    return [explained(plain, turns, PLAIN), explained(whole, turns, WHOLE), unfused, explained(fair, turns, UNFUSED),
            utilisation_ratio(name, measured),
            *(Ratio(f"bytes sent, of {variant}: {name}", round(sent[FUSED] / sent[variant], 3), f"{variant} step's")
              for variant in (PLAIN, UNFUSED))]


def explained(ratio: Ratio, turns: Turns, baseline: str) -> Ratio:
    """Where the time goes, of a promise that is not kept, or kept by more than it says."""
    if ratio.target is None or 1 / ratio.target <= ratio.value <= ratio.target:
        return ratio
    spent = [f"{variant} {1000 * median_of(turns, variant, 'seconds'):.0f}, "
             f"{1000 * median_of(turns, variant, 'cpu_seconds'):.0f}, "
             f"{median_of(turns, variant, 'sent_bytes') / 1e6:.1f}" for variant in (FUSED, baseline)]
    return replace(ratio, why=f"ms per step, of it computing, MB sent: {'; '.join(spent)}")


def utilisation_ratio(name: str, measured: Mapping[str, Any]) -> Ratio:
    """Of the fused step; the other variants' beside it, and how long each of them took."""
    turns, found = measured["turns"], measured["utilisation"]
    others = [f"{variant} {found[variant]:.2f}" for variant in VARIANTS if variant != FUSED]
    spent = [f"{variant} {1000 * median_of(turns, variant, 'seconds'):.0f}" for variant in VARIANTS]
    return Ratio(f"model FLOPs utilisation of fused: {name}", found[FUSED], "bare matrix products' FLOP/s", "higher",
                 limit=1.0, why=f"{', '.join(others)}; ms per step: {', '.join(spent)}")


def memory_ratios(memory: Mapping[str, Mapping[str, float]]) -> list[Ratio]:
    peak = memory["peak_bytes_above_start"]
    return [Ratio(f"peak memory of fused, of {variant}", round(peak[FUSED] / peak[variant], 3), f"{variant} step's")
            for variant in (PLAIN, WHOLE, UNFUSED)]


# --- the program ------------------------------------------------------------------------------------------------
def cases_of(options: argparse.Namespace) -> dict[str, Case]:
    if options.size == "smoke":
        return SMOKE_CASES
    if options.only:
        return {options.only: CASES[options.only]}
    return CASES if options.size == "full" else SHARES


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, help="of every variant, after two to warm up: 15, short 7, smoke 2")
    parser.add_argument("--only", choices=CASES, help="one of the cases")
    add_sizes(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    if len(os.sched_getaffinity(0)) < RANKS:
        sys.exit(f"step: needs {RANKS} cores, one for each rank")
    progress, turns, cases = Progress(), options.turns or TURNS[options.size], cases_of(options)
    measurements: dict[str, Any] = {}
    ratios: list[Ratio] = []
    for name, case in cases.items():
        done = len(measurements)
        eta = f"; about {progress.seconds / done * (len(cases) - done) / 60:.0f} minutes left" if done else ""
        progress.say(f"{name}: {turns} turns of {', '.join(VARIANTS)}{eta}")
        measurements[name] = measure_case(case, turns)
        ratios += ratios_of_case(name, measurements[name])
    if EVEN in cases:
        progress.say("memory: every variant in processes of its own")
        measurements["memory"] = measure_memory(cases[EVEN])
        ratios += memory_ratios(measurements["memory"])
    settings = {"ranks": RANKS, "seed": SEED, "turns": turns, "group_size": GROUP_SIZE,
                "cases": {name: asdict(case) for name, case in cases.items()}}
    return write_result(make_result("step", options.size, ratios, settings, measurements), options.out)


if __name__ == "__main__":
    sys.exit(main())

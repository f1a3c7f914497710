"""Arithmetic per step of ASA-LLM, and of the methods in Table 2 of its paper, by formula; the formulas, by counting.

    python benchmarks/efficiency.py --out benchmarks/results/efficiency.json

A question of counting, not of time: how many operations does each method need for the same corpus rows and equally many
responses (`efficiency_flops.py`), at the sizes of `configs/asa-*.yaml`? Beside it the paper's own ratio, which stands
there without batch sizes, tokens or formulas. Nothing is promised about these: they say what follows from the methods.

Promise: each formula, and those that `step.py` divides by, is within 10 % of what torch counts on a small model, among
them `step.py`'s (`efficiency_counted.py`).
One JSON line on stdout; every formula with its terms on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from efficiency_flops import ASA, METHODS, Load, Trunk, ratios_to_asa
from live_run import ROOT, Progress
from results import Ratio, add_sizes, make_result, write_result

MODELS = ("asa-350m", "asa-1.3b", "asa-3b", "asa-7b")
PAPER_MODEL = "asa-3b"
PAPER_FLOPS = {ASA: 1.3e21, "RLHF": 2.4e21, "Self-Rewarding": 1.8e21, "Constitutional AI": 2.1e21}
TARGET_DEVIATION = 1.1


def config_of(model: str) -> tuple[Trunk, Load, int]:
    """(trunk, one step's work, number of steps) of a config."""
    from asa_dist.config import load_config

    config = load_config(ROOT / f"configs/{model}.yaml")
    assert config.data.tokenizer.train is not None
    return Trunk.of(config, config.data.tokenizer.train.vocab_size), Load.of(config), config.train.steps


def paper_ratio(method: str) -> float:
    return PAPER_FLOPS[method] / PAPER_FLOPS[ASA]


def rows_for_the_papers_ratio(trunk: Trunk, load: Load, method: str) -> float | None:
    """Corpus rows beside the same responses that give the paper's ratio by these formulas; None: none do.

    Every row adds the same to both methods, so that the ratio goes from that of the responses alone towards 1.
    """
    alone, row = replace(load, corpus_rows=0), replace(load, corpus_rows=1)
    ours, theirs = (sum(METHODS[name](trunk, alone).values()) for name in (ASA, method))
    per_row = sum(METHODS[ASA](trunk, row).values()) - ours
    rows = (theirs - paper_ratio(method) * ours) / (per_row * (paper_ratio(method) - 1))
    return rows if rows >= 0 else None


def why(trunk: Trunk, load: Load, method: str) -> str:
    """What the formulas say about the paper's ratio."""
    alone = ratios_to_asa(trunk, replace(load, corpus_rows=0))[method]
    rows = rows_for_the_papers_ratio(trunk, load, method)
    reached = "no share of corpus gives it" if rows is None else f"{rows:.0f} corpus rows instead would give it"
    remark = ("; RLHF's reinforcement learning is part of it, so it cannot cost less than RLHF, as the paper has it"
              if method == "Constitutional AI" else "")
    return (f"the paper has {paper_ratio(method):.2f}, without batch sizes or tokens; here {load.corpus_rows:.0f} rows "
            f"of corpus go with {load.responses:.0f} responses; {reached}; responses alone: {alone:.2f}{remark}")


def table_2(progress: Progress) -> tuple[list[Ratio], dict[str, Any]]:
    """Every method's ratio at every size; all terms."""
    ratios, measured = [], {}
    for model in MODELS:
        trunk, load, num_steps = config_of(model)
        of_model = {name: method(trunk, load) for name, method in METHODS.items()}
        for method, ratio in ratios_to_asa(trunk, load).items():
            paper = f", paper: {paper_ratio(method):.2f}" if model == PAPER_MODEL else ""
            ratios.append(Ratio(f"{method}, {model}{paper}", round(ratio, 3), "ASA-LLM's operations", "higher",
                                why=why(trunk, load, method) if model == PAPER_MODEL else ""))
        measured[model] = {
            "flops_per_step": of_model,
            "flops_of_all_steps": {name: num_steps * sum(terms.values()) for name, terms in of_model.items()},
            "ratio_of_responses_alone": ratios_to_asa(trunk, replace(load, corpus_rows=0))}
        if model == PAPER_MODEL:
            say_terms(model, of_model, progress)
    return ratios, measured


def say_terms(model: str, of_model: Mapping[str, Mapping[str, float]], progress: Progress) -> None:
    for method, terms in of_model.items():
        lines = [f"    {flops:9.3g}  {term}" for term, flops in terms.items()]
        progress.say("\n".join([f"{model}, {method}: {sum(terms.values()):.3g} FLOPs per step", *lines]))


def check_formulas(size: str, progress: Progress) -> tuple[list[Ratio], dict[str, Any], dict[str, Any]]:
    """(deviations of what was counted from the formulas, whichever is larger; both; the models)."""
    from efficiency_counted import SHAPES, count_shape, count_step
    from step import EVEN, SHARES, SMOKE_CASES

    shapes = SHAPES if size == "full" else dict(list(SHAPES.items())[:1])
    case = SMOKE_CASES["smoke"] if size == "smoke" else SHARES[EVEN]
    measured: dict[str, dict[str, tuple[int, float]]] = {name: count_shape(shape) for name, shape in shapes.items()}
    measured["step.py's model"] = count_step(case)
    ratios = []
    for name, of_work in measured.items():
        for work, (counted, formula) in of_work.items():
            deviation = round(max(counted / formula, formula / counted), 4)
            ratios.append(Ratio(f"counted by torch, {work}, {name}", deviation, "the formula's, or the other way round",
                                target=TARGET_DEVIATION, limit=1.0))
        progress.say(f"{name}: " + ", ".join(f"{work} {counted / formula:.4f}"
                                             for work, (counted, formula) in of_work.items()))
    return ratios, measured, {**shapes, "step.py's model": asdict(case)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    options = parser.parse_args()
    progress = Progress()
    of_paper, terms = table_2(progress)
    checked, counted, models = check_formulas(options.size, progress)
    settings = {"models": {model: {"trunk": asdict(config_of(model)[0]), "load": asdict(config_of(model)[1])}
                           for model in MODELS}, "counted": models}
    measurements = {"paper_flops": PAPER_FLOPS, "models": terms, "counted_and_formula_flops": counted}
    result = make_result("efficiency", options.size, of_paper + checked, settings, measurements)
    return write_result(result, options.out)


if __name__ == "__main__":
    sys.exit(main())

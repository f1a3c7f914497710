"""Table 2 by formula as a picture: what each method's step consists of, and its ratio by the share of responses.

    python benchmarks/efficiency_picture.py benchmarks/results/efficiency.json benchmarks/efficiency.svg
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from efficiency import PAPER_MODEL, config_of
from efficiency_flops import ASA, ratios_to_asa
from results import read_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES = 13.0, 4.6
COLORS = {ASA: "#2a6fbb", "RLHF": "#c0504d", "Self-Rewarding": "#6a9a3b", "Constitutional AI": "#8064a2"}
CORPUS_COLOR = "#d9e0e6"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Left: operations of a step, term by term; right: ratios over responses per corpus row. Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    _terms(left, result["measurements"]["models"][PAPER_MODEL]["flops_per_step"])
    _ratios(right, result["measurements"]["paper_flops"])
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=150)
    pyplot.close(figure)


def _terms(axes: Axes, of_model: Mapping[str, Mapping[str, float]]) -> None:
    for place, (method, terms) in enumerate(of_model.items()):
        begin = 0.0
        for term, flops in terms.items():
            color = CORPUS_COLOR if term.startswith("corpus") else COLORS[method]
            axes.barh(place, flops, left=begin, color=color, edgecolor="white", height=0.65)
            begin += flops
    axes.set_yticks(range(len(of_model)), list(of_model))
    axes.invert_yaxis()
    axes.set(xlabel="FLOPs per step; grey: corpus")
    axes.set_title(f"One step of {PAPER_MODEL}, equally many responses", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _ratios(axes: Axes, paper_flops: Mapping[str, float]) -> None:
    trunk, load, _ = config_of(PAPER_MODEL)
    responses_per_row = np.geomspace(0.1, 100, 60)
    ratios = [ratios_to_asa(trunk, replace(load, corpus_rows=load.responses / each)) for each in responses_per_row]
    for method in ratios[0]:
        axes.plot(responses_per_row, [of_row[method] for of_row in ratios], color=COLORS[method], label=method)
        axes.axhline(paper_flops[method] / paper_flops[ASA], color=COLORS[method], linestyle=":")
    axes.axvline(load.responses / load.corpus_rows, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(1, None), ylabel="FLOPs, of ASA-LLM's",
             xlabel=f"responses per corpus row; line: configs/{PAPER_MODEL}.yaml")
    axes.set_title("By formula; dotted: the paper's Table 2", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(read_result(source), target)

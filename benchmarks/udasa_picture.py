"""A comparison of UDASA's arms as a picture: what share of answers is true, and what each uncertainty knew of it.

    python benchmarks/udasa_picture.py benchmarks/udasa.json benchmarks/udasa.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment_picture import OTHER_COLOR, OURS_COLOR
from alignment_report import ArmRuns
from udasa_report import CURRICULUM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (13.0, 3.6)


def draw(result: dict[str, Any], path: Path) -> None:
    """Truth on the left, AUC on the right. Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=SIZE_INCHES, layout="constrained", width_ratios=[3, 2])
    _truth(left, ArmRuns(result["runs"]), result["arms"])
    _uncertainties(right, result["runs"].get(CURRICULUM, {}))
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata, dpi=150)
    pyplot.close(figure)


def _truth(axes: Axes, runs: ArmRuns, arms: dict[str, dict[str, Any]]) -> None:
    there = [arm for arm in arms if arm in runs]
    for place, arm in enumerate(there):
        _bar(axes, place, runs.values(arm, "truth"), OURS_COLOR if arm == CURRICULUM else OTHER_COLOR)
        greedy = runs.values(arm, "greedy_truth")
        axes.plot(sum(greedy) / len(greedy), place, "D", color="black", markersize=6, fillstyle="none")
    _finish(axes, [arms[arm]["title"] for arm in there], "Truth")
    axes.set_xlabel("share of answers; bar: sampled, dots: seeds, diamond: greedy")


def _uncertainties(axes: Axes, by_seed: dict[str, Any]) -> None:
    found = [measures["round"]["sibling_auc"] for measures in by_seed.values()]
    names = list(found[0]) if found else []
    for place, name in enumerate(names):
        _bar(axes, place, [auc[name] for auc in found], OTHER_COLOR)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    _finish(axes, names, "What uncertainty knows of the truth")
    axes.set_xlabel("how often a false answer is the more uncertain of two")


def _bar(axes: Axes, place: int, values: list[float], color: str) -> None:
    axes.barh(place, sum(values) / len(values), color=color, height=0.65)
    axes.plot(values, [place] * len(values), "o", color="black", markersize=3)


def _finish(axes: Axes, labels: list[str], title: str) -> None:
    axes.set(xlim=(0, 1.02), yticks=range(len(labels)), yticklabels=labels)
    axes.set_title(title, loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text(encoding="utf-8")), target)

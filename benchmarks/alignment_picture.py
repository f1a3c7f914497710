"""A comparison of arms as a picture: what share of answers is true, and how many ways there are left to say it.

    python benchmarks/alignment_picture.py benchmarks/alignment.json benchmarks/alignment.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment_report import ArmRuns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, INCHES_PER_ARM = 13.0, 0.42
OURS_COLOR, OTHER_COLOR, LIE_COLOR = "#2a6fbb", "#a9b8c6", "#c0504d"


def draw(result: dict[str, Any], path: Path) -> None:
    """A row for each world: truth on the left; on the right diversity, or the lies that are told. Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot

    worlds = [world for world in result["worlds"] if any(world["runs"].values())]
    heights = [1.3 + INCHES_PER_ARM * sum(map(bool, world["runs"].values())) for world in worlds]
    figure, axes_WC = pyplot.subplots(
        len(worlds), 2, figsize=(WIDTH_INCHES, sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [3, 2], "height_ratios": heights})  # fmt: skip
    for world, (left, right) in zip(worlds, axes_WC, strict=True):
        runs = ArmRuns(world["runs"])
        arms = [arm for arm in result["arms"] if arm in runs]
        _truth(left, runs, arms)
        if world["world"]["false_majority"]:
            _bars(right, runs, arms, "told", "lies", LIE_COLOR)
            right.set_title("Where the majority is false: the lie", loc="left")
            right.set(xlim=(0, 1), xlabel="share of sampled answers")
        else:
            _bars(right, runs, arms, "distinct_phrasings", "all", OTHER_COLOR)
            right.set_title("Ways of saying it", loc="left")
            right.set_xlabel("different phrasings among 8 answers")
        left.set_yticks(range(len(arms)), [f"({arm}) {result['arms'][arm]['title']}" for arm in arms])
        lies = f", {world['world']['false_majority']:.0%} of majorities" if world["world"]["false_majority"] else ""
        left.set_title(f"Truth; {world['world']['noise']:.0%} of statements{lies} false", loc="left")
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata, dpi=150)
    pyplot.close(figure)


def _truth(axes: Axes, runs: ArmRuns, arms: Sequence[str]) -> None:
    _bars(axes, runs, arms, "truth", "all", OTHER_COLOR, ours=OURS_COLOR)
    for place, arm in enumerate(arms):
        greedy = runs.estimate(arm, "greedy_truth")
        if greedy:
            axes.plot(greedy.mean, place, "D", color="black", markersize=6, fillstyle="none")
    axes.set(xlim=(0, 1.02), xlabel="share of answers; bar: sampled, dots: seeds, diamond: greedy")


def _bars(
    axes: Axes, runs: ArmRuns, arms: Sequence[str], measure: str, facts: str, color: str, ours: str | None = None
) -> None:
    for place, arm in enumerate(arms):
        values = runs.values(arm, measure, facts)
        axes.barh(place, sum(values) / len(values), color=ours if ours and arm == "b" else color, height=0.65)
        axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
    axes.set(yticks=range(len(arms)), yticklabels=[f"({arm})" for arm in arms])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text(encoding="utf-8")), target)

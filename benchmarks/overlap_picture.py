"""What staleness costs, as a picture: truth by step on the left, by second of training on the right.

    python benchmarks/overlap_picture.py overlap_learning.json overlap_learning.svg
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (13.0, 4.4)
AGE_COLORS = {0: "#222222", 1: "#2a6fbb", 2: "#3c9d6f", 4: "#d98e2b", 8: "#c0504d"}
WITHOUT_WEIGHTS = "no importance weights"


def draw(result: dict[str, Any], path: Path) -> None:
    """Means over the seeds; dashed: without importance weights. Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=SIZE_INCHES, sharey=True, layout="constrained")
    for name, curves in result["measurements"].items():
        _line(left, name, curves, "step")
        _line(right, name, curves, "seconds")
    left.set(xlabel="steps", ylabel="share of sampled answers that are true")
    right.set(xlabel="seconds of training")
    left.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata, dpi=150)
    pyplot.close(figure)


def _line(axes: Axes, name: str, curves: Mapping[str, Mapping[str, list[float]]], by: str) -> None:
    """Point by point, as far as all seeds have it."""
    points = zip(*(zip(curve[by], curve["truth"], strict=True) for curve in curves.values()), strict=False)
    means = [[statistics.fmean(values) for values in zip(*point, strict=True)] for point in points]
    age = int(name.partition(",")[0].removeprefix("age "))
    axes.plot([x for x, _ in means], [truth for _, truth in means], label=name, color=AGE_COLORS[age], markersize=3,
              marker="o", linestyle="--" if name.endswith(WITHOUT_WEIGHTS) else "-")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text(encoding="utf-8")), target)

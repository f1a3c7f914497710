"""The figures of a result as a picture: each with its spread, its promise, and what nothing could do better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import Ratio, ratios_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40  # of more, those with a promise are drawn
WIDTH_INCHES, ROW_INCHES, MARGIN_INCHES = 9.0, 0.24, 1.0
COLORS = {True: "#2a6fbb", False: "#c0504d", None: "#7f7f7f"}
LABELS = {True: "promise kept", False: "promise not kept", None: "nothing promised"}
SMALLEST = 1e-3  # on a logarithmic axis: 0 is drawn there


def drawn(ratios: Sequence[Ratio]) -> list[Ratio]:
    promised = [ratio for ratio in ratios if ratio.target is not None]
    return promised if len(ratios) > MOST_ROWS and promised else list(ratios)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    ratios = drawn(ratios_of(result))
    height = MARGIN_INCHES + ROW_INCHES * len(ratios)
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, height), layout="constrained")
    for place, ratio in enumerate(ratios):
        _row(axes, place, ratio)
    axes.set(xscale="log", ylim=(len(ratios) - 0.4, -0.6), xlabel="measured / baseline",
             title=f"{result['benchmark']}, {result['date'][:10]}")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=range(1, 10) if high < 10 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(ratios)), [ratio.name for ratio in ratios], fontsize="x-small")
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(axes, ratios)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=150)
    pyplot.close(figure)


def _row(axes: Axes, place: int, ratio: Ratio) -> None:
    color = COLORS[ratio.is_met]
    if ratio.lowest is not None and ratio.highest is not None:
        ends = [max(value, SMALLEST) for value in (ratio.lowest, ratio.highest)]
        axes.plot(ends, [place, place], color=color, linewidth=1.2)
    axes.plot(max(ratio.value, SMALLEST), place, marker="o", color=color, markersize=4.5)
    for value, line in ((ratio.target, {"color": "black", "linewidth": 1.4}),
                        (ratio.limit, {"color": "#999999", "linewidth": 1.0, "linestyle": ":"})):
        if value:  # a limit of 0 is beyond any logarithmic axis
            axes.plot([value, value], [place - 0.38, place + 0.38], **line)


def _legend(axes: Axes, ratios: Sequence[Ratio]) -> None:
    """Of what there is; an entry is drawn where no axis shows it."""
    for is_met in {ratio.is_met for ratio in ratios}:
        axes.plot([], [], marker="o", color=COLORS[is_met], markersize=4.5, label=LABELS[is_met])
    if any(ratio.target for ratio in ratios):
        axes.plot([], [], color="black", linewidth=1.4, label="promise")
    if any(ratio.limit for ratio in ratios):
        axes.plot([], [], color="#999999", linestyle=":", label="limit")
    axes.legend(frameon=False, fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))

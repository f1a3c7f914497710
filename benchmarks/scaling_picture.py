"""How training scales, as a picture: measured on this machine's ranks, simulated on GPUs.

    python benchmarks/scaling_picture.py benchmarks/results/scaling.json benchmarks/scaling.svg
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import read_result
from scaling import median_of, speed_up
from scaling_case import ONE_RANK, Load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES = 13.0, 4.4
COLORS = {"weak": "#2a6fbb", "strong": "#c0504d"}
MACHINE_COLORS = ("#222222", "#3c9d6f", "#d98e2b", "#8064a2")
LINES = {"0": "--", "1": "-"}  # by policy age
IDEAL: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Left: measured; in the middle tokens per second, right efficiency, both simulated. Format: by suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "asa-dist"  # the same JSON, the same file
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    _measured(left, result)
    simulated = result["measurements"]["simulated"]
    _simulated(middle, simulated, "tokens_per_second", result["settings"]["config"].removesuffix(".yaml"))
    _simulated(right, simulated, "efficiency", "efficiency")
    middle.set(yscale="log", ylabel="tokens per second")
    right.set(ylim=(0, 1.1), ylabel="tokens per second and GPU, of one node's")
    right.axhline(1, **IDEAL)
    middle.legend(frameon=False, fontsize="small")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=150)
    pyplot.close(figure)


def _measured(axes: Axes, result: Mapping[str, Any]) -> None:
    """Points are rounds, lines their medians; dotted: what so many cores can do."""
    cores, rounds = result["settings"]["cores"], result["measurements"]["rounds"]
    loads = {name: Load(**load) for name, load in result["settings"]["loads"].items()}
    counts = sorted({load.num_ranks for load in loads.values()})
    axes.plot(counts, [min(count, cores) for count in counts], label=f"limit of {cores} cores", **IDEAL)
    for kind, color in COLORS.items():
        of_kind = [name for name in loads if name == ONE_RANK or name.startswith(kind)]
        points = [_speed_ups(name, loads, rounds) for name in of_kind]
        axes.plot(counts, [statistics.median(each) for each in points], color=color, label=kind)
        for count, each in zip(counts, points, strict=True):
            axes.plot([count] * len(each), each, "o", color=color, markersize=3)
    axes.set(xlabel="ranks", ylabel="rows per second, of one rank's", xticks=counts, ylim=(0, None))
    axes.set_title("Measured: a fused step, ZeRO-3, gloo", loc="left")
    axes.legend(frameon=False)


def _speed_ups(name: str, loads: Mapping[str, Load], rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    return [speed_up(loads[name], loads[ONE_RANK], median_of(of_round["turns"][name], "seconds"),
                     median_of(of_round["turns"][ONE_RANK], "seconds")) for of_round in rounds]


def _simulated(axes: Axes, simulated: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str) -> None:
    machines = list(dict.fromkeys(name.rpartition(",")[0] for name in simulated))
    for name, rows in simulated.items():
        color = MACHINE_COLORS[machines.index(name.rpartition(",")[0]) % len(MACHINE_COLORS)]
        axes.plot([row["gpus"] for row in rows], [row[key] for row in rows], LINES[name.rpartition(" ")[2]],
                  color=color, label=name, marker="o", markersize=3)
    gpus = [row["gpus"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
    axes.set(xlabel="GPUs, the best division of them")
    axes.set_title(f"Simulated: {title}", loc="left")


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    found = read_result(source)
    if "rounds" not in found["measurements"]:
        sys.exit(f"scaling_picture: {source} was made with --simulate: nothing in it was measured; make it without")
    draw(found, target)

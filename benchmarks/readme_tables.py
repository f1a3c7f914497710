"""Writes the tables of benchmarks/results/*.json into benchmarks/README.md, between two comments, and draws pictures.

    python benchmarks/readme_tables.py            (--check: only says if tables are not what the results give)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import promise_of
from live_run import ROOT
from results import RESULTS, Ratio, ResultError, ratios_of, read_result
from results_picture import draw

README = ROOT / "benchmarks/README.md"
MARKER = "results"
HEADER = ("figure", "of", "median (lowest–highest)", "promise", "limit", "", "why")


def document(results: Sequence[Mapping[str, Any]]) -> str:
    """What stands between the markers."""
    return "\n" + "".join(f"{heading(result)}\n\n{picture(result)}{table(ratios_of(result))}\n\n" for result in results)


def heading(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    facts = (result["date"][:10], machine["cpu"], f"{machine['cores']} cores",
             f"{machine['memory_bytes'] / 2**30:.0f} GiB", f"load {machine['load_1_minute']:g}",
             f"commit {result['commit'] or 'unknown'}", f"size {result['size']}")
    return f"**{result['benchmark']}**: {', '.join(facts)}."


def picture(result: Mapping[str, Any]) -> str:
    name = result["benchmark"]
    return f"![{name}: figures with spread and promise](results/{name}.svg)\n\n"


def draw_pictures(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    for result in results:
        if result["benchmark"] == "overlap_learning":
            continue  # curves: it draws them itself
        draw(result, folder / f"{result['benchmark']}.svg")


def table(ratios: Sequence[Ratio]) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *map(row, ratios)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def row(ratio: Ratio) -> tuple[str, ...]:
    spread = "" if ratio.lowest is None or ratio.highest is None else f" ({ratio.lowest:.3g}–{ratio.highest:.3g})"
    promise = "" if ratio.target is None else promise_of(ratio)
    limit = "" if ratio.limit is None else f"{ratio.limit:.3g}"
    mark = {True: "✓", False: "✗", None: ""}[ratio.is_met]
    return ratio.name, ratio.baseline, f"{ratio.value:.3g}{spread}", promise, limit, mark, ratio.why


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder, by name.

    Raises:
        ResultError: one is not of the schema, or named after another benchmark; or there are none.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        results.append(result := read_result(path))
        if result["benchmark"] != path.stem:
            raise ResultError(f"{path}: holds a result of {result['benchmark']}")
    if not results:
        raise ResultError(f"{folder}: no results; `python benchmarks/bench.py --full --out {folder}` measures them")
    return results


def write_between(readme: Path, marker: str, text: str, *, only_check: bool) -> bool:
    """Puts ``text`` between the comments ``marker:begin`` and ``marker:end``; whether it stood there already.

    Raises:
        ResultError: they are not there.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    marked = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    before = readme.read_text(encoding="utf-8")
    if len(marked.findall(before)) != 1:
        raise ResultError(f"{readme} needs {begin} and {end}, once each, on lines of their own")
    after = marked.sub(lambda _: text, before)
    if after != before and not only_check:
        temporary = readme.with_suffix(".tmp")
        temporary.write_text(after, encoding="utf-8")
        temporary.replace(readme)
    return after == before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    options = parser.parse_args()
    try:
        results = read_results(RESULTS)
        if not options.check:
            draw_pictures(results, RESULTS)
        is_same = write_between(README, MARKER, document(results), only_check=options.check)
    except ResultError as error:
        sys.exit(f"readme_tables: {error}")
    if options.check and not is_same:
        sys.exit("readme_tables: benchmarks/README.md does not say what benchmarks/results do: run it without --check")
    return 0


if __name__ == "__main__":
    sys.exit(main())

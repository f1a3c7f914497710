"""Preference pairs as text: the clearest and the most doubtful ones, for people who want to judge the measuring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from asa_dist.records import PreferencePair

UNCERTAINTIES = ("semantic", "factual", "value", "total")
SIDE_CHARACTERS, NUMBER_CHARACTERS = 10, 10  # of the columns; a number's includes the gap before it
LINE_CHARACTERS = 120
HEADER = " " * SIDE_CHARACTERS + "".join(f"{name:>{NUMBER_CHARACTERS}}" for name in UNCERTAINTIES)


def show_pairs(pairs: Sequence[PreferencePair], stage_by_id: Mapping[int, int], count: int) -> str:
    """The ``count`` clearest pairs, then the ``count`` most doubtful ones; both begin with the most extreme.

    If there are too few pairs for both, fewer doubtful ones follow: none is shown twice. Texts are quoted, with escapes
    for whatever is not printable, and cut where the line ends.

    Args:
        stage_by_id: stage of every pair, 0 = clearest, by prompt id.
        count: ≥ 1.
    """
    if not pairs:
        return "there are no pairs to show"
    ordered = sorted(pairs, key=lambda pair: (-pair.delta_u, pair.prompt_id))
    clearest, others = ordered[:count], ordered[count:]
    sections = [_section("clearest", clearest, len(ordered), stage_by_id)]
    if others:
        sections.append(_section("most doubtful", others[-count:][::-1], len(ordered), stage_by_id))
    return "\n\n".join(sections)


def _section(title: str, pairs: Sequence[PreferencePair], num_pairs: int, stage_by_id: Mapping[int, int]) -> str:
    lines = [line for pair in pairs for line in _lines(pair, stage_by_id[pair.prompt_id])]
    return "\n".join([f"{title}: {len(pairs)} of {num_pairs} pairs", HEADER, *lines])


def _lines(pair: PreferencePair, stage: int) -> Iterator[str]:
    yield _cut(f"Δu {pair.delta_u:.4f}, stage {stage + 1}, prompt {pair.prompt_id}: {pair.prompt!r}")
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        known = response.uncertainties
        numbers = [f"{known[name]:.4f}" if name in known else "–" for name in UNCERTAINTIES]
        columns = "".join(f"{number:>{NUMBER_CHARACTERS}}" for number in numbers)
        yield _cut(f"{'  ' + side:{SIDE_CHARACTERS}}{columns}  {response.text!r}")


def _cut(line: str) -> str:
    return line if len(line) <= LINE_CHARACTERS else f"{line[: LINE_CHARACTERS - 1]}…"

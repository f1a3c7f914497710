"""Example pairs of a round of UDASA: the clearest, the most doubtful, and one of every stage that these leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from asa_dist.records import MeasuredResponse, PreferencePair
from asa_dist.report.markup import cut, table
from asa_dist.report.udasa_round import UNCERTAINTIES, RoundFiles

SHOWN_PAIRS = 5  # at either end
MAX_CHARACTERS = 1200  # of a prompt or response


def pairs_section(files: RoundFiles) -> str:
    """Histograms, which page.js draws, and examples."""
    return f'<section id="pairs"><h2>Pairs</h2>{_content(files)}</section>'


def _content(files: RoundFiles) -> str:
    if files.summary is None:
        return f"<p>{'They cannot be read.' if files.is_paired else 'No pairs have been made yet.'}</p>"
    if files.pairs is None:
        return '<div id="histograms" class="grid"></div><p>The pairs themselves cannot be shown.</p>'
    heads = ("Δu", "stage", "prompt", "", "response", *UNCERTAINTIES)
    lines = (
        line
        for title, pairs in examples(files.pairs, files.stage_by_id)
        for line in (_title_line(title, len(heads)), *_lines_of(pairs, files.stage_by_id))
    )
    return (
        '<div id="histograms" class="grid"></div><h3>Examples</h3><p class="note">The chosen response is the least '
        "uncertain one of its prompt, the rejected one is drawn from those more uncertain. Columns: all parts of u and "
        f'their fusion, the total; Δu is its difference.</p><div class="examples">{table(heads, lines, "tall")}</div>'
    )


def examples(
    pairs: Sequence[PreferencePair], stage_by_id: Mapping[int, int]
) -> list[tuple[str, list[PreferencePair]]]:
    """(title, pairs) from clear to doubtful, no pair twice, every stage with pairs among them."""
    ordered = sorted(pairs, key=lambda pair: -pair.delta_u)
    clearest, rest = ordered[:SHOWN_PAIRS], ordered[SHOWN_PAIRS:]
    doubtful = rest[-SHOWN_PAIRS:]
    shown = {stage_by_id[pair.prompt_id] for pair in (*clearest, *doubtful)}
    by_stage: dict[int, list[PreferencePair]] = {}
    for pair in rest:
        by_stage.setdefault(stage_by_id[pair.prompt_id], []).append(pair)
    between = [own[len(own) // 2] for stage, own in sorted(by_stage.items()) if stage not in shown]
    titled = [("The clearest", clearest), ("In between", between), ("The most doubtful", doubtful)]
    return [(title, found) for title, found in titled if found]


def _title_line(title: str, num_columns: int) -> str:
    return f'<tr class="title-line"><th colspan={num_columns} scope=rowgroup>{escape(title)}</th></tr>'


def _lines_of(pairs: Sequence[PreferencePair], stage_by_id: Mapping[int, int]) -> Iterator[str]:
    for pair in pairs:
        yield (
            f'<tr class="next-group"><td rowspan=2 class=number>{pair.delta_u:.3f}</td>'
            f"<td rowspan=2 class=number>{stage_by_id[pair.prompt_id] + 1}</td>"
            f'<td rowspan=2 class="text prompt"><small>prompt {pair.prompt_id}</small><br>'
            f"{escape(cut(pair.prompt, MAX_CHARACTERS))}</td>{_response_cells('chosen', pair.chosen)}</tr>"
        )
        yield f"<tr>{_response_cells('rejected', pair.rejected)}</tr>"


def _response_cells(side: str, response: MeasuredResponse) -> str:
    values = "".join(
        f"<td class=number>{f'{known[name]:.3f}' if name in known else '–'}</td>"
        for known in [response.uncertainties] for name in UNCERTAINTIES
    )  # fmt: skip
    text = escape(cut(response.text, MAX_CHARACTERS)) + ("" if response.finished else " <small>(cut off)</small>")
    return f"<td class={side}>{side}</td><td class=text>{text}</td>{values}"

"""Puts the page together: texts and tables as HTML, what is drawn as JSON, all scripts within the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from asa_dist import __version__
from asa_dist.config import ConfigError
from asa_dist.report.asa_page import asa_page
from asa_dist.report.charts import thinning_note
from asa_dist.report.curves import is_number
from asa_dist.report.happenings import Happening, happenings, marks, table_lines
from asa_dist.report.markup import table
from asa_dist.report.method_page import MethodPage
from asa_dist.report.run_files import RunFiles, read_run
from asa_dist.report.settings import MISSING, Setting, settings
from asa_dist.report.signs import warnings
from asa_dist.report.step_time import step_time_chart, step_time_section
from asa_dist.report.udasa_page import udasa_page
from asa_dist.runtime.checkpoint_files import write_atomically

METHODS: dict[str, Callable[[RunFiles], MethodPage]] = {"asa": asa_page, "udasa": udasa_page}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished, stopped, crashed or under way: one HTML page, atomically.

    Args:
        out: where; None: RUN/report.html.

    Returns:
        where it stands.

    Raises:
        ConfigError: no run folder, no plotly, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html" if out is None else Path(out)
    page = build_page(read_run(run_dir))
    try:
        write_atomically(path, page.encode("utf-8", "replace").decode())  # half of a surrogate pair has no encoding
    except OSError as error:
        raise ConfigError(f"the report {path} cannot be written: {error.strerror or error}") from None
    return path


def build_page(run: RunFiles) -> str:
    """The whole page.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(f"plotly is not installed: {error}; the report needs it: pip install plotly") from None
    method = METHODS[run.setting("method")](run)
    found = happenings(run)
    data = {"last_step": run.last_step, "chapters": method.chapters, "marks": marks(found),
            "step_time": step_time_chart(run), **method.data}
    source = files("asa_dist.report")
    return Template((source / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{run.name}: {method.state}"),
        version=escape(__version__),
        style=(source / "page.css").read_text(encoding="utf-8"),
        header=_header(run, method),
        warnings=_warnings([*warnings(run), *method.warnings]),
        happenings=_happenings(found),
        before_curves=step_time_section(run) + method.before_curves,
        legend_of_marks="deaths, failures and skipped steps in red, resumes and stops in violet",
        shading=escape(method.shading),
        thinning=escape(thinning_note(run)),
        without_curves="" if method.chapters else "<p>No step has been logged yet.</p>",
        evals=_evals(run),
        after_curves=method.after_curves,
        config=_config(run),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        data=_as_script_data(data),
        plotly=get_plotlyjs(),
        script=(source / "page.js").read_text(encoding="utf-8"),
    )


def _as_script_data(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever the run has written."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# --- the header -------------------------------------------------------------------------------------------------
def _header(run: RunFiles, method: MethodPage) -> str:
    figures = "".join(
        f'<div{" class=bad" if figure.is_bad else ""}><dt>{escape(figure.title)}</dt><dd>{escape(figure.value)}'
        f"<small>{escape(figure.explanation)}</small></dd></div>"
        for figure in method.figures
    )
    state = method.state
    worked_on = f"; {run.worked_on_by}" if run.worked_on_by and state == "running" else ""
    return (
        f'<div class="title"><h1>{escape(run.name)}</h1><span class="state {state.replace(" ", "-")}">{state}</span>'
        f"<span>{escape(method.progress + worked_on)}</span></div>\n<dl class=figures>{figures}</dl>"
    )


def _warnings(found: list[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="warnings" role="alert"><h2>Look at this first</h2><ul>{items}</ul></div>' if found else ""


# --- tables -----------------------------------------------------------------------------------------------------
def _happenings(found: list[Happening]) -> str:
    if not found:
        return "<p>Nothing has been recorded.</p>"
    lines, left_out = table_lines(found)
    note = f'<p class="note">{left_out:,} lines from the middle are left out: see events.jsonl.</p>' if left_out else ""
    return note + table(("time (UTC)", "step", "what", "details"), map(_happening, lines), "low")


def _happening(line: Happening) -> str:
    step = "" if line.step is None else f"{'≈ ' if line.is_estimated else ''}{line.step:,}"
    what = line.words + (f" × {line.count:,}, the last:" if line.count > 1 else "")
    details = line.details + (" (undone: the run went on from an earlier step)" if line.is_undone else "")
    return (
        f'<tr class="{line.kind}{" undone" if line.is_undone else ""}">'
        f"<td class=when>{escape(_readable_time(line.time))}</td><td class=when>{step}</td>"
        f"<td class=what>{escape(what)}</td><td class=details>{escape(details)}</td></tr>"
    )


def _readable_time(time: str) -> str:
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError):
        return time


def _evals(run: RunFiles) -> str:
    """Rows of evals.jsonl side by side, oldest first; empty without any."""
    if not run.evals:
        return ""
    keys = dict.fromkeys(key for row in run.evals for key in row if key != "step")
    heads = ["", *(f"step {row.get('step', '?')}" for row in run.evals)]
    lines = (
        f"<tr><td class=key>{escape(key)}</td>"
        + "".join(f"<td class=number>{escape(_cell(row.get(key)))}</td>" for row in run.evals) + "</tr>"
        for key in keys
    )
    return f"<section id=evals><h2>Evaluations</h2>{table(heads, lines)}</section>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _config(run: RunFiles) -> str:
    found = settings(run.tree)
    different = [setting for setting in found if not setting.is_default]
    heads = ("key", "value", "default")
    return (
        f"<h3>What differs from the defaults ({len(different)})</h3>{table(heads, map(_setting, different))}"
        f"<details><summary>All {len(found)} settings</summary>{table(heads, map(_setting, found))}</details>"
    )


def _setting(setting: Setting) -> str:
    default = "–" if setting.default is MISSING else _yaml(setting.default)
    return (
        f"<tr><td class=key>{escape(setting.key)}</td><td class=value>{escape(_yaml(setting.value))}</td>"
        f"<td class=value>{escape(default)}</td></tr>"
    )


def _yaml(value: Any) -> str:
    """As a config file would have it, near enough."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)

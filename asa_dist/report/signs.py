"""Known bad signs, each with the figures that show it. Few, so that a warning is worth reading.

Here are those of every run; a method's own are in <method>_signs.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from asa_dist.report.run_files import RunFiles

WINDOW = 20  # steps of a mean
SHOWN_KEYS = 5

Sign = Callable[[RunFiles], Iterator[str]]


def damaged_files(run: RunFiles) -> Iterator[str]:
    yield from run.problems


def crashed(run: RunFiles) -> Iterator[str]:
    if run.state == "crashed":
        step = run.inspection.step if run.inspection else None
        resume = f"asa resume {shlex.quote(str(run.resumed_folder))}"
        lost = f"; steps {step + 1:,} to {run.last_step:,} will be made again" if step and step < run.last_step else ""
        yield (
            f"The run ended without saying so after step {run.last_step:,}: it failed or was killed. Go on from "
            f"{f'step {step:,}' if step else 'the beginning'} with: {resume}{lost}."
        )


def ledger(run: RunFiles) -> Iterator[str]:
    if run.inspection and (run.inspection.ledger.lost or run.inspection.ledger.repeated):
        found = run.inspection.ledger
        yield (
            f"Prompts lost: {len(found.lost):,}; trained on more than once: {len(found.repeated):,}. Neither should "
            "ever happen: see `asa inspect`."
        )


def checkpoints(run: RunFiles) -> Iterator[str]:
    if run.inspection and run.state != "running" and run.inspection.checkpoints and run.inspection.step is None:
        yield "None of the checkpoints can be used: see `asa inspect`."


def skipped_steps(run: RunFiles) -> Iterator[str]:
    count = run.curve("train/skipped_steps").last()
    if count > 0:
        reasons = [str(event.get("reason")) for event in run.events if event["event"] == "step_skipped"]
        yield (
            f"{count:,.0f} of {run.last_step:,} steps made no update: a loss or gradient was not finite."
            + (f" The last reason: {reasons[-1]}" if reasons else "")
        )


def not_finite(run: RunFiles) -> Iterator[str]:
    counts = {key: curve.num_not_finite for key, curve in run.curves.items() if curve.num_not_finite}
    if counts:
        shown = ", ".join(f"{key} ({count:,} times)" for key, count in list(counts.items())[:SHOWN_KEYS])
        yield f"Values that were not finite, gaps in the curves: {shown}{', …' if len(counts) > SHOWN_KEYS else ''}."


SIGNS: tuple[Sign, ...] = (damaged_files, crashed, ledger, checkpoints, skipped_steps, not_finite)


def warnings(run: RunFiles) -> list[str]:
    """What the reader should know before looking at any curve; empty: none of the known bad signs."""
    return [text for sign in SIGNS for text in sign(run)]

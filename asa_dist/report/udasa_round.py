"""What the report knows of a round of UDASA beside the files of every run: what was measured, and the pairs.

Files may hold any JSON; what is missing is empty, what is damaged is a problem of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from asa_dist.records import PreferencePair
from asa_dist.report.curves import finite_number, step_of
from asa_dist.report.run_files import RunFiles
from asa_dist.rounds import RESULT
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.measurements import MEASURED, RESPONSES, UNCERTAINTY
from asa_dist.runtime.pair_files import SUMMARY, RoundSummary, read_pairs, read_summary

UNCERTAINTIES = ("semantic", "factual", "value", "total")


@dataclass
class Values:
    """Of one uncertainty, over all responses."""

    num_known: int = 0
    num_unknown: int = 0
    low: float = math.inf
    high: float = -math.inf
    sum: float = 0.0

    def add(self, values: Iterable[Any]) -> None:
        for value in map(finite_number, values):
            if math.isnan(value):
                self.num_unknown += 1
            else:
                self.num_known += 1
                self.low, self.high, self.sum = min(self.low, value), max(self.high, value), self.sum + value

    @property
    def num_all(self) -> int:
        return self.num_known + self.num_unknown

    @property
    def mean(self) -> float:
        return self.sum / self.num_known if self.num_known else math.nan


@dataclass
class Measured:
    """What stands in responses.jsonl, uncertainty.jsonl and, once all of it is there, measured.json."""

    num_answered: int = 0  # prompts
    num_measured: int = 0  # prompts
    num_responses: int = 0
    num_empty: int = 0  # responses
    first_empty: list[int] = field(default_factory=list)  # ids of their prompts, each once
    values: dict[str, Values] = field(default_factory=dict)  # by name, ``total`` last
    left_out: dict[str, list[int]] = field(default_factory=dict)  # ids of prompts never asked, by reason
    is_complete: bool = False


@dataclass
class RoundFiles:
    """``summary`` and ``pairs`` are None where there are none yet, or where they cannot be read: see ``problems``."""

    measured: Measured
    summary: RoundSummary | None = None
    pairs: tuple[PreferencePair, ...] | None = None
    stage_by_id: dict[int, int] = field(default_factory=dict)  # of every pair, by prompt id; 0 = clearest
    is_paired: bool = False  # there are pairs, sound or not
    is_trained: bool = False  # the result is there


def read_round(run: RunFiles) -> RoundFiles:
    """Damage becomes a problem of ``run``."""
    found = RoundFiles(_measured(run), is_trained=(run.run_dir / RESULT).is_dir())
    _read_pairs(run, found)
    return found


# --- what was measured ------------------------------------------------------------------------------------------
def _measured(run: RunFiles) -> Measured:
    found = Measured()
    for row in run.rows(RESPONSES):
        texts = [str(response.get("text", "")) for response in _list(row, "responses") if isinstance(response, dict)]
        num_empty = sum(not text.strip() for text in texts)
        found.num_answered += 1
        found.num_responses += len(texts)
        found.num_empty += num_empty
        if num_empty and (prompt_id := step_of(row, "prompt_id")) is not None:
            found.first_empty.append(prompt_id)
    for row in run.rows(UNCERTAINTY):
        found.num_measured += 1
        for name in UNCERTAINTIES:
            if name in row:
                found.values.setdefault(name, Values()).add(_list(row, name))
    _look_at_end(run, found)
    return found


def _list(row: dict[str, Any], key: str) -> list[Any]:
    values = row.get(key)
    return values if isinstance(values, list) else []


def _look_at_end(run: RunFiles, found: Measured) -> None:
    path = run.run_dir / MEASURED
    if not path.exists():
        return
    found.is_complete = True
    try:
        content = json.loads(path.read_bytes())
        for prompt_id, reason in content.get("left_out", {}).items():
            found.left_out.setdefault(str(reason), []).append(int(prompt_id))
        if found.num_measured < content["prompts"]:
            run.add_problem(
                f"{path}: {content['prompts']:,} prompts were measured, but of only {found.num_measured:,} there is "
                f"anything left in {UNCERTAINTY}"
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        run.add_problem(f"{path} cannot be read: {error!r}")


# --- pairs ------------------------------------------------------------------------------------------------------
def _read_pairs(run: RunFiles, found: RoundFiles) -> None:
    found.is_paired = (run.run_dir / SUMMARY).exists()
    if not found.is_paired:
        return
    try:
        found.summary = read_summary(run.run_dir)
        made = read_pairs(run.run_dir)
        found.pairs, found.stage_by_id = made.pairs, made.stage_by_id
    except (DataError, OSError) as error:
        run.add_problem(f"the pairs cannot be shown: {error}")

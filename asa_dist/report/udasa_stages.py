"""The stages of a round: which Δu each takes, how far it has come, what its held-out pairs say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asa_dist.report.run_files import RunFiles
from asa_dist.report.udasa_round import RoundFiles
from asa_dist.round_inspection import StageReport
from asa_dist.udasa.pairs import stage_ranges

HELDOUT = ("loss", "margin", "accuracy")


@dataclass(frozen=True)
class Training:
    """Of a stage with pairs."""

    turn: int  # in the order of training, from 1
    first_step: int | None  # of the round, finished before it began; None: it has not begun
    report: StageReport
    losses: list[float] = field(default_factory=list)  # of its steps; NaN: not finite
    heldout: dict[str, list[float]] = field(default_factory=dict)  # of its evaluations, by name in HELDOUT

    @property
    def has_ended(self) -> bool:
        return self.report.ended is not None

    @property
    def is_under_way(self) -> bool:
        return self.first_step is not None and not self.has_ended


@dataclass(frozen=True)
class Stage:
    """One of the stages that the thresholds make, with pairs or without."""

    number: int  # from 1, the clearest pairs
    span: str  # its Δu in words
    num_pairs: int
    training: Training | None  # None: it has no pairs, or they cannot be read


def read_stages(run: RunFiles, files: RoundFiles) -> list[Stage]:
    """Every stage, by number; none before there are pairs."""
    if files.summary is None:
        return []
    summary = files.summary.summary
    trained = {training.report.stage: training for training in _trained(run)}
    spans = zip(stage_ranges(summary.thresholds), summary.stage_pairs, strict=True)
    return [
        Stage(number, span, num_pairs, trained.get(number))
        for number, (span, num_pairs) in enumerate(spans, start=1)
    ]  # fmt: skip


def _trained(run: RunFiles) -> list[Training]:
    """In the order of training."""
    if run.inspection is None or run.inspection.round is None:
        return []
    first_step = None if run.state == "not started" else 0
    found = []
    for turn, report in enumerate(run.inspection.round.stages, start=1):
        training = Training(turn, first_step, report)
        if first_step is not None:
            end = first_step + report.steps
            training.losses.extend(run.curve("udasa/loss").between(first_step, end))
            training.heldout.update({name: run.curve(f"eval/{name}").between(first_step, end) for name in HELDOUT})
            first_step = end if training.has_ended else None
        found.append(training)
    return found


def in_turn(stages: list[Stage]) -> list[Training]:
    """Of those with pairs, in the order of training."""
    return sorted((stage.training for stage in stages if stage.training), key=lambda training: training.turn)


def bands(stages: list[Stage]) -> list[dict[str, Any]]:
    """Where each stage stands in the curves, for page.js."""
    return [
        {"from": first, "to": first + training.report.steps, "text": str(training.report.stage)}
        for training in in_turn(stages)
        if (first := training.first_step) is not None and training.report.steps
    ]

"""What `asa inspect` says about a round of UDASA beside checkpoints and events: how far each of its stages has come.

Which pairs a step trains on follows from config, seed and pairs alone (``udasa.curriculum``), but for one thing: that a
stage of the curriculum has ended early, events.jsonl tells. So what was trained can be compared with what was due.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import ConfigError
from asa_dist.config_udasa import CurriculumConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.run_log import read_rows
from asa_dist.trained import Ledger, tally_planned

if TYPE_CHECKING:
    from asa_dist.udasa.curriculum import StagePlan


@dataclass(frozen=True)
class StageReport:
    """One stage of the curriculum."""

    stage: int  # 1 = the clearest pairs
    pairs: int  # to train on
    heldout_pairs: int
    planned_steps: int
    steps: int  # made
    ended: str | None  # why it is over; None: it is not


@dataclass(frozen=True)
class RoundReport:
    """A round's own files."""

    answered: int  # prompts with responses
    measured: int  # those of them with uncertainties
    is_measured: bool  # nothing is missing any more
    is_paired: bool
    has_result: bool  # the round is done
    stages: list[StageReport]  # with pairs, in the order in which they are trained
    problems: list[str]  # of the pairs: then there are no stages here, and what was trained is compared with nothing

    @property
    def phase(self) -> str:
        if not self.is_measured:
            return "measuring"
        return "training" if self.is_paired else "pairing"

    @property
    def num_steps(self) -> int:
        """Those that the round has made when it is over, as far as one can tell now."""
        return sum(stage.planned_steps if stage.ended is None else stage.steps for stage in self.stages)


def look_at_round(
    folder: Path, tree: Mapping[str, Any], events: Iterable[Mapping[str, Any]]
) -> tuple[RoundReport, Ledger]:
    """
    Args:
        tree: the round's config.yaml.
        events: those of events.jsonl.

    Raises:
        ConfigError: a config.yaml that no run has.
        ValueError: a damaged line in the middle of a .jsonl file; names it.
        KeyError, TypeError: a row that no run writes.
    """
    from asa_dist.rounds import RESULT
    from asa_dist.runtime.measurements import MEASURED, RESPONSES, UNCERTAINTY
    from asa_dist.runtime.pair_files import SUMMARY

    plans: Sequence[StagePlan] = ()
    problems: list[str] = []
    try:
        plans = _plans(folder, tree)
    except DataError as error:
        problems.append(str(error))
    ends = _ends(events)
    due_by_step = None if problems else _due_by_step(plans, ends)
    ledger = tally_planned(read_rows(folder / "trained.jsonl"), due_by_step)
    report = RoundReport(
        answered=_num_rows(folder / RESPONSES),
        measured=_num_rows(folder / UNCERTAINTY),
        is_measured=(folder / MEASURED).exists(),
        is_paired=(folder / SUMMARY).exists(),
        has_result=(folder / RESULT).exists(),
        stages=list(_stage_reports(plans, ends, ledger.steps)),
        problems=problems,
    )
    return report, ledger


def as_lines(report: RoundReport) -> list[str]:
    """For people."""
    is_over = "" if report.is_measured else ", not all yet"
    lines = ["round", f"  prompts: {report.answered:,} answered, {report.measured:,} of them measured{is_over}"]
    if not report.is_paired:
        lines.append("  pairs: not made yet")
    for stage in report.stages:
        how_far = "not begun" if stage.steps == 0 else stage.ended or "under way"
        lines.append(
            f"  stage {stage.stage}: {stage.pairs:,} pairs and {stage.heldout_pairs:,} held out; "
            f"{stage.steps:,} of {stage.planned_steps:,} steps: {how_far}"
        )
    return [*lines, *(f"  PROBLEM {problem}" for problem in report.problems)]


def _num_rows(path: Path) -> int:
    return sum(1 for _ in read_rows(path))


# --- what was to be trained ---------------------------------------------------------------------------------------
def _plans(folder: Path, tree: Mapping[str, Any]) -> Sequence[StagePlan]:
    """The stages of the curriculum, as the trainer plans them; none before there are pairs.

    Raises:
        ConfigError: a config.yaml that no run has.
        DataError: pairs that cannot be read, or that are not there although they have been trained on.
    """
    from asa_dist.runtime.pair_files import SUMMARY, read_pairs

    path = folder / "config.yaml"
    try:
        seed, curriculum = int(tree["seed"]), CurriculumConfig.model_validate(tree["udasa"]["curriculum"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: not the resolved config of a run: seed, udasa.curriculum") from None
    if not ((folder / SUMMARY).exists() or (folder / "trained.jsonl").exists()):
        return ()
    from asa_dist.udasa.curriculum import plan_curriculum  # brings torch

    made = read_pairs(folder)
    return plan_curriculum(made.stage_by_id, curriculum, seed, made.round_index)


def _ends(events: Iterable[Mapping[str, Any]]) -> dict[int, tuple[int, str]]:
    """(steps, why) of each stage that is over, by its number from 1; of one that was begun again, only since then."""
    ends: dict[int, tuple[int, str]] = {}
    for event in events:
        match event["event"]:
            case "stage_started" | "stage_resumed":
                ends.pop(event["stage"], None)
            case "stage_finished":
                ends[event["stage"]] = event["steps"], event["reason"]
    return ends


def _due_by_step(plans: Iterable[StagePlan], ends: Mapping[int, tuple[int, str]]) -> Iterator[list[int]]:
    """Prompt ids of the pairs of each step; of a stage that ended early, up to its end."""
    for plan in plans:
        num_steps, _ = ends.get(plan.stage + 1, (plan.num_steps, ""))
        yield from islice(plan.pairs_by_step(), num_steps)


def _stage_reports(
    plans: Iterable[StagePlan], ends: Mapping[int, tuple[int, str]], steps: int
) -> Iterator[StageReport]:
    """
    Args:
        steps: made in all stages together.
    """
    for plan in plans:
        num_steps, ended = ends.get(plan.stage + 1, (plan.num_steps, None))
        made = min(steps, num_steps)
        steps -= made
        yield StageReport(
            plan.stage + 1, len(plan.train_ids), len(plan.heldout_ids), plan.num_steps, made,
            ended if made == num_steps else None)  # fmt: skip

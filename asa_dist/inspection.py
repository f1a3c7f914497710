"""What `asa inspect` says about a run folder: its ledger, its checkpoints, what died. Reads files only.

No torch here, but for a round of UDASA: what its curriculum has planned is computed with it.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asa_dist.config import ConfigError
from asa_dist.config_text import read_tree
from asa_dist.resume import config_path
from asa_dist.round_inspection import RoundReport, as_lines, look_at_round
from asa_dist.runtime.checkpoint_files import (
    ROLLOUTS,
    CheckpointError,
    CheckpointFolder,
    list_checkpoints,
    list_set_aside,
    read_manifest,
    verify_files,
)
from asa_dist.runtime.ownership import Owner, read_owner
from asa_dist.runtime.run_lock import lock_holder
from asa_dist.runtime.run_log import read_events, read_rows
from asa_dist.trained import Ledger, tally

SHOWN_EVENTS = 10
SHOWN_IDS = 5
UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
ROUTINE_EVENTS = {"checkpoint", "worker_started", "worker_ready"}  # counted, but not listed


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint and its verdict."""

    name: str
    step: int
    problems: list[str]  # each names the file; empty: complete
    num_ranks: int | None = None  # None, here and below: the manifest is damaged
    zero_stage: int | None = None
    bytes: int | None = None
    versions: dict[str, str] | None = None
    open_prompts: int | None = None  # handed out, not yet trained on; None also: it holds no rollouts
    open_groups: int | None = None  # those of them that are answered


@dataclass(frozen=True)
class Inspection:
    """Everything that `asa inspect` shows."""

    run_dir: str
    resumed_as: str  # the folder to go on with: of a round of UDASA that of its run
    num_steps: int  # to be made: train.steps, or those of all stages of the round's curriculum
    worked_on_by: str | None  # None: nobody, on this host
    owner: Owner | None  # the newest start of training, at work or not; None: there was none
    ledger: Ledger
    checkpoints: list[CheckpointReport]  # newest first
    set_aside: list[str]  # names of damaged ones without which the run went on
    events: dict[str, int]  # how many of each
    last_events: list[dict[str, Any]]  # without routine ones
    round: RoundReport | None  # of UDASA
    has_more_rounds: bool = False  # than this one and those before it

    @property
    def step(self) -> int | None:
        """Of the newest complete checkpoint: where the run goes on."""
        return next((report.step for report in self.checkpoints if not report.problems), None)

    @property
    def status(self) -> str:
        if self.worked_on_by is not None:
            return f"running ({self.worked_on_by}), {self._reached}"
        resume = f"asa resume {shlex.quote(self.resumed_as)}"
        if self._is_finished:
            more = f"; more rounds are to come: {resume}" if self.has_more_rounds else ""
            return f"finished, {self.step or self.ledger.steps} steps{more}"
        if self.step is None and self.checkpoints:
            return "stopped; NONE of its checkpoints can be used"
        if self.step is None:
            what = "no checkpoint yet" if self.round is None else f"{self.round.phase}, no checkpoint yet"
            return f"stopped; {what}; start again with: {resume}"
        return f"stopped after step {self.step} of {self.num_steps}; go on with: {resume}"

    @property
    def _reached(self) -> str:
        if self.round is not None and not self.round.is_paired:
            return self.round.phase
        return f"step {self.ledger.steps} of {self.num_steps}"

    @property
    def _is_finished(self) -> bool:
        return self.round.has_result if self.round else self.step is not None and self.step >= self.num_steps

    @property
    def is_sound(self) -> bool:
        """No prompt lost or repeated, pairs that can be read; and if there are checkpoints, one of them can be used."""
        is_whole = not (self.ledger.lost or self.ledger.repeated or (self.round and self.round.problems))
        return is_whole and (self.step is not None or not self.checkpoints)


def inspect_run(run_dir: Path, *, is_quick: bool, progress: Callable[[str], None]) -> Inspection:
    """
    Args:
        run_dir: of UDASA the folder of a round.
        is_quick: compare the sizes of checkpoint files only; else their checksums: reads every byte.
        progress: is told which file is read next.

    Raises:
        ConfigError: no run folder, or files in it that are none of a run's.
    """
    path = config_path(run_dir)
    tree = read_tree(path)
    resumed_as, round_report = run_dir, None
    try:
        events = list(read_events(run_dir))
        counts = Counter(str(event["event"]) for event in events)
        if tree.get("method") == "udasa":
            resumed_as = run_dir.resolve().parent
            round_report, ledger = look_at_round(run_dir, tree, events)
            num_steps = round_report.num_steps
        else:
            num_steps, prompts_per_step = _lengths(path, tree)
            ledger = tally(read_rows(run_dir / "trained.jsonl"), prompts_per_step)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run_dir}: a row of trained.jsonl or events.jsonl that no run writes: {error!r}") from None
    return Inspection(
        run_dir=str(run_dir),
        resumed_as=str(resumed_as),
        num_steps=num_steps,
        worked_on_by=_holder(run_dir, resumed_as, round_report),
        owner=read_owner(run_dir),
        ledger=ledger,
        checkpoints=[examine(checkpoint, is_quick, progress) for checkpoint in list_checkpoints(run_dir)],
        set_aside=list_set_aside(run_dir),
        events=dict(sorted(counts.items())),
        last_events=[event for event in events if event["event"] not in ROUTINE_EVENTS][-SHOWN_EVENTS:],
        round=round_report,
        has_more_rounds=round_report is not None and _number_of(run_dir) < tree["udasa"].get("rounds", 1),
    )


def _number_of(round_folder: Path) -> int:
    """From 1; a folder of another name is not in its run any more."""
    number = round_folder.resolve().name.removeprefix("round-")
    return int(number) if number.isdecimal() else 1


def _lengths(path: Path, tree: Mapping[str, Any]) -> tuple[int, int]:
    """(train.steps, rollout.prompts_per_step)."""
    try:
        return int(tree["train"]["steps"]), int(tree["rollout"]["prompts_per_step"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}: not the resolved config of a run: train.steps, rollout.prompts_per_step") from None


def _holder(run_dir: Path, resumed_as: Path, round_report: RoundReport | None) -> str | None:
    """Who works on it. Rounds that are done are left alone by whoever works on the next one."""
    if round_report is not None and round_report.has_result:
        return None
    return lock_holder(run_dir) or lock_holder(resumed_as)


# --- checkpoints ------------------------------------------------------------------------------------------------
def examine(checkpoint: CheckpointFolder, is_quick: bool, progress: Callable[[str], None]) -> CheckpointReport:
    """The verdict on one checkpoint."""
    try:
        manifest = read_manifest(checkpoint.path)
    except CheckpointError as error:
        return CheckpointReport(checkpoint.name, checkpoint.step, [str(error)])
    problems: list[str] = []
    for name, record in manifest.files.items():
        progress(f"{checkpoint.name}/{name}, {in_units(record.bytes)}")
        problems += verify_files(checkpoint.path, {name: record}, sizes_only=is_quick)
    open_prompts, open_groups = None, None
    if ROLLOUTS in manifest.files and not any(problem.startswith(ROLLOUTS) for problem in problems):
        try:
            open_prompts, open_groups = _open_rollouts(checkpoint.path / ROLLOUTS)
        except ValueError as error:
            problems.append(f"{ROLLOUTS}: {error}")
    return CheckpointReport(
        name=checkpoint.name,
        step=checkpoint.step,
        problems=problems,
        num_ranks=manifest.num_ranks,
        zero_stage=manifest.zero_stage,
        bytes=sum(record.bytes for record in manifest.files.values()),
        versions=manifest.versions,
        open_prompts=open_prompts,
        open_groups=open_groups,
    )


def _open_rollouts(path: Path) -> tuple[int, int]:
    """(prompts, groups) that wait for their step."""
    from asa_dist.rollout.snapshot import load_snapshot

    steps = load_snapshot(path.read_bytes()).steps
    return sum(len(step.prompts) for step in steps), sum(len(step.groups) for step in steps)


# --- for people, for programs -----------------------------------------------------------------------------------
def as_json(found: Inspection) -> str:
    """One object, with the derived values too."""
    derived = {"status": found.status, "step": found.step, "is_sound": found.is_sound}
    return json.dumps(asdict(found) | derived, indent=1, ensure_ascii=False)


def as_text(found: Inspection) -> str:
    ledger = found.ledger
    what = "prompts" if found.round is None else "pairs"
    lines = [
        f"{found.run_dir}: {found.status}",
        *(as_lines(found.round) if found.round else ()),
        *([f"start {owner.generation}: {owner}, at {owner.time}"] if (owner := found.owner) else ()),
        "ledger",
        f"  trained: {ledger.trained:,} {what} in {ledger.steps:,} steps, {ledger.skipped_steps:,} of them skipped",
        f"  lost: {_ids(ledger.lost)}; repeated: {_ids(ledger.repeated)}",
        "checkpoints" + (", newest first" if found.checkpoints else ": none"),
        *(line for report in found.checkpoints for line in _checkpoint_lines(report)),
        *(f"  {name}  set aside: the run went on without it, from an older one" for name in found.set_aside),
        "events" + ("" if found.events else ": none"),
    ]
    if found.events:
        lines.append("  " + ", ".join(f"{count} {event}" for event, count in found.events.items()))
    for event in found.last_events:
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        lines.append(f"  {event.get('time', '?')} {event['event']}: {details}".rstrip(": "))
    return "\n".join(lines)


def _checkpoint_lines(report: CheckpointReport) -> list[str]:
    if report.versions is None:
        what = "unknown content"
    else:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        what = f"{report.num_ranks} rank(s), ZeRO-{report.zero_stage}, {in_units(report.bytes or 0)}; {versions}"
    if report.open_prompts is not None:
        what += f"; {report.open_prompts} prompts open, {report.open_groups} of them answered"
    verdict = "DAMAGED " if report.problems else "complete"
    return [f"  {report.name}  {verdict}  {what}", *(f"    {problem}" for problem in report.problems)]


def _ids(ids: list[int]) -> str:
    if not ids:
        return "0"
    more = ", …" if len(ids) > SHOWN_IDS else ""
    return f"{len(ids):,} (prompts {', '.join(map(str, ids[:SHOWN_IDS]))}{more})"


def in_units(num_bytes: int) -> str:
    """With three digits and a decimal unit: 2.35 MB."""
    size, unit = float(num_bytes), 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {UNITS[unit]}"

"""What was found, what follows from it, and both as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "limited", "not known", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: limited = works only in part, or is not there and no run has to have it; not known = no answer in time;
            broken = is there or has to be there, and does not work.
        found: with versions and numbers.
        advice: what to do; "" if there is nothing to be done.
        is_needed: no run starts without it.
    """

    name: str
    state: State
    found: str
    advice: str = ""
    is_needed: bool = False


@dataclass(frozen=True)
class Ability:
    """Possible if nothing that every run needs is broken, and the findings named in ``needs`` are ok.

    Attributes:
        is_tried: the findings include a trial of it; otherwise it is only likely.
    """

    name: str
    needs: tuple[str, ...] = ()
    is_tried: bool = True


ABILITIES = (
    Ability("train on the CPU"),
    Ability("train on GPUs", ("GPUs", "NCCL")),
    Ability("flash attention", ("GPUs", "flash-attn"), is_tried=False),
    Ability("rollout.engine vllm", ("vllm",), is_tried=False),
    Ability("optimizer offload to the CPU", ("C++ compiler", "ninja"), is_tried=False),
    Ability("sources of kind parquet", ("pyarrow",)),
    Ability("sources of kind dataset", ("datasets",)),
    Ability("asa report", ("plotly",)),
    Ability("W&B", ("wandb",)),
    Ability("lm-eval tasks", ("lm-eval",)),
    Ability("jobs under Slurm", ("Slurm",), is_tried=False),
    Ability("several machines over InfiniBand", ("hostname", "InfiniBand"), is_tried=False),
)


def every_run_can_start(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken that every run needs: the exit code of `asa doctor`."""
    return not any(finding.is_needed and finding.state == "broken" for finding in findings)


def _obstacle(ability: Ability, findings: Sequence[Finding]) -> Finding | None:
    """What is in its way: first what surely is, its own before what is in every run's; then what is not known."""
    by_name = {finding.name: finding for finding in findings}
    own = [by_name.get(name, Finding(name, "not known", "not looked at")) for name in ability.needs]
    every_runs = [finding for finding in findings if finding.is_needed]
    sure = [need for need in own if need.state in ("limited", "broken")]
    sure += [need for need in every_runs if need.state == "broken"]
    return next(iter(sure + [need for need in own + every_runs if need.state == "not known"]), None)


def _to_do(findings: Sequence[Finding]) -> list[str]:
    """Advice on what is broken, what every run needs first; the same advice once."""
    urgent = sorted(findings, key=lambda finding: not finding.is_needed)
    return list(dict.fromkeys(finding.advice for finding in urgent if finding.advice and finding.state == "broken"))


def as_text(findings: Sequence[Finding]) -> str:
    """A line per finding with its advice below it, then what can be done, what can't, and what to do."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:9}  {finding.name:{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':9}  {'':{width}}  → {finding.advice}")
    return "\n".join([*lines, "", *_summary(findings)])


def _summary(findings: Sequence[Finding]) -> list[str]:
    can: list[str] = []
    should: list[str] = []
    not_known: list[str] = []
    cannot: dict[Finding, list[str]] = {}
    for ability in ABILITIES:
        obstacle = _obstacle(ability, findings)
        if obstacle is None:
            (can if ability.is_tried else should).append(ability.name)
        elif obstacle.state == "not known":
            not_known.append(f"{ability.name} ({obstacle.name})")
        else:
            cannot.setdefault(obstacle, []).append(ability.name)
    lines = [f"can: {', '.join(can) or 'nothing'}"]
    if should:
        lines.append(f"should, but was not tried: {', '.join(should)}")
    if not_known:
        lines.append(f"not known: {', '.join(not_known)}; run it again, on an idle machine if you can")
    for obstacle, names in cannot.items():
        lines.append(f"can't: {', '.join(names)}, because of {obstacle.name}: {obstacle.found}")
    return lines + [f"do: {advice}" for advice in _to_do(findings)]


def as_json(findings: Sequence[Finding]) -> str:
    """One object: findings, can, should (not tried), not_known and cannot (name: what is in the way), do."""
    verdicts = [(ability, _obstacle(ability, findings)) for ability in ABILITIES]
    in_the_way = [(ability.name, obstacle) for ability, obstacle in verdicts if obstacle is not None]
    return json.dumps(
        {
            "every_run_can_start": every_run_can_start(findings),
            "findings": [asdict(finding) for finding in findings],
            "can": [ability.name for ability, obstacle in verdicts if obstacle is None and ability.is_tried],
            "should": [ability.name for ability, obstacle in verdicts if obstacle is None and not ability.is_tried],
            "not_known": {name: found.name for name, found in in_the_way if found.state == "not known"},
            "cannot": {name: found.name for name, found in in_the_way if found.state != "not known"},
            "do": _to_do(findings),
        },
        indent=1,
        ensure_ascii=False,
    )

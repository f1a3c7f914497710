"""What the report knows of a run: its files, as far as they can be read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from asa_dist.config import Config, ConfigError
from asa_dist.config_text import read_tree
from asa_dist.inspection import Inspection, inspect_run
from asa_dist.report.curves import Curve, is_number, read_curves
from asa_dist.resume import config_path
from asa_dist.runtime.run_lock import lock_holder
from asa_dist.runtime.run_log import read_events, read_rows

EVAL_LOG = "evals.jsonl"  # of `asa eval`
ENDS = ("finished", "stopped")  # events that say how it ended
BEGINNINGS = ("started", "resumed")


@dataclass
class RunFiles:
    """Whatever is missing is empty; whatever is damaged is named in ``problems``."""

    run_dir: Path
    tree: dict[str, Any]  # config.yaml, as it stands there
    worked_on_by: str | None  # None: nobody
    wrong_keys: set[str] = field(default_factory=set)  # dotted, of values in ``tree`` that the schema refuses
    problems: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)  # of metrics.jsonl, by key
    events: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    inspection: Inspection | None = None  # None: it cannot be made, see problems

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Rows of a .jsonl file, up to the first damaged one that has sound ones after it: that is a problem."""
        try:
            yield from read_rows(self.run_dir / name)
        except ValueError as error:
            self.add_problem(f"{error}; what stands after it in this file is not shown")
        except OSError as error:
            self.add_problem(f"{self.run_dir / name} cannot be read: {error.strerror}")

    def add_problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def setting(self, key: str) -> Any:
        """Of the run's config by dotted key, or the default: it may be older than a field, or have a wrong value."""
        parts = key.split(".")
        is_wrong = any(f"{key}.".startswith(f"{wrong}.") for wrong in self.wrong_keys)
        node: Any = {} if is_wrong else self.tree
        for part in parts:
            if not isinstance(node, dict) or part not in node:
                return functools.reduce(getattr, parts, Config())
            node = node[part]
        return node

    def curve(self, key: str) -> Curve:
        """Empty, if the run has not logged it."""
        return self.curves.get(key, Curve())

    @property
    def is_round(self) -> bool:
        """Of a run of UDASA, whose folder stands around it."""
        return bool(self.setting("method") == "udasa")

    @property
    def resumed_folder(self) -> Path:
        """What `asa resume` takes."""
        return self.run_dir.resolve().parent if self.is_round else self.run_dir

    @property
    def name(self) -> str:
        """For people."""
        folder = self.run_dir.resolve()
        return f"{folder.parent.name}, {folder.name}" if self.is_round else folder.name

    @property
    def last_step(self) -> int:
        """The last one in metrics.jsonl; 0 before the first."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=0)

    @property
    def state(self) -> str:
        """running, finished, stopped (as asked), crashed (ended without a word), or not started."""
        under_way = "running" if self.worked_on_by is not None else "finished" if self._is_complete else "crashed"
        for event in reversed(self.events):
            if event["event"] in ENDS:
                return event["event"]
            if event["event"] in BEGINNINGS:
                return under_way
        return under_way if self.curves or under_way != "crashed" else "not started"

    @property
    def _is_complete(self) -> bool:
        """Its last checkpoint is that of the last step."""
        found = self.inspection
        return bool(found and found.step is not None and found.num_steps is not None and found.step >= found.num_steps)

    @property
    def aligned_since(self) -> int | None:
        """The first step with β > 0; None: there is none."""
        beta = self.curve("trust/beta")
        return next((step for step, value in zip(beta.steps, beta.values, strict=True) if value > 0), None)


def read_run(run_dir: Path) -> RunFiles:
    """
    Raises:
        ConfigError: no run folder, or its config.yaml is no YAML.
    """
    run = RunFiles(run_dir, read_tree(config_path(run_dir)), lock_holder(run_dir))
    _look_at_config(run)
    run.curves = read_curves(run.rows("metrics.jsonl"))
    try:
        run.events = [{**event, "event": str(event.get("event"))} for event in read_events(run_dir)]
    except OSError as error:
        run.add_problem(f"{run_dir / 'events.jsonl'} cannot be read: {error.strerror}")
    run.evals = [row for row in run.rows(EVAL_LOG) if any(map(is_number, row.values()))]
    try:
        run.inspection = inspect_run(run_dir, is_quick=True, progress=lambda message: None)
    except (ConfigError, OSError) as error:
        run.add_problem(f"ledger and checkpoints cannot be shown: {error}")
    return run


def _look_at_config(run: RunFiles) -> None:
    """Notes what the schema refuses. Keys that it does not know are no problem: the run may be older, or newer."""
    try:
        Config.model_validate(run.tree)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] != "extra_forbidden":
                key = ".".join(map(str, problem["loc"]))
                run.wrong_keys.add(key)
                run.add_problem(f"config.yaml: {key} = {problem['input']!r}: {problem['msg']}; the default is shown")

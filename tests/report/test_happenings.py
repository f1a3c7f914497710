"""What happened: ends nobody wrote down, steps of events without one, marks on the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asa_dist.report import write_report
from asa_dist.report.happenings import DIED, MAX_LINES, MAX_MARKS, happenings, marks, table_lines
from asa_dist.report.run_files import read_run
from asa_dist.runtime.run_lock import hold_run_folder
from tests.report.report_runs import STARTED, end, write_report_run
from tests.run_folders import write_run


def event(name: str, minute: int, **details: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T00:{minute:02d}:00+00:00", "event": name, **details}


def test_states(tmp_path: Path) -> None:
    write_run(tmp_path / "new")
    assert read_run(tmp_path / "new").state == "not started"
    assert read_run(write_report_run(tmp_path / "a")).state == "finished"
    assert read_run(write_report_run(tmp_path / "b", 60, STARTED, end("stopped", 60))).state == "stopped"
    crashed = write_report_run(tmp_path / "c", 60, STARTED)
    assert read_run(crashed).state == "crashed"
    with hold_run_folder(crashed):
        assert read_run(crashed).state == "running"


def test_a_crash_a_resume_and_a_worker(tmp_path: Path) -> None:
    run = write_report_run(
        tmp_path / "run", 100, STARTED, event("checkpoint", 4, step=40, bytes=379_000),
        event("worker_died", 6, worker="worker-0", reason="its process ended"), event("checkpoint", 8, step=80),
        event("step_skipped", 9, step=95, reason="nan"), event("resumed", 20, step=80), event("finished", 30, step=100),
    )  # fmt: skip
    found = happenings(read_run(run))
    assert [happening.event for happening in found] == [
        "started", "checkpoint", "worker_died", "checkpoint", "step_skipped", DIED, "resumed", "finished"]
    assert found[1].details == "bytes 379 kB"
    worker = found[2]
    assert worker.step == 60 and worker.is_estimated and worker.details == "worker worker-0, reason its process ended"
    assert [happening.is_undone for happening in found] == [False] * 4 + [True] + [False] * 3
    assert marks(found) == [
        {"step": 60, "kind": "bad", "text": "about step 60: worker died"},
        {"step": 80, "kind": "plain", "text": "step 80: resumed"},
    ]


def test_a_crash_is_marked_at_the_last_step(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run", 60, STARTED)
    (run / "stacks").mkdir()
    (run / "stacks/rank-0.txt").write_text("")
    last = happenings(read_run(run))[-1]
    assert (last.event, last.step, last.details) == (DIED, 60, "what every thread was doing: stacks/rank-0.txt")


@pytest.mark.parametrize("names", [["checkpoint"], ["worker_died", "worker_started"]])
def test_many_events_stay_readable(tmp_path: Path, names: list[str]) -> None:
    events = [event(name, step // 60 % 60, step=step) for step in range(1000) for name in names]
    found = happenings(read_run(write_report_run(tmp_path / "run", 60, STARTED, *events, end("finished", 60))))
    lines, left_out = table_lines(found)
    assert len(lines) <= MAX_LINES and len(marks(found)) <= MAX_MARKS
    assert lines[0].event == "started" and lines[-1].event == "finished"
    if len(names) == 1:
        assert left_out == 0 and lines[1].count == 1000
    else:
        assert left_out == 2002 - MAX_LINES


@pytest.mark.parametrize("step", [2**63, 10**400, True, -1, "5"])
def test_steps_that_no_run_writes_are_estimated(tmp_path: Path, step: Any) -> None:
    run = write_report_run(
        tmp_path / "run", 60, STARTED, event("checkpoint", 4, step=40, bytes=10**400),
        event("worker_died", 6, step=step), event("checkpoint", 8, step=60, bytes="many"), end("finished", 60),
        {"time": "0001-01-01T00:00:00+14:00", "event": "worker_started"})  # fmt: skip
    found = happenings(read_run(run))
    assert [happening.step for happening in found] == [0, 40, 50, 60, 60, None] and found[2].is_estimated
    assert write_report(run).is_file()


def test_events_that_no_run_writes(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run", 60, STARTED)
    with (run / "events.jsonl").open("a") as file:
        file.write('nonsense\n{"event": "worker_died"}\n{"time": 5, "step": "x"}\n{"event": "stop')
    assert [happening.event for happening in happenings(read_run(run))] == [
        "started", "unreadable", "worker_died", "None", DIED]

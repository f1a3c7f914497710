"""`asa inspect`: what is sound is called sound, and every kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_dist.cli import main
from asa_dist.inspection import Inspection, in_units, inspect_run
from asa_dist.records import LedgerSnapshot, OpenStep, Prompt, Response, RolloutGroup
from asa_dist.runtime.checkpoint_files import set_aside
from asa_dist.runtime.ownership import take_over
from asa_dist.runtime.run_lock import hold_run_folder
from tests.run_folders import flip_a_bit, write_checkpoint, write_rows, write_run, write_trained


def look(run_dir: Path, is_quick: bool = False) -> Inspection:
    return inspect_run(run_dir, is_quick=is_quick, progress=lambda message: None)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Stopped after step 6 of 10, two checkpoints, 4 prompts per step."""
    folder = tmp_path / "run"
    config = write_run(folder, "rollout.prompts_per_step=4")
    write_trained(folder, config, 6)
    write_rows(folder, "events", {"time": "2026-01-01T00:00:00+00:00", "event": "started", "step": 0})
    write_checkpoint(folder, 3)
    write_checkpoint(folder, 6)
    return folder


# --- status -------------------------------------------------------------------------------------------------------
def test_a_stopped_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = in_units(sum(path.stat().st_size for path in (run_dir / "checkpoints/step-00000006").rglob("*.safetensors")))
    assert main(["inspect", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"""\
{run_dir}: stopped after step 6 of 10; go on with: asa resume {run_dir}
ledger
  trained: 24 prompts in 6 steps, 0 of them skipped
  lost: 0; repeated: 0
checkpoints, newest first
  step-00000006  complete  2 rank(s), ZeRO-3, {size}; asa_dist 1.0, torch 2.0; 0 prompts open, 0 of them answered
  step-00000003  complete  2 rank(s), ZeRO-3, {size}; asa_dist 1.0, torch 2.0; 0 prompts open, 0 of them answered
events
  1 started
  2026-01-01T00:00:00+00:00 started: step 0
"""


def test_status(run_dir: Path, tmp_path: Path) -> None:
    with hold_run_folder(run_dir):
        assert look(run_dir).status.startswith("running (process ")
        assert look(run_dir).status.endswith(" works on it), step 6 of 10")
    write_checkpoint(run_dir, 10)
    assert look(run_dir).status == "finished, 10 steps"
    write_run(tmp_path / "new")
    new = look(tmp_path / "new")
    assert new.status == f"stopped; no checkpoint yet; start again with: asa resume {tmp_path / 'new'}"
    assert new.is_sound


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_who_trained_last(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        take_over(run_dir)
    assert main(["inspect", str(run_dir), "--json"]) == 0
    owner = json.loads(capsys.readouterr().out)["owner"]
    assert owner["generation"] == 2
    assert main(["inspect", str(run_dir), "--quick"]) == 0
    shown = capsys.readouterr().out.splitlines()[1]
    assert shown == f"start 2: {owner['by']}, on host {owner['host']}, at {owner['time']}"


# --- ledger -------------------------------------------------------------------------------------------------------
def test_a_lost_and_a_repeated_prompt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(run_dir, "trained",
               {"step": 1, "prompt_ids": [0, 1, 2, 3]}, {"step": 2, "prompt_ids": [4, 1, 6, 7], "skipped": True},
               {"step": 3, "prompt_ids": [8, 9, 10, 11]})
    assert main(["inspect", str(run_dir)]) == 1
    printed = capsys.readouterr().out
    assert "  trained: 11 prompts in 3 steps, 1 of them skipped\n" in printed
    assert "  lost: 1 (prompts 5); repeated: 1 (prompts 1)\n" in printed


def test_a_step_that_is_missing(run_dir: Path) -> None:
    write_rows(run_dir, "trained", {"step": 1, "prompt_ids": [0, 1, 2, 3]}, {"step": 3, "prompt_ids": [8, 9, 10, 11]})
    assert look(run_dir).ledger.lost == [4, 5, 6, 7] and not look(run_dir).is_sound


def test_a_step_trained_twice(run_dir: Path) -> None:
    write_rows(run_dir, "trained", *[{"step": 1, "prompt_ids": [0, 1, 2, 3]}] * 3)
    assert look(run_dir).ledger.repeated == [0, 1, 2, 3] and not look(run_dir).is_sound


def test_a_line_that_was_cut_off_is_not_there(run_dir: Path) -> None:
    with (run_dir / "trained.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "prompt_ids": [24, 25')
    assert look(run_dir).ledger.trained == 24 and look(run_dir).is_sound


@pytest.mark.parametrize(("line", "message"), [
    ("not JSON", "{}/trained.jsonl, line 1: no JSON object"),
    ('{"steps": 1}', "{}: a row of trained.jsonl or events.jsonl that no run writes: KeyError('step')"),
    ('{"step": 7, "prompt_ids": null}', "{}: a row of trained.jsonl or events.jsonl that no run writes: TypeError("),
])
def test_a_line_that_no_run_writes(
    run_dir: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    text = (run_dir / "trained.jsonl").read_text()
    (run_dir / "trained.jsonl").write_text(f"{line}\n{text}")
    assert main(["inspect", str(run_dir)]) == 2
    assert capsys.readouterr().err.startswith(f"asa: {message.format(run_dir)}")


def test_open_prompts(run_dir: Path) -> None:
    prompts = tuple(Prompt(prompt_id, 0, np.arange(3, dtype=np.int32)) for prompt_id in range(24, 28))
    response = Response(np.ones(2, np.int32), np.zeros(2, np.float32), np.zeros(2, np.float32), True, ((0, 5),))
    groups = tuple(RolloutGroup(6, index, prompts[index], (response,) * 2) for index in (0, 2, 3))
    write_checkpoint(run_dir, 7, LedgerSnapshot(6, (OpenStep(6, prompts, groups),)))
    newest = look(run_dir).checkpoints[0]
    assert (newest.open_prompts, newest.open_groups) == (4, 3)


# --- checkpoints --------------------------------------------------------------------------------------------------
def test_a_changed_byte(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest is damaged: the run goes on from the one before."""
    flip_a_bit(run_dir / "checkpoints/step-00000006/shards/rank-00001.safetensors")
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "stopped after step 3 of 10" in printed
    assert "  step-00000006  DAMAGED   2 rank(s)" in printed
    assert "    shards/rank-00001.safetensors: its checksum does not match: bytes were changed\n" in printed
    assert look(run_dir, is_quick=True).step == 6, "sizes only"


@pytest.mark.parametrize("is_quick", [False, True])
def test_files_that_are_cut_off_or_missing(run_dir: Path, is_quick: bool) -> None:
    shards = run_dir / "checkpoints/step-00000006/shards"
    (shards / "rank-00000.safetensors").write_bytes(bytes(10))
    (shards / "rank-00001.safetensors").unlink()
    (run_dir / "checkpoints/step-00000003/manifest.json").write_text("{")
    found = look(run_dir, is_quick)
    newest, oldest = found.checkpoints
    assert newest.problems[0] == "shards/rank-00000.safetensors: 10 bytes instead of 1,000"
    assert newest.problems[1].startswith("shards/rank-00001.safetensors: ") and len(newest.problems) == 2
    assert len(oldest.problems) == 1 and oldest.problems[0].startswith("manifest.json: ")
    assert found.status == "stopped; NONE of its checkpoints can be used" and not found.is_sound


def test_what_was_set_aside(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_aside(run_dir, run_dir, "step-00000006")
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "stopped after step 3 of 10" in printed
    assert "\n  damaged-step-00000006  set aside: the run went on without it, from an older one\n" in printed
    assert look(run_dir).set_aside == ["damaged-step-00000006"]


def test_it_says_what_it_reads(run_dir: Path) -> None:
    said: list[str] = []
    inspect_run(run_dir, is_quick=False, progress=said.append)
    assert said[0] == "step-00000006/shards/rank-00000.safetensors, 1 kB" and len(said) == 6


def test_units() -> None:
    assert [in_units(size) for size in (0, 999, 1000, 2_345_678, 10**15)] == [
        "0 bytes", "999 bytes", "1 kB", "2.35 MB", "1 PB"]


# --- events -------------------------------------------------------------------------------------------------------
def test_deaths_and_restarts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    death = {"time": "T1", "event": "worker_died", "worker": "worker-0", "reason": "its process ended"}
    write_rows(run_dir, "events", {"time": "T0", "event": "started"}, death, {"time": "T1", "event": "worker_started"},
               *[{"time": "T2", "event": "checkpoint", "step": step} for step in range(30)],
               {"time": "T3", "event": "resumed", "step": 6, "ranks": 2})
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "  30 checkpoint, 1 resumed, 1 started, 1 worker_died, 1 worker_started\n" in printed
    assert printed.endswith("  T0 started\n  T1 worker_died: worker worker-0, reason its process ended\n"
                            "  T3 resumed: step 6, ranks 2\n")


def test_damaged_logs_after_a_loss_of_power(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run_dir / "trained.jsonl").open("ab") as file:
        file.write(bytes(4096) + b"\n" + bytes(100))
    with (run_dir / "events.jsonl").open("ab") as file:
        file.write(bytes(4096) + b"\n" + b'{"time": "T", "event": "stopped", "step": 6}\n')
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "  trained: 24 prompts in 6 steps" in printed and "  1 started, 1 stopped, 1 unreadable\n" in printed
    assert printed.endswith("  ? unreadable: line 2\n  T stopped: step 6\n")


def test_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run_dir), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["is_sound"] and found["step"] == 6 and found["status"].startswith("stopped after step 6")
    assert found["ledger"] == {"steps": 6, "trained": 24, "lost": [], "repeated": [], "skipped_steps": 0}
    assert [report["name"] for report in found["checkpoints"]] == ["step-00000006", "step-00000003"]
    assert found["checkpoints"][0]["problems"] == [] and found["events"] == {"started": 1}

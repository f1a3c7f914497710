"""`asa inspect` of a round of UDASA: what the real loop has trained is called sound, and every departure is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_dist.config import Config, ConfigError, dump_config
from asa_dist.config_udasa import CurriculumConfig, UdasaConfig
from asa_dist.inspection import Inspection, as_json, as_text, inspect_run
from asa_dist.runtime.measurements import MEASURED, RESPONSES, UNCERTAINTY
from asa_dist.runtime.pair_files import PAIRS, SUMMARY, RoundPairs, write_pairs
from asa_dist.runtime.run_lock import hold_run_folder
from asa_dist.udasa.pairs import PairSet, summarize_pairs
from tests.run_folders import flip_a_bit, write_checkpoint, write_rows
from tests.udasa.local_run import NUM_PAIRS, SETTINGS, LocalRun, local_run, pair

Rows = list[dict[str, Any]]
LEARNS = {"learning_rates": [3.0, 5.0]}
STOPS_EARLY = {"learning_rates": [1e-30], "pairs_per_step": 1, "patience": 1}  # nothing moves: nothing gets better


def look(folder: Path) -> Inspection:
    return inspect_run(folder, is_quick=False, progress=lambda message: None)


def write_round(run_dir: Path, curriculum: dict[str, Any]) -> Path:
    """Measured and paired, as of tests/udasa/local_run.py."""
    folder = run_dir / "round-1"
    folder.mkdir(parents=True)
    settings = UdasaConfig(curriculum=CurriculumConfig(**{**SETTINGS, **curriculum}))
    (folder / "config.yaml").write_text(dump_config(Config(method="udasa", seed=3, udasa=settings)), encoding="utf-8")
    for name in (RESPONSES, UNCERTAINTY):
        write_rows(folder, name.removesuffix(".jsonl"), *({"prompt_id": number} for number in range(NUM_PAIRS + 1)))
    (folder / MEASURED).touch()
    pairs = tuple(map(pair, range(NUM_PAIRS)))
    summary = summarize_pairs(PairSet(pairs, {NUM_PAIRS: "tie"}), np.array([0.4, 0.7]))
    stage_by_id = {number: number % 3 for number in range(NUM_PAIRS)}
    write_pairs(folder, RoundPairs(pairs, stage_by_id, 0, summary, {NUM_PAIRS: "tie"}, {}), {})
    return folder


def write_logs(folder: Path, run: LocalRun) -> None:
    """What the loop told its recorder."""
    write_rows(folder, "trained", *trained_rows(run))
    write_rows(folder, "events", *({"time": "T", "event": name, **details} for name, details in run.recorder.events))


def trained_rows(run: LocalRun) -> Rows:
    return [{"step": step, "prompt_ids": ids} for step, ids in enumerate(run.recorder.prompt_ids, start=1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three stages of three steps, all trained; the result is not written yet."""
    folder = write_round(tmp_path / "run", LEARNS)
    run = local_run(tmp_path, **LEARNS)
    run.loop.run()
    write_logs(folder, run)
    write_checkpoint(folder, 6)
    write_checkpoint(folder, 9)
    return folder


# --- what is sound ------------------------------------------------------------------------------------------------
def test_a_round_whose_training_is_done(folder: Path) -> None:
    found = look(folder)
    assert found.is_sound and as_text(found).startswith(f"""\
{folder}: stopped after step 9 of 9; go on with: asa resume {folder.parent}
round
  prompts: 28 answered, 28 of them measured
  stage 1: 8 pairs and 1 held out; 3 of 3 steps: all planned steps are done
  stage 2: 8 pairs and 1 held out; 3 of 3 steps: all planned steps are done
  stage 3: 8 pairs and 1 held out; 3 of 3 steps: all planned steps are done
ledger
  trained: 24 pairs in 9 steps, 0 of them skipped
  lost: 0; repeated: 0
checkpoints, newest first
  step-00000009  complete""")
    (folder / "result").mkdir()
    with hold_run_folder(folder.parent):  # it works on the next round
        assert look(folder).status == "finished, 9 steps"


def test_a_round_before_others(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 1", "rounds: 3"))
    (folder / "result").mkdir(exist_ok=True)
    assert "; more rounds are to come: asa resume " in look(folder).status
    config.write_text(config.read_text().replace("rounds: 3", "rounds: 1"))
    assert "more rounds" not in look(folder).status


def test_stages_that_ended_early(tmp_path: Path) -> None:
    folder, run = write_round(tmp_path / "run", STOPS_EARLY), local_run(tmp_path, **STOPS_EARLY)
    run.loop.run()
    write_logs(folder, run)
    found = look(folder)
    assert found.is_sound and found.num_steps == found.ledger.steps == 12
    assert [(stage.steps, stage.planned_steps) for stage in found.round.stages] == [(4, 8)] * 3
    assert found.round.stages[0].ended == "the held-out loss has not fallen in 1 evaluations"


def test_an_early_end_that_nothing_tells_of(tmp_path: Path) -> None:
    folder, run = write_round(tmp_path / "run", STOPS_EARLY), local_run(tmp_path, **STOPS_EARLY)
    run.loop.run()
    write_logs(folder, run)
    write_rows(folder, "events")
    first = run.loop.stages[0]
    due = [ids for step_ids in first.pairs_by_step(4) for ids in step_ids]
    assert set(due) <= set(look(folder).ledger.lost) and not look(folder).is_sound


def test_a_stage_that_is_under_way_again(tmp_path: Path) -> None:
    """It ended early once, what came after the checkpoint in it is lost, and this time it goes further."""
    settings = {**LEARNS, "pairs_per_step": 1}
    folder, run = write_round(tmp_path / "run", settings), local_run(tmp_path, **settings)
    run.loop.run()
    write_rows(folder, "trained", *trained_rows(run)[:6])
    begun = {"event": "stage_started", "step": 0, "stage": 1}
    ended = {"event": "stage_finished", "step": 4, "stage": 1, "steps": 4, "reason": "no better"}
    write_rows(folder, "events", begun, ended)
    assert not look(folder).is_sound
    write_rows(folder, "events", begun, ended, {"event": "stage_resumed", "step": 2, "stage": 1})
    found = look(folder)
    assert found.is_sound and "stage 1: 8 pairs and 1 held out; 6 of 8 steps: under way\n" in as_text(found)
    assert "stage 2: 8 pairs and 1 held out; 0 of 8 steps: not begun\n" in as_text(found)


# --- what is not --------------------------------------------------------------------------------------------------
def twice(rows: Rows) -> Rows:
    return [*rows[:3], rows[2], *rows[3:]]


def without_one(rows: Rows) -> Rows:
    return rows[:4] + rows[5:]


def with_the_pairs_of_another_step(rows: Rows) -> Rows:
    return [*rows[:4], rows[4] | {"prompt_ids": rows[0]["prompt_ids"]}, *rows[5:]]


def beyond_the_end(rows: Rows) -> Rows:
    return [*rows, {"step": 10, "prompt_ids": rows[2]["prompt_ids"]}]


@pytest.mark.parametrize(("change", "lost", "repeated"), [
    (twice, None, 2), (without_one, 4, None), (with_the_pairs_of_another_step, 4, 0), (beyond_the_end, None, 2),
])
def test_steps_with_other_pairs_than_planned(
    folder: Path, change: Callable[[Rows], Rows], lost: int | None, repeated: int | None
) -> None:
    """``lost``, ``repeated``: rows whose pairs are."""
    rows = [json.loads(line) for line in (folder / "trained.jsonl").read_text().splitlines()]
    write_rows(folder, "trained", *change(rows))
    found = look(folder)
    assert found.ledger.lost == ([] if lost is None else sorted(rows[lost]["prompt_ids"]))
    assert found.ledger.repeated == ([] if repeated is None else sorted(rows[repeated]["prompt_ids"]))
    assert not found.is_sound


def test_trained_with_another_seed_than_that_of_the_config(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("\nseed: 3", "\nseed: 4"))
    assert not look(folder).is_sound


@pytest.mark.parametrize("name", [PAIRS, SUMMARY])
def test_pairs_that_cannot_be_read(folder: Path, name: str) -> None:
    (flip_a_bit if name == PAIRS else Path.unlink)(folder / name)
    found = look(folder)
    assert not found.is_sound and not found.round.stages and found.ledger.trained == 24
    assert not (found.ledger.lost or found.ledger.repeated), "nobody knows"
    assert f"\n  PROBLEM {folder}: {name}: " in as_text(found)


def test_a_config_that_no_round_has(folder: Path) -> None:
    (folder / "config.yaml").write_text("method: udasa\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"config.yaml: not the resolved config of a run: seed, udasa\.curriculum"):
        look(folder)


# --- before training ----------------------------------------------------------------------------------------------
def test_a_round_that_is_being_measured(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", LEARNS)
    write_rows(folder, "uncertainty", {"prompt_id": 0}, {"prompt_id": 3})
    for name in (PAIRS, SUMMARY, MEASURED):
        (folder / name).unlink()
    found = look(folder)
    assert found.is_sound and as_text(found).startswith(f"""\
{folder}: stopped; measuring, no checkpoint yet; start again with: asa resume {folder.parent}
round
  prompts: 28 answered, 2 of them measured, not all yet
  pairs: not made yet
ledger
  trained: 0 pairs in 0 steps""")
    (folder / MEASURED).touch()
    with hold_run_folder(folder.parent):
        assert look(folder).status.endswith(" works on it), pairing")


def test_json(folder: Path) -> None:
    found = json.loads(as_json(look(folder)))
    assert found["round"]["stages"][2] == {
        "stage": 3, "pairs": 8, "heldout_pairs": 1, "planned_steps": 3, "steps": 3,
        "ended": "all planned steps are done"}
    assert found["ledger"]["steps"] == 9 and found["is_sound"]

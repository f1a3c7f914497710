"""A run folder goes on as the run it is, also without `asa resume`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.run_folder import is_fenced, prepare_run_folder
from asa_dist.runtime.ownership import TakenOver, take_over
from asa_dist.runtime.stopping import ASKED, StopRequests
from tests.runtime.data.corpora import documents

NOW = 1763797931.0  # of a start
TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n\n".join(documents(60)), encoding="utf-8")
    return path


def tiny(corpus: Path, *overrides: str) -> Config:
    return load_config(TINY, [f"data.sources.0.path={corpus}", *overrides])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_does_not_go_on_as_another(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    prepare_run_folder(tiny(corpus), run_dir, resume=True, started_at=NOW)  # nothing there yet: begins
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (run_dir / "stop").touch()
    before = contents(run_dir)
    changed = tiny(corpus, "rollout.prompts_per_step=4", "model.dtype=bfloat16")
    with pytest.raises(ConfigError) as refused:
        prepare_run_folder(changed, run_dir, resume=True, started_at=NOW)
    assert str(refused.value).splitlines() == [
        f"{run_dir}/config.yaml: {change}: cannot change in a run: start a new one"
        for change in ("model.dtype = 'float32', now 'bfloat16'", "rollout.prompts_per_step = 2, now 4")]
    assert contents(run_dir) == before


def test_what_may_change_is_written_down(tmp_path: Path, corpus: Path) -> None:
    run_dir, later = tmp_path / "run", tiny(corpus, "train.steps=9", "train.zero_stage=1", "rollout.workers=2")
    run_dir.mkdir()
    prepare_run_folder(tiny(corpus), run_dir, started_at=NOW)
    (run_dir / "stop").touch()
    os.utime(run_dir / "stop", (NOW - 1, NOW - 1))  # it ended the last start
    prepare_run_folder(later, run_dir, resume=True, started_at=NOW)
    assert load_config(run_dir / "config.yaml") == later and not (run_dir / "stop").exists()


def test_a_request_to_stop_made_while_it_starts(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (NOW + 1, NOW + 1))
    prepare_run_folder(tiny(corpus), tmp_path, started_at=NOW)
    assert StopRequests(tmp_path, 0, None, time.monotonic()).code() == ASKED


def test_an_earlier_start_of_a_job_prepares_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    prepare_run_folder(tiny(corpus), tmp_path, started_at=NOW)
    take_over(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(TakenOver, match=r"anew since: process .* of job 4711, restart 2, on"):
        prepare_run_folder(tiny(corpus, "train.steps=9"), tmp_path, resume=True, started_at=NOW)
    assert contents(tmp_path) == before


def test_when_two_starts_at_once_can_do_no_harm(tmp_path: Path, corpus: Path) -> None:
    """Not while data are prepared, nor where a run measures."""
    measures = tiny(corpus).model_copy(update={"method": "udasa"})
    assert not is_fenced(tiny(corpus), tmp_path)
    prepare_run_folder(tiny(corpus), tmp_path, started_at=NOW)
    assert is_fenced(tiny(corpus), tmp_path) and not is_fenced(measures, tmp_path)

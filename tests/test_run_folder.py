"""A run folder goes on as the run it is, also without `asa resume`."""

from __future__ import annotations

from pathlib import Path

import pytest

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.run_folder import prepare_run_folder
from tests.runtime.data.corpora import documents

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
    prepare_run_folder(tiny(corpus), run_dir, resume=True)  # nothing there yet: begins
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    (run_dir / "stop").touch()
    before = contents(run_dir)
    with pytest.raises(ConfigError) as refused:
        prepare_run_folder(tiny(corpus, "rollout.prompts_per_step=4", "model.dtype=bfloat16"), run_dir, resume=True)
    assert str(refused.value).splitlines() == [
        f"{run_dir}/config.yaml: {change}: cannot change in a run: start a new one"
        for change in ("model.dtype = 'float32', now 'bfloat16'", "rollout.prompts_per_step = 2, now 4")]
    assert contents(run_dir) == before


def test_what_may_change_is_written_down(tmp_path: Path, corpus: Path) -> None:
    run_dir, later = tmp_path / "run", tiny(corpus, "train.steps=9", "train.zero_stage=1", "rollout.workers=2")
    prepare_run_folder(tiny(corpus), run_dir)
    (run_dir / "stop").touch()
    prepare_run_folder(later, run_dir, resume=True)
    assert load_config(run_dir / "config.yaml") == later and not (run_dir / "stop").exists()

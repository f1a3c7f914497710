"""Whole runs of UDASA to which something happens, in every stage: after `asa resume` they are as undisturbed ones.

Done well means, byte by byte: the same responses, none generated twice, the same pairs, the same steps of training on
them, the same trained model.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest

from asa_dist.cli import main
from asa_dist.rounds import Round
from asa_dist.runtime.checkpoint_files import list_checkpoints
from tests.real_run import DEADLINE_SECONDS
from tests.run_folders import flip_a_bit
from tests.udasa_runs import PROMPTS, UdasaRun, write_world

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]  # several runs each

Make = Callable[[], UdasaRun]
TWO_RANKS = "train.ranks=2"
GENERATOR, SCORER = "ray::Generator", "ray::Scorer"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A new run, all of the same config; they end here."""
    config = write_world(tmp_path_factory.mktemp("world"))
    runs: list[UdasaRun] = []

    def make() -> UdasaRun:
        runs.append(UdasaRun(tmp_path_factory.mktemp("run"), config))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(make: Make) -> UdasaRun:
    run = make()
    run.begin("train", TWO_RANKS)
    assert run.wait() == 0, run.errors
    return run


# --- what is compared ---------------------------------------------------------------------------------------------
def assert_measured_alike(run: UdasaRun, undisturbed: UdasaRun, folder: str = "round-1") -> None:
    """Every prompt once, with the same responses, the same uncertainties, the same pairs."""
    assert sorted(row["prompt_id"] for row in run.rows(f"{folder}/responses")) == list(range(len(PROMPTS)))
    for name in ("responses.jsonl", "uncertainty.jsonl"):
        lines, wanted = ((one.run_dir / folder / name).read_bytes().splitlines() for one in (run, undisturbed))
        assert sorted(lines) == sorted(wanted), name
    assert pairs_of(run, folder) == pairs_of(undisturbed, folder)
    assert summary_of(run, folder) == summary_of(undisturbed, folder)


def pairs_of(run: UdasaRun, folder: str) -> list[dict[str, Any]]:
    pairs = pyarrow.parquet.read_table(run.run_dir / folder / "pairs.parquet").to_pylist()
    assert pairs
    return pairs


def summary_of(run: UdasaRun, folder: str) -> Any:
    return json.loads((run.run_dir / folder / "pairs.json").read_text(encoding="utf-8"))["summary"]


def assert_trained_alike(run: UdasaRun, undisturbed: UdasaRun, folder: str = "round-1") -> None:
    """The same pairs in the same steps, and in the end the same weights, bit for bit."""
    for name in ("trained.jsonl", "result/model.safetensors"):
        assert (run.run_dir / folder / name).read_bytes() == (undisturbed.run_dir / folder / name).read_bytes(), name


def assert_goes_on(run: UdasaRun, said: str) -> None:
    assert f"go on with: asa resume {run.run_dir}" in said and "Traceback" not in said, said


def died(run: UdasaRun) -> set[str]:
    return {row["worker"] for row in run.rows("round-1/events") if row["event"] == "worker_died"}


def ctrl_c(run: UdasaRun) -> None:
    """Ends well, and says how to go on."""
    assert run.process is not None
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0, run.errors
    assert_goes_on(run, run.output)
    assert "Traceback" not in run.errors


def copy_of(run: UdasaRun, folder: Path, *names: str) -> UdasaRun:
    """A run that has come as far.

    Args:
        names: only these of its round; none = all.
    """
    made = UdasaRun(folder, run.config)
    shutil.copytree(run.run_dir, made.run_dir)
    for path in (made.run_dir / "round-1").iterdir() if names else ():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return made


# --- every process, one after the other ---------------------------------------------------------------------------
def test_killed_while_measuring_and_while_training(
    make: Make, undisturbed: UdasaRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make()
    run.begin("train", TWO_RANKS)
    driver = run.wait_for("asa_dist.measure")
    run.wait_for_rows("round-1/responses", 3)
    driver.kill()
    assert run.wait() == 137
    assert_goes_on(run, run.errors)
    assert 3 <= len(run.rows("round-1/responses")) < len(PROMPTS)

    run.resume()
    run.wait_for_rows("round-1/trained", 12)
    run.the("rank 1").kill()
    assert run.wait() not in (0, 75)
    assert_goes_on(run, run.errors)
    assert_measured_alike(run, undisturbed)

    run.resume()
    assert run.wait() == 0, run.errors
    assert_measured_alike(run, undisturbed)
    assert_trained_alike(run, undisturbed)
    capsys.readouterr()
    assert main(["inspect", str(run.run_dir)]) == 0


@pytest.mark.long
def test_actors_killed_and_stopped_in_every_stage(make: Make, undisturbed: UdasaRun) -> None:
    run = make()
    run.begin("train", TWO_RANKS)
    generator = run.wait_for(GENERATOR)
    generated = len(run.rows("round-1/responses"))
    run.wait_for_rows("round-1/responses", generated + 1)
    generator.kill()
    run.wait_for(SCORER).kill()
    run.wait_until(lambda: died(run) == {"generator-0", "scorer-0"})
    ctrl_c(run)

    run.resume()
    run.wait_for_rows("round-1/trained", 25)
    ctrl_c(run)

    run.resume()
    assert run.wait() == 0, run.errors
    assert_measured_alike(run, undisturbed)
    assert_trained_alike(run, undisturbed)


def test_killed_during_the_export(
    undisturbed: UdasaRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was half written is removed."""
    run = copy_of(undisturbed, tmp_path)
    half = run.run_dir / "round-1/.result.x7f3"
    (run.run_dir / "round-1/result").rename(half)
    (half / "model.safetensors").write_bytes(b"half")
    assert main(["resume", str(run.run_dir)]) == 0
    assert f"finished: {run.run_dir}" in capsys.readouterr().out
    assert_trained_alike(run, undisturbed)
    assert not half.exists()


def test_a_damaged_last_checkpoint_gives_no_result(undisturbed: UdasaRun, tmp_path: Path) -> None:
    """An older one would be passed off as the trained model."""
    run = copy_of(undisturbed, tmp_path)
    last = list_checkpoints(run.run_dir / "round-1")[0]
    assert Round(run.run_dir, 0).last_step() == last.step
    flip_a_bit(next((last.path / "shards").iterdir()))
    assert Round(run.run_dir, 0).last_step() is None


def test_what_cannot_change_any_more(
    undisturbed: UdasaRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it has trained: the curriculum; it is named, and nothing is changed."""
    run = copy_of(undisturbed, tmp_path)
    shutil.rmtree(run.run_dir / "round-1/result")
    before = (run.run_dir / "config.yaml").read_bytes()
    assert main(["resume", str(run.run_dir), "udasa.curriculum.thresholds=[0.5]", "udasa.fusion=mean"]) == 2
    said = capsys.readouterr().err
    assert "udasa.curriculum.thresholds = [0.3, 0.7], now [0.5]: cannot change in a run" in said
    assert "udasa.fusion = 'softmax', now 'mean': cannot change in a run" in said
    assert (run.run_dir / "config.yaml").read_bytes() == before
    assert not (run.run_dir / "round-1/result").exists()


# --- rare, and long -----------------------------------------------------------------------------------------------
@pytest.mark.long
def test_asa_itself_is_killed(make: Make, undisturbed: UdasaRun) -> None:
    """What it has started ends by itself; then another `asa` goes on."""
    run = make()
    run.begin("train", TWO_RANKS)
    for name in ("responses", "trained"):
        run.wait_for_rows(f"round-1/{name}", 5)
        kill_asa(run)
        run.resume()
    assert run.wait() == 0, run.errors
    assert_measured_alike(run, undisturbed)
    assert_trained_alike(run, undisturbed)


def kill_asa(run: UdasaRun) -> None:
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    _, left = psutil.wait_procs(run.processes(), DEADLINE_SECONDS)
    assert not left


@pytest.mark.long
def test_time_is_up_and_a_damaged_reference(undisturbed: UdasaRun, tmp_path: Path) -> None:
    """Before it trains other thresholds may be tried: pairs are divided anew, a stage without any is skipped."""
    run = copy_of(undisturbed, tmp_path, "config.yaml", "responses.jsonl", "uncertainty.jsonl", "measured.json")
    try:
        run.resume("udasa.curriculum.threshold_kind=absolute", "udasa.curriculum.thresholds=[0.01,5.0]",
                   "train.max_wall_time_minutes=0.001")
        assert run.wait() == 75, run.errors
        assert "stage 1, Δu > 5: no pairs, so it is skipped" in run.output
        assert_goes_on(run, run.output)

        run.resume("train.max_wall_time_minutes=null")
        run.wait_for_rows("round-1/trained", 7)
        run.the("rank 0").kill()
        assert run.wait() not in (0, 75)
        stages = [row["stage"] for row in run.rows("round-1/events") if row["event"] == "stage_started"]
        assert set(stages) <= {2, 3}
        reference = run.run_dir / f"round-1/reference/stage-{stages[-1]}.safetensors"
        whole = reference.read_bytes()
        flip_a_bit(reference)

        run.resume()
        assert run.wait() == 2
        assert str(reference) in run.errors and "cannot be read" in run.errors
        assert_goes_on(run, run.errors)
        reference.write_bytes(whole)
        run.resume()
        assert run.wait() == 0, run.errors
    finally:
        run.end()


@pytest.mark.long
def test_killed_in_the_second_round(undisturbed: UdasaRun, tmp_path: Path) -> None:
    runs = [copy_of(undisturbed, tmp_path / name) for name in ("disturbed", "undisturbed")]
    disturbed, other = runs
    try:
        disturbed.resume("udasa.rounds=2")
        disturbed.wait_for_rows("round-2/responses", 3)
        disturbed.wait_for("asa_dist.measure").kill()
        assert disturbed.wait() == 137
        disturbed.resume()
        disturbed.wait_for_rows("round-2/trained", 12)
        disturbed.the("rank 1").kill()
        assert disturbed.wait() not in (0, 75)
        for run, change in ((disturbed, []), (other, ["udasa.rounds=2"])):
            run.resume(*change)
            assert run.wait() == 0, run.errors
        assert f"round 1 is finished: {other.run_dir}/round-1/result" in other.output
        assert f"round 2: measuring {other.run_dir}/round-1/result" in other.output
        assert {row["policy_version"] for row in other.rows("round-2/responses")} == {1}
        assert other.output.endswith(f"finished: {other.run_dir}; the trained model: {other.run_dir}/round-2/result\n")
        assert_measured_alike(disturbed, other, "round-2")
        assert_trained_alike(disturbed, other, "round-2")
    finally:
        for run in runs:
            run.end()

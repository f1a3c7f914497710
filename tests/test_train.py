"""How a rank finds its place, and what rank 0 says before the first step."""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from asa_dist import rank as rank_module
from asa_dist import train as train_module
from asa_dist.asa_parts import doubtful_settings
from asa_dist.config import Config, ConfigError, load_config
from asa_dist.rank import Rank, announce, open_recorder
from asa_dist.runtime.engine import Placement
from asa_dist.runtime.ownership import Ownership, TakenOver, take_over
from asa_dist.runtime.run_log import RunLog, read_rows, truncate_logs
from asa_dist.runtime.stopping import StopRequests
from asa_dist.runtime.watchdog import Watchdog
from asa_dist.train import find_placement, parse_arguments
from tests.disk_steps import before_disk_step

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
BIASED, LATE = "the off-policy correction is biased", "the run ends within the warm-up"


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, ["train.steps=1000", *overrides])


@pytest.mark.parametrize(
    ("overrides", "doubts"),
    [
        ([], []),
        (["rollout.top_p=0.9"], [BIASED]),
        (["rollout.top_k=5"], [BIASED]),
        (["rollout.min_p=0.1", "objective.importance=sequence"], [BIASED]),
        (["rollout.top_p=0.9", "objective.importance=none"], []),
        (["optimizer.warmup_steps=1000"], [LATE]),
        (["optimizer.warmup_steps=999"], []),
        (["train.steps=3", "rollout.top_k=5"], [BIASED, LATE]),
    ],
)
def test_doubtful_settings(overrides: list[str], doubts: list[str]) -> None:
    found = doubtful_settings(config(*overrides))
    assert len(found) == len(doubts) and all(doubt in text for doubt, text in zip(doubts, found, strict=True))


def test_how_far_the_warm_up_gets() -> None:
    (found,) = doubtful_settings(config("train.steps=5", "optimizer.warmup_steps=20"))
    assert found.startswith("optimizer.warmup_steps = 20, train.steps = 5: ") and "25 % of their peak" in found


def rank(ownership: Ownership, number: int, *arguments: str) -> Rank:
    run_dir = ownership.run_dir
    settings = config("rollout.top_p=0.9")
    placement = Placement(number, number, 2, torch.device("cpu"))
    stopping = StopRequests(run_dir, number, None, time.monotonic())
    options = parse_arguments(["config.yaml", *arguments])
    return Rank(settings, run_dir, ownership, placement, options, stopping, Watchdog(run_dir, number))


def test_rank_0_warns_once_and_the_others_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(rank_module, "ProgressLine", partial(rank_module.ProgressLine, stream=shown))
    headline = "ψ 1, φ 2, ξ 3 parameters; 2 ranks"
    ownership = take_over(tmp_path)
    for number in (0, 1):
        here = rank(ownership, number, "--resume")
        with here.watchdog, open_recorder(here, 7, 1000, str) as recorder:
            doubts, damaged = doubtful_settings(here.config), {"step-00000009": "manifest.json: missing"}
            announce(here, recorder, headline, doubts, 7, damaged)
    damage, instead, shown_headline, *warnings = shown.getvalue().splitlines()
    assert "step-00000009 is damaged and was not used: manifest.json: missing" in damage
    assert instead == "going on after step 7 instead"
    assert shown_headline == headline
    assert len(warnings) == 1 and BIASED in warnings[0]
    assert warnings[0].startswith("asa: warning: rollout.top_p = 0.9, ")
    first, second = read_rows(tmp_path / "events.jsonl")
    assert (first["event"], first["name"]) == ("checkpoint_damaged", "step-00000009")
    assert (second["event"], second["step"], second["generation"], second["ranks"]) == ("resumed", 7, 1, 2)


def test_a_start_that_is_replaced_while_it_opens_its_logs(tmp_path: Path) -> None:
    """Whenever the other one comes: only its rows are in the logs, and the first one ends."""
    told = []
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        (run_dir / "trained.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
        first, logs = rank(take_over(run_dir), 0, "--resume"), list[RunLog]()

        def another_start_comes(run_dir: Path = run_dir, logs: list[RunLog] = logs) -> None:
            truncate_logs(run_dir, 5, take_over(run_dir).folder)
            logs.append(RunLog(run_dir / "trained.jsonl"))
            logs[0].append({"step": 6, "by": "the other one"})

        with first.watchdog, before_disk_step(number, another_start_comes):
            try:
                with open_recorder(first, 5, 1000, str) as recorder:
                    recorder.trained(6, [0])
            except TakenOver as error:
                told.append(str(error))
        if not logs:
            break
        logs[0].append({"step": 7, "by": "the other one"})
        logs[0].close()
        rows = list(read_rows(run_dir / "trained.jsonl"))
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7], f"step {number} on the disk"
        assert [row.get("by") for row in rows[5:]] == ["the other one"] * 2
    assert len(told) > 5 and all("another start of this run (process " in message for message in told)


def test_a_start_that_is_replaced_has_an_exit_code_of_its_own(
    environment: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who started it is not to start it again."""

    def end(*_: object) -> int:
        raise TakenOver("another start took over")

    environment(TORCH)
    monkeypatch.setattr(train_module, "train", end)
    assert train_module.main([str(QUICKSTART)]) == 76
    assert capfd.readouterr().err == "asa: another start took over\n"


# --- who starts a rank --------------------------------------------------------------------------------------------
TORCH = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Sets just these variables of all that tell a rank its place."""
    saved = dict(os.environ)

    def become(variables: dict[str, str]) -> None:
        for name in (*TORCH, *SLURM, "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        os.environ.update(variables)

    yield become
    os.environ.clear()
    os.environ.update(saved)


def test_a_rank_of_torchrun_or_deepspeed(environment: Callable[[dict[str, str]], None]) -> None:
    environment(TORCH | SLURM)  # within a job, too
    placement = find_placement(config())
    assert (placement.rank, placement.local_rank, placement.num_ranks) == (1, 0, 2)


def test_a_rank_of_srun(environment: Callable[[dict[str, str]], None]) -> None:
    environment(SLURM | {"MASTER_ADDR": "h", "MASTER_PORT": "1"})
    placement = find_placement(config())
    assert (placement.rank, placement.local_rank, placement.num_ranks) == (5, 1, 8)
    assert os.environ["LOCAL_RANK"] == "1", "deepspeed reads torch's variables"
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize(("variables", "missing"), [({}, "RANK"), (SLURM, "MASTER_ADDR")])
def test_a_rank_that_nobody_started(
    environment: Callable[[dict[str, str]], None], variables: dict[str, str], missing: str
) -> None:
    environment(variables)
    with pytest.raises(ConfigError, match=f"'{missing}' is not set: start with"):
        find_placement(config())


"""Requests to end early: none is missed, none raises, and each leads to its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asa_dist.runtime.stopping import (
    ASKED,
    ENDED_EARLY,
    GO_ON,
    STOP_SIGNALS,
    StopRequests,
    ask_to_stop,
    forget_stop_request,
)


def requests(run_dir: Path, rank: int = 0, minutes: float | None = None, started: float | None = None) -> StopRequests:
    return StopRequests(run_dir, rank, minutes, time.monotonic() if started is None else started)


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_nobody_asked(tmp_path: Path) -> None:
    with requests(tmp_path, minutes=10.0) as stopping:
        assert stopping.code() == GO_ON and not stopping.by_signal


def test_the_file_is_looked_for_by_rank_0_only(tmp_path: Path) -> None:
    first, second = requests(tmp_path), requests(tmp_path, rank=1)
    ask_to_stop(tmp_path, by="asa train (SIGINT)")
    assert first.code() == ASKED and not first.by_signal and first.reason() == "asked by asa train (SIGINT)"
    assert second.code() == GO_ON
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]
    made = (tmp_path / "stop").stat().st_mtime
    forget_stop_request(tmp_path, started_at=made - 1)  # the run was starting when it was made
    assert first.code() == ASKED
    forget_stop_request(tmp_path, started_at=made + 1)
    assert first.code() == GO_ON
    forget_stop_request(tmp_path, started_at=made + 1)  # there need not be one


def test_a_file_made_by_hand_asks_too(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert requests(tmp_path).code() == ASKED
    assert requests(tmp_path).reason() == "asked by the file stop"


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_a_full_disk_has_room_for_the_request(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], check=False,
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with (tmp_path / "filler").open("wb", buffering=0) as filler:
            assert filler.write(bytes(65536)) == 16384, "the disk is full now"
        ask_to_stop(tmp_path, by="asa train (SIGINT)")
        assert requests(tmp_path).code() == ASKED
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    with requests(tmp_path) as stopping:
        for sent in (number, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), sent)
        assert stopping.code() == ENDED_EARLY and stopping.reason() == number.name
    assert capfd.readouterr().err == f"asa: {number.name}: finishing the step and writing a checkpoint\n"


def test_other_ranks_do_not_speak(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with requests(tmp_path, rank=1) as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.code() == ENDED_EARLY
    assert capfd.readouterr().err == ""


def test_a_signal_counts_more_than_the_file(tmp_path: Path) -> None:
    """The scheduler that sends it wants to hear 75."""
    ask_to_stop(tmp_path, by="somebody")
    with requests(tmp_path) as stopping:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.code() == ENDED_EARLY and stopping.reason() == "SIGUSR1"


def test_wall_time(tmp_path: Path) -> None:
    now = time.monotonic()
    assert requests(tmp_path, minutes=5.0, started=now - 290).code() == GO_ON
    assert requests(tmp_path, rank=1, minutes=5.0, started=now - 300).code() == GO_ON, "rank 0 says when, and why"
    late = requests(tmp_path, minutes=5.0, started=now - 300)
    assert late.code() == ENDED_EARLY and late.reason() == "train.max_wall_time_minutes = 5"


def test_a_rank_that_nobody_asked_knows_that_it_was_another(tmp_path: Path) -> None:
    assert requests(tmp_path, rank=1).reason() == "a signal to another rank"


def test_work_goes_on_under_a_storm_of_signals(tmp_path: Path) -> None:
    """No handler raises: not within another one, not while something is printed, not when stderr is gone."""
    program = f"""
import os, sys, time
from pathlib import Path
from asa_dist.runtime.stopping import StopRequests
with StopRequests(Path({str(tmp_path)!r}), 0, None, time.monotonic()) as stopping:
    os.close(2)
    print("ready", flush=True)
    while not Path({str(tmp_path / "enough")!r}).exists():
        print("working")
print("done" if stopping.by_signal else "not asked")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(100):
        for number in STOP_SIGNALS:
            process.send_signal(number)
    (tmp_path / "enough").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.endswith("done\n")

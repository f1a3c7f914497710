"""One process per run folder, and no folder that stays locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from asa_dist.config import ConfigError
from asa_dist.runtime import run_lock
from asa_dist.runtime.run_lock import PATIENCE_SECONDS, RunInUseError, hold_run_folder, lock_holder

HOLDER = """
import sys
from pathlib import Path
from asa_dist.runtime.run_lock import hold_run_folder
with hold_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
PARENT = """
import subprocess, sys
from pathlib import Path
from asa_dist.runtime.run_lock import hold_run_folder
with hold_run_folder(Path(sys.argv[1])) as held:
    child = subprocess.Popen(["sleep", "60"], pass_fds=held)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def start_holder(run_dir: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    who = f"process {holder.pid} on host {socket.gethostname()} works on it"
    assert lock_holder(tmp_path) == who
    with pytest.raises(RunInUseError) as refused, hold_run_folder(tmp_path):
        pass
    assert str(refused.value) == f"{tmp_path} is in use: {who}"
    holder.communicate()
    assert lock_holder(tmp_path) is None and list(tmp_path.iterdir()) == []
    with hold_run_folder(tmp_path):
        assert lock_holder(tmp_path) == f"process {os.getpid()} on host {socket.gethostname()} works on it"


def become(monkeypatch: pytest.MonkeyPatch, restart: int, host: str) -> None:
    """From here on this process is a start of job 4711."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setattr("socket.gethostname", lambda: host)


@pytest.mark.parametrize(("holder", "restart", "takes_over"), [
    ("17 elsewhere 4711 0", 1, True),
    ("17 elsewhere 4711 1", 3, True),
    ("17 elsewhere 4711 1", 1, False),
    ("17 elsewhere 4711 2", 1, False),  # this start is the one that comes late
    ("17 elsewhere 4712 0", 1, False),
    ("17 elsewhere", 1, False),
    ("17 here 4711 0", 1, False),  # a host that is here is not lost
])  # fmt: skip
@pytest.mark.parametrize("fenced", [True, False])
def test_a_job_that_was_started_again_elsewhere_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    holder: str, restart: int, takes_over: bool, fenced: bool,
) -> None:
    """Of a host that SLURM has lost, the old start may still live and hold the lock."""
    become(monkeypatch, restart, "here")
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(run_lock, "ENDING_PATIENCE_SECONDS", 0.0)
    with (tmp_path / ".lock").open("w+") as file:
        file.write(holder)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        if takes_over and fenced:
            with hold_run_folder(tmp_path, fenced=True):
                assert "on host elsewhere works on it; it is an earlier start of this job" in capfd.readouterr().err
            return
        with pytest.raises(RunInUseError) as refused, hold_run_folder(tmp_path, fenced=fenced):
            pass
    assert ("`asa submit` again with --run-dir" in str(refused.value)) == takes_over


def test_who_takes_over_holds_a_lock_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the one on the lost host ends before it or after."""
    with ExitStack() as lost, ExitStack() as newer:
        become(monkeypatch, 0, "elsewhere")
        lost.enter_context(hold_run_folder(tmp_path))
        become(monkeypatch, 1, "here")
        newer.enter_context(hold_run_folder(tmp_path, fenced=True))
        for _ in range(2):
            assert lock_holder(tmp_path) == f"process {os.getpid()} on host here works on it"
            with pytest.raises(RunInUseError), hold_run_folder(tmp_path, fenced=True):
                pass
            lost.close()
        newer.close()
        assert list(tmp_path.iterdir()) == []


def test_somebody_else_is_just_taking_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, 0, "elsewhere")
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.0)
    with hold_run_folder(tmp_path), (tmp_path / ".lock.next").open("w") as file:
        become(monkeypatch, 1, "here")
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunInUseError), hold_run_folder(tmp_path, fenced=True):
            pass
        fcntl.flock(file, fcntl.LOCK_UN)
        with hold_run_folder(tmp_path, fenced=True):
            assert not (tmp_path / ".lock.next").exists()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".lock").exists()
    assert lock_holder(tmp_path) is None
    with hold_run_folder(tmp_path):
        pass


def test_a_child_may_prolong_it(tmp_path: Path) -> None:
    """`asa train` is killed, its launcher lives a little longer: whoever comes next waits for that."""
    holder = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # not yet waited for by its parent
        ended = "(it has ended; what it started has not yet)"
        assert lock_holder(tmp_path) == f"process {holder.pid} on host {socket.gethostname()} works on it {ended}"
        killer = threading.Timer(2 * PATIENCE_SECONDS, os.kill, (child, signal.SIGKILL))
        killer.start()
        with hold_run_folder(tmp_path):
            assert not killer.is_alive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    holder.communicate()


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with hold_run_folder(tmp_path / "runs/new"):
        pass
    assert not (tmp_path / "runs/new").exists()
    with hold_run_folder(tmp_path / "runs/new"):
        (tmp_path / "runs/new/config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs/new").iterdir()] == ["config.yaml"]


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run folder .*/file: File exists$"), hold_run_folder(tmp_path / "file"):
        pass

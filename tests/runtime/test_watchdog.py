"""A passed deadline ends a real process: message, stacks, exit code; and nothing else does."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asa_dist.runtime.watchdog import Watchdog

PROLOGUE = """
import sys, time, threading
from pathlib import Path
from asa_dist.runtime.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

watchdog = Watchdog(Path(sys.argv[1]), rank=3)
print("ready", flush=True)
"""
LIMIT_SECONDS = 60.0
PATIENCE = "import asa_dist.runtime.watchdog as module\nmodule.GRACE_SECONDS = 1.0\n"  # its own thread comes first
MATCHING = 'import re; re.match("(a*)*b", "a" * 60)'
MATCHES_FOR_EVER = PATIENCE + f'with watchdog.phase("matching", 0.2):\n    {MATCHING}'


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + body, str(folder)], capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def stacks(folder: Path) -> str:
    return (folder / "stacks" / "rank-3.txt").read_text(encoding="utf-8")


def test_a_hang_ends_the_process_and_says_where(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        'with watchdog.phase("waiting for rollouts of step 5", 0.2):\n    waits_for_ever()',
    )
    assert ended.returncode == 1
    (message,) = ended.stderr.splitlines()
    assert message.startswith(f"asa: rank 3 on {socket.gethostname()}: 'waiting for rollouts of step 5' has lasted ")
    assert ", its deadline is 0.2 s; " in message
    assert message.endswith(str(tmp_path / "stacks" / "rank-3.txt"))
    assert "rank 3" in stacks(tmp_path).splitlines()[0] and "rollouts of step 5" in stacks(tmp_path).splitlines()[0]
    assert "waits_for_ever" in stacks(tmp_path) and stacks(tmp_path).count("hread 0x") >= 2


def test_an_outer_phase_keeps_its_deadline(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        'with watchdog.phase("step 7", 0.5):\n    with watchdog.phase("saving", 50):\n        waits_for_ever()',
    )
    assert ended.returncode == 1 and "'step 7' (now in 'saving') has lasted" in ended.stderr


def test_after_an_inner_phase_the_outer_one_goes_on(tmp_path: Path) -> None:
    body = 'with watchdog.phase("step 7", 1.0):\n    with watchdog.phase("saving", 50):\n        pass\n'
    ended = run(tmp_path, body + "    waits_for_ever()")
    assert ended.returncode == 1 and "'step 7' has lasted" in ended.stderr


def test_phases_in_time_are_no_hang(tmp_path: Path) -> None:
    """Together they last longer than any deadline, and so does what lies between them."""
    body = 'for _ in range(4):\n    with watchdog.phase("short", 30):\n        time.sleep(0.2)\n'
    body += 'with watchdog.phase("failed", 0.3):\n    pass\ntime.sleep(1.5)\nwatchdog.stop()\n'
    ended = run(tmp_path, body)
    assert (ended.returncode, ended.stderr) == (0, "") and not (tmp_path / "stacks").exists()


def test_a_phase_that_raises_is_over(tmp_path: Path) -> None:
    body = 'try:\n    with watchdog.phase("failing", 0.3):\n        raise ValueError\n'
    body += "except ValueError:\n    time.sleep(1.5)"
    assert run(tmp_path, body).returncode == 0


def test_a_hang_that_never_lets_python_run_ends_too(tmp_path: Path) -> None:
    """A regular expression holds the interpreter's lock: the watchdog's own thread stands still."""
    ended = run(tmp_path, MATCHES_FOR_EVER)
    assert ended.returncode == 1
    assert "Timeout (0:00:0" in stacks(tmp_path) and "re/__init__.py" in stacks(tmp_path)


def test_also_where_the_stacks_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("in the way", encoding="utf-8")
    ended = run(tmp_path, MATCHES_FOR_EVER)
    assert ended.returncode == 1 and "Timeout (0:00:0" in ended.stderr and "re/__init__.py" in ended.stderr


def test_the_timer_keeps_the_deadline_that_is_left(tmp_path: Path) -> None:
    """After an inner phase with an earlier deadline and one with a later one: the outer phase's."""
    body = PATIENCE + 'with watchdog.phase("outer", 1.0):\n'
    body += '    with watchdog.phase("earlier", 0.9), watchdog.phase("later", 50):\n        pass\n'
    ended = run(tmp_path, body + "    " + MATCHING)
    assert ended.returncode == 1 and "Timeout (0:00:0" in stacks(tmp_path)


def test_no_timer_is_left_after_the_last_phase(tmp_path: Path) -> None:
    body = PATIENCE + 'with watchdog.phase("short", 0.2):\n    pass\n'
    ended = run(tmp_path, body + "time.sleep(2.0)\nwatchdog.stop()")
    assert (ended.returncode, ended.stderr) == (0, "") and not (tmp_path / "stacks").exists()


def test_the_stacks_of_an_earlier_start_stay(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank-3.txt").write_text("of yesterday\n", encoding="utf-8")
    with Watchdog(tmp_path, rank=3), Watchdog(tmp_path, rank=4):
        pass
    assert stacks(tmp_path) == "of yesterday\n" and not (tmp_path / "stacks" / "rank-4.txt").exists()


def test_a_process_that_was_stopped_is_not_hanging(tmp_path: Path) -> None:
    body = 'with watchdog.phase("reading", 30):\n    sys.stdin.readline()\nwatchdog.stop()'
    with subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + body, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate("go on\n", timeout=LIMIT_SECONDS)
    assert (process.returncode, said) == (0, "")


def test_stacks_that_cannot_be_written_go_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("in the way", encoding="utf-8")
    ended = run(tmp_path, 'with watchdog.phase("writing", 0.2):\n    waits_for_ever()')
    assert ended.returncode == 1
    assert "waits_for_ever" in ended.stderr and "'writing' has lasted" in ended.stderr


def test_dumps_are_added_and_the_process_goes_on(tmp_path: Path) -> None:
    with Watchdog(tmp_path, rank=3) as watchdog:
        first = watchdog.dump("lost rank 1")
        second = watchdog.dump("lost rank 2")
    assert first == second == tmp_path / "stacks" / "rank-3.txt"
    assert stacks(tmp_path).index("lost rank 1") < stacks(tmp_path).index("lost rank 2")
    assert stacks(tmp_path).count("test_dumps_are_added_and_the_process_goes_on") == 2


@pytest.mark.parametrize("timeout_seconds", [1e-9, float("inf")])
def test_any_number_of_seconds_will_do(tmp_path: Path, timeout_seconds: float) -> None:
    body = f'with watchdog.phase("any", float("{timeout_seconds}")):\n    time.sleep(2.0)\nwatchdog.stop()'
    ended = run(tmp_path, body)
    assert ended.returncode == (1 if timeout_seconds < 1 else 0), ended.stderr

"""The threads that talk to Ray: in order, and no process waits for them to the end of time."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from asa_dist.rollout.client import _DaemonThread

LIMIT_SECONDS = 60.0
PUTS_FOR_EVER = """
import threading
from asa_dist.rollout.client import _DaemonThread

begun = threading.Event()
thread = _DaemonThread("publish")
thread.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
thread.close(timeout_seconds=0.1)
print("closed", flush=True)
"""


def test_in_order_and_errors_reach_who_asked() -> None:
    thread, seen = _DaemonThread("publish"), []
    first = thread.submit(lambda: seen.append(1))
    failing = thread.submit(lambda: seen.remove(2))
    last = thread.submit(lambda: seen.append(3))
    assert last.result(LIMIT_SECONDS) is None and first.done() and seen == [1, 3]
    with pytest.raises(ValueError, match="not in list"):
        failing.result()
    thread.close(LIMIT_SECONDS)
    assert not thread._thread.is_alive()


def test_closing_forgets_what_has_not_begun() -> None:
    thread, seen = _DaemonThread("publish"), []
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go_on.wait()

    held, forgotten = thread.submit(hold), thread.submit(lambda: seen.append(2))
    assert begun.wait(LIMIT_SECONDS)
    thread.close(timeout_seconds=0.0)
    go_on.set()
    thread._thread.join(LIMIT_SECONDS)
    assert held.done() and not thread._thread.is_alive()
    assert not forgotten.done() and seen == []


def test_a_put_that_never_returns_keeps_no_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PUTS_FOR_EVER], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")

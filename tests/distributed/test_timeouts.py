"""A rank that dies or stands still ends the others' collectives with a readable error, at every kind of ZeRO group."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest

from tests.distributed.ranks import run_on_ranks, start_ranks
from tests.distributed.timeout_cases import NUM_STEPS, train_while_rank_1_gets

TIMEOUT_SECONDS = 10.0
NEVER_SECONDS = 600.0  # beyond the test's own limit
ANSWER_SECONDS = 150.0  # start-up on a busy machine included


@contextmanager
def two_ranks(stage: int, timeout_seconds: float, signal_number: int) -> Iterator[tuple[list[BaseProcess], Any]]:
    processes, answers = start_ranks(train_while_rank_1_gets, 2, stage, timeout_seconds, signal_number)
    try:
        yield processes, answers
    finally:
        for process in processes:
            process.kill()  # also one that was stopped
            process.join()


def wait_until_stopped(process: BaseProcess, answers: Any) -> None:
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert answers.empty(), answers.get()
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_stands_still_is_an_error_at_the_deadline(stage: int) -> None:
    with two_ranks(stage, TIMEOUT_SECONDS, signal.SIGSTOP) as (processes, answers):
        wait_until_stopped(processes[1], answers)
        stopped = time.monotonic()
        rank, failure, seen = answers.get(timeout=ANSWER_SECONDS)
        waited_seconds = time.monotonic() - stopped
        assert (rank, failure) == (0, None)
        assert waited_seconds > TIMEOUT_SECONDS - 2, "not the deadline, but something before it"
        assert len(seen.losses) == NUM_STEPS // 2
        assert seen.complaint.startswith(f"rank 0 on {socket.gethostname()}: another rank did not answer for 10 s")
        assert "train.collective_timeout_seconds" in seen.complaint
        processes[0].join(ANSWER_SECONDS)
        assert processes[0].exitcode == 0, "it must not hang afterwards, either"


@pytest.mark.distributed
def test_a_rank_that_is_killed_is_an_error_at_once() -> None:
    with two_ranks(3, NEVER_SECONDS, signal.SIGKILL) as (processes, answers):
        rank, failure, seen = answers.get(timeout=ANSWER_SECONDS)
        assert (rank, failure) == (0, None)
        assert len(seen.losses) == NUM_STEPS // 2
        assert seen.complaint.startswith(f"rank 0 on {socket.gethostname()}: the connection to another rank broke")
        processes[0].join(ANSWER_SECONDS)
        assert processes[0].exitcode == 0 and processes[1].exitcode == -signal.SIGKILL


@pytest.mark.distributed
def test_a_pause_shorter_than_the_deadline_changes_nothing() -> None:
    undisturbed = run_on_ranks(train_while_rank_1_gets, 2, 3, NEVER_SECONDS, None)
    with two_ranks(3, NEVER_SECONDS, signal.SIGSTOP) as (processes, answers):
        wait_until_stopped(processes[1], answers)
        time.sleep(1.0)  # rank 0 waits meanwhile
        os.kill(processes[1].pid or 0, signal.SIGCONT)
        seen = sorted((answers.get(timeout=ANSWER_SECONDS) for _ in range(2)), key=lambda answer: answer[0])
    assert seen == [(rank, None, result) for rank, result in enumerate(undisturbed)]
    assert len(undisturbed[0].losses) == NUM_STEPS and undisturbed[0].complaint == ""

"""Runs a function on N gloo ranks, each a fresh process, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from asa_dist.launcher import free_port

DEADLINE_SECONDS = 240.0


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """``function(placement, *arguments)`` on every rank, in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback), died or took longer than the deadline.
    """
    processes, answers = start_ranks(function, num_ranks, *arguments)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while len(results) < num_ranks:
            try:
                rank, failure, result = answers.get(timeout=0.5)
            except queue.Empty:
                dead = [r for r, process in enumerate(processes) if not process.is_alive() and r not in results]
                assert not dead, f"rank {dead} died, exit codes {[processes[r].exitcode for r in dead]}"
                assert time.monotonic() < deadline, (
                    f"ranks {sorted(set(range(num_ranks)) - set(results))} did not answer in time"
                )
                continue
            assert failure is None, f"rank {rank}:\n{failure}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == num_ranks else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(num_ranks)]


def start_ranks(
    function: Callable[..., Any], num_ranks: int, *arguments: Any
) -> tuple[list[multiprocessing.process.BaseProcess], Any]:
    """(processes in rank order, queue of their (rank, traceback or None, result)); the caller ends them."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, rank, num_ranks, port, answers, arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    return list(processes), answers


def _rank_main(
    function: Callable[..., Any], rank: int, num_ranks: int, port: int, answers: Any, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        import torch

        from asa_dist.runtime.engine import Placement, join_process_group

        torch.set_num_threads(1)
        placement = Placement(rank, rank, num_ranks, torch.device("cpu"))
        join_process_group(placement, timeout_seconds=60.0)
        answers.put((rank, None, function(placement, *arguments)))
    except Exception:
        answers.put((rank, traceback.format_exc(), None))

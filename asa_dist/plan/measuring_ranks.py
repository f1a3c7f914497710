"""Processes of this machine that measure together; rank 0 answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asa_dist.config_text import ConfigError

POLL_SECONDS = 0.05


class MeasuringError(ConfigError):
    """This machine cannot be measured: what was tried, what it said, what to do instead."""

    def __init__(self, what: str, said: str) -> None:
        last = said.strip().splitlines()[-1:] or ["no reason given"]
        super().__init__(f"--machine this: {what}: {last[0][:500]}; mend it, or name another machine")


def answer_of_ranks(
    what: str, module: str, argument: str, environments: Sequence[Mapping[str, str]], timeout_seconds: float
) -> Any:
    """The last line of JSON that rank 0 prints; ranks run ``python -m MODULE RANK ARGUMENT``, and none outlives this.

    Args:
        what: is measured, for the error.
        environments: of each rank, on top of ours.

    Raises:
        MeasuringError: a rank failed before rank 0 had answered, or that took too long; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.txt"
        complaints = [Path(folder) / f"{rank}.txt" for rank in range(len(environments))]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, environment in enumerate(environments):
                said = answer if rank == 0 else Path(os.devnull)
                with complaints[rank].open("wb") as stderr, said.open("wb") as stdout:
                    ranks.append(subprocess.Popen([sys.executable, "-m", module, str(rank), argument],
                                                  env=os.environ | environment, stdout=stdout, stderr=stderr))
            failed = _first_to_fail(ranks, time.monotonic() + timeout_seconds)
        except TimeoutError:
            raise MeasuringError(what, f"no answer within {timeout_seconds:g} s") from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed is not None:
            raise MeasuringError(f"{what}: rank {failed}", complaints[failed].read_text(encoding="utf-8"))
        return json.loads(answer.read_text(encoding="utf-8").splitlines()[-1])


def _first_to_fail(ranks: Sequence[subprocess.Popen[bytes]], deadline_seconds: float) -> int | None:
    """None as soon as rank 0 has ended well. The others would wait for one that failed, in a collective."""
    while ranks[0].poll() != 0:
        for rank, process in enumerate(ranks):
            if process.poll():
                return rank
        if time.monotonic() > deadline_seconds:
            raise TimeoutError
        time.sleep(POLL_SECONDS)
    return None

"""Processes of this machine that measure together; rank 0 answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asa_dist.config_text import ConfigError


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
        MeasuringError: rank 0 failed, or did not answer in time; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        complaints = [Path(folder) / f"{rank}.txt" for rank in range(len(environments))]
        ranks: list[subprocess.Popen[str]] = []
        try:
            for rank, environment in enumerate(environments):
                with complaints[rank].open("w") as stderr:
                    ranks.append(subprocess.Popen(
                        [sys.executable, "-m", module, str(rank), argument], env=os.environ | environment, text=True,
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=stderr))  # fmt: skip
            said, _ = ranks[0].communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise MeasuringError(what, f"no answer within {timeout_seconds:g} s") from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if ranks[0].returncode:
            raise MeasuringError(what, complaints[0].read_text(encoding="utf-8"))
    return json.loads(said.splitlines()[-1])

"""Trying things where they can break nothing: a process of its own, in a session of its own, with a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from asa_dist.doctor.findings import Finding, State

CLEAN_UP_SECONDS = 30.0  # a Ray that is still starting
GPU_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under Windows


@dataclass(frozen=True)
class Outcome:
    """How a tried thing ended.

    Attributes:
        state: ok, broken, or not known: no answer in time, which on a busy machine proves nothing.
        text: what it printed if it worked; else the last line of its error, or the time it was given.
    """

    state: State
    text: str

    def as_finding(self, name: str, success: str, advice: str, is_needed: bool = False, context: str = "") -> Finding:
        """Says ``success`` if it worked, else ``context`` with the problem; ``advice`` only if it is broken."""
        if self.state == "ok":
            return Finding(name, "ok", success, is_needed=is_needed)
        return Finding(name, self.state, context + self.text, advice if self.state == "broken" else "", is_needed)


def has_gpu_driver() -> bool:
    return any(os.path.exists(file) for file in GPU_DRIVER_FILES)


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """`python -m asa_dist.doctor.probes ARGUMENTS`; never with the current folder on its path."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if not has_gpu_driver():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "asa_dist.doctor.probes", *arguments], env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> None:
    for number, grace_seconds in ((signal.SIGTERM, CLEAN_UP_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=grace_seconds)


def finish(process: subprocess.Popen[str], deadline: float) -> Outcome:
    """Waits for it, until ``deadline`` (of time.monotonic); then ends it and its session, politely at first."""
    allowed = max(0.0, deadline - time.monotonic())
    try:
        output, errors = process.communicate(timeout=allowed)
    except subprocess.TimeoutExpired:
        _end(process)
        return Outcome("not known", f"no answer within {allowed:.0f} s")
    if process.returncode == 0:
        return Outcome("ok", output.strip())
    if process.returncode < 0:
        return Outcome("broken", f"ended by signal {-process.returncode}")
    said = [line.strip() for line in errors.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
    return Outcome("not known" if "timed out" in said[-1] else "broken", said[-1])  # a raylet gets 30 s from Ray


def attempt(arguments: Sequence[str], deadline: float) -> Outcome:
    """Starts and finishes it, if there is time left."""
    if time.monotonic() >= deadline:
        return Outcome("not known", "not tried, out of time")
    return finish(start(arguments), deadline)

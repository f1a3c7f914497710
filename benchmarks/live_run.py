"""A run of the whole system, seen from outside: its files, its processes by kind; started and ended by a benchmark."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RUN_VARIABLE = "ASA_RUN_MARK"
HANG_SECONDS = 300.0  # nothing that is waited for here takes so long, on a slow machine either
LEFT_BEHIND_SECONDS = 30.0
LAST_LINES_BYTES = 2**16  # more than any line of trained.jsonl here


class Hang(Exception):
    """What never came."""


def kind_of(process: psutil.Process) -> str:
    """"asa", "launcher", "rank 0", …, "coordinator", "worker", "raylet", "gcs"; "" for any other, or if it is gone."""
    try:
        words = process.cmdline()
        if ":Coordinator" in " ".join(words):
            return "coordinator"
        if ":RolloutWorker" in " ".join(words):
            return "worker"
        if words and Path(words[0]).name in ("raylet", "gcs_server"):
            return {"raylet": "raylet", "gcs_server": "gcs"}[Path(words[0]).name]
        if "deepspeed.launcher.launch" in words:
            return "launcher"
        if "asa_dist.train" in words:
            return f"rank {process.environ().get('RANK', '?')}"
        return "asa" if "asa_dist.cli" in words else ""
    except psutil.Error:
        return ""


class VisibleRun:
    """What can be seen of a run from outside: its files and its processes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.mark = uuid.uuid4().hex  # in the environment of all its processes, as RUN_VARIABLE

    def processes(self) -> list[psutil.Process]:
        """What is alive of it, daemons of Ray included."""
        return [process for process in psutil.process_iter(["environ", "status"])
                if (process.info["environ"] or {}).get(RUN_VARIABLE) == self.mark
                and process.info["status"] != psutil.STATUS_ZOMBIE]

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """By age, oldest first."""
        return sorted((p for p in self.processes() if kind_of(p) == kind), key=lambda process: process.pid)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of RUN/name.jsonl."""
        path = self.run_dir / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The metrics of the trained steps."""
        return [row for row in self.rows("metrics") if "loss/total" in row]


class LiveRun(VisibleRun):
    """One run folder, and all processes that work on it. A context manager: they are ended with it.

    Args:
        folder: an existing one, for the run folder and for what the run prints.
        environment: variables beside this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(folder / "run")
        self._environment = environment or {}
        self.output = folder / "output.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes():
            process.kill()
        if self._process is not None:
            self._process.wait()

    def start(self, *arguments: str) -> None:
        """``asa ARGUMENTS``, out of reach of this terminal's Ctrl-C; its output is appended to ``output``."""
        environment = {**os.environ, **self._environment, RUN_VARIABLE: self.mark}
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asa_dist.cli", *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True)

    def send(self, number: int) -> None:
        """A signal to `asa`."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def has_ended(self) -> bool:
        """Whether `asa` has; what it started may be ending still."""
        return self._process is None or self._process.poll() is not None

    @property
    def last_step(self) -> int:
        """Of trained.jsonl, by its last whole line: cheap enough to be asked often."""
        path = self.run_dir / "trained.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_LINES_BYTES))
            *whole, _ = file.read().split(b"\n")
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def wait_until(self, is_so: Callable[[], bool], what: str) -> bool:
        """False: the run has ended before.

        Raises:
            Hang: neither came.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while not is_so():
            if self.has_ended:
                return is_so()
            if time.monotonic() > deadline:
                raise Hang(f"{what}: not within {HANG_SECONDS:g} s; the run printed:\n{self.last_words()}")
            time.sleep(0.02)
        return True

    def wait(self) -> int:
        """Until a next `asa resume` may start, as a user's script would; `asa`'s exit code.

        Raises:
            Hang: it does not end, or leaves processes behind.
        """
        from asa_dist.runtime.run_lock import lock_holder

        assert self._process is not None
        deadline = time.monotonic() + HANG_SECONDS
        while self._process.poll() is None or lock_holder(self.run_dir) is not None:
            if time.monotonic() > deadline:
                raise Hang(f"the end of the run: not within {HANG_SECONDS:g} s; it printed:\n{self.last_words()}")
            time.sleep(0.1)
        _, left = psutil.wait_procs(self.processes(), timeout=LEFT_BEHIND_SECONDS)
        if left:
            raise Hang(f"left behind: {[kind_of(process) or process.name() for process in left]}")
        return self._process.returncode

    def last_words(self, num_characters: int = 2000) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")[-num_characters:]


def when_and_where() -> dict[str, Any]:
    """Date and machine, without which no figure means anything."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
             if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
                    "memory_bytes": psutil.virtual_memory().total, "load_1_minute": round(os.getloadavg()[0], 2)},
    }


class Progress:
    """Lines on stderr, each with the time passed."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def say(self, message: str) -> None:
        minutes, seconds = divmod(int(self.seconds), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {message}", file=sys.stderr, flush=True)

"""Real runs of the whole system for tests: started as a user would, watched, ended with all they started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.live_run import ROOT, RUN_VARIABLE, VisibleRun
from tests.runtime.data.corpora import documents

TINY = ROOT / "tests/tiny.yaml"
DEADLINE_SECONDS = 200.0  # for a hang, not for a slow machine
ASA = ["asa_dist.cli", "train"]


class Run(VisibleRun):
    """A run within ``folder``, and its present process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "run")
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """``python -m COMMAND``; its output replaces that of the process before."""
        environment = os.environ | {
            RUN_VARIABLE: self.mark, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
        environment.pop("DS_ACCELERATOR", None)  # set for the tests that import deepspeed: users need not know it
        with (self.folder / "stdout").open("wb") as output, (self.folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, env=environment, stdout=output, stderr=errors)

    def resume(self, *overrides: str) -> None:
        """`asa resume`, as a user would."""
        self.start("asa_dist.cli", "resume", str(self.run_dir), *overrides)

    @property
    def output(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def the(self, kind: str) -> psutil.Process:
        """The oldest process of this kind; there must be one."""
        found = self.of_kind(kind)
        assert found, f"no {kind} in {[' '.join(process.cmdline()) for process in self.processes()]}"
        return found[0]

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        assert self.process is not None
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_so():
            assert self.process.poll() is None, f"ended early, code {self.process.returncode}: {self.errors}"
            assert time.monotonic() < deadline, f"never came:\n{self.output}\n{self.errors}"
            time.sleep(0.05)

    def wait(self) -> int:
        """The exit code; nothing may be left of the run."""
        assert self.process is not None
        try:
            code = self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run hangs:\n{self.output}\n{self.errors}")
        _, left = psutil.wait_procs(self.processes(), timeout=15)
        assert not left, f"left behind: {[' '.join(process.cmdline()) for process in left]}"
        return code

    def end(self) -> None:
        """For a test that failed."""
        for process in self.processes():
            process.kill()
        if self.process is not None:
            self.process.wait()


Start = Callable[..., Run]


@contextmanager
def runs_of_tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start(MODULE AND ARGUMENTS, *overrides)`` starts tests/tiny.yaml and gives the :class:`Run`; all end here."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n\n".join(documents(60)), encoding="utf-8")
    runs: list[Run] = []

    def start(module: list[str], *overrides: str) -> Run:
        runs.append(Run(tmp_path_factory.mktemp("run")))
        place = [f"data.sources.0.path={corpus}", *overrides, "--run-dir", str(runs[-1].run_dir)]
        runs[-1].start(*module, str(TINY), *place)
        return runs[-1]

    yield start
    for run in runs:
        run.end()

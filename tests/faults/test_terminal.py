"""Ctrl-C in a terminal, once and twice: a real pseudo-terminal, a real run, then `asa resume`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from asa_dist.cli import main
from asa_dist.resume import latest_step
from benchmarks.live_run import ROOT, RUN_VARIABLE
from tests.real_run import TINY, Run
from tests.runtime.data.corpora import documents

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

CTRL_C = b"\x03"
ASKED = "asa: stopping: finishing the step and writing a checkpoint (once more to stop at once)"


class Terminal(Run):
    """A run in the foreground of a terminal of its own, and what stands on the screen."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._screen = bytearray()
        self._keyboard: int | None = None

    def start(self, *command: str) -> None:
        self.close()
        self._screen.clear()
        self._keyboard, terminal = os.openpty()
        environment = os.environ | {
            RUN_VARIABLE: self.mark, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
        environment.pop("DS_ACCELERATOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=self.folder, env=environment, stdin=terminal, stdout=terminal,
            stderr=terminal, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(terminal)
        threading.Thread(target=self._read, args=(self._keyboard,), daemon=True).start()

    def _read(self, screen: int) -> None:
        with contextlib.suppress(OSError):  # the last process that had it open has ended
            while data := os.read(screen, 4096):
                self._screen += data

    def press(self, key: bytes) -> None:
        assert self._keyboard is not None
        os.write(self._keyboard, key)

    @property
    def output(self) -> str:
        return self._screen.decode(errors="replace").replace("\r\n", "\n")

    errors = output

    def close(self) -> None:
        if self._keyboard is not None:
            os.close(self._keyboard)
            self._keyboard = None


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Terminal]:
    """`asa train` on two ranks, in its third step or later, with no end in sight."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n\n".join(documents(60)), encoding="utf-8")
    terminal = Terminal(tmp_path)
    try:
        terminal.start(
            "asa_dist.cli", "train", str(TINY), f"data.sources.0.path={corpus}", "train.steps=1000000",
            "train.eval_every_steps=1000000", "checkpoint.every_steps=2", "--run-dir", str(terminal.run_dir))
        terminal.wait_until(lambda: len(terminal.steps) >= 3)
        yield terminal
    finally:
        terminal.end()
        terminal.close()


def go_on(run: Terminal, step: int) -> str:
    return f"last checkpoint: {run.run_dir}/checkpoints/step-{step:08d}; go on with: asa resume {run.run_dir}\n"


def resume_and_finish(run: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps further, to an end without a prompt lost or repeated."""
    step = latest_step(run.run_dir)
    assert step is not None
    run.resume(f"train.steps={step + 2}")
    assert run.wait() == 0, run.output
    assert f"going on after step {step} of {step + 2}\n" in run.output
    assert run.output.endswith(f"finished: {run.run_dir}\n")
    trained = run.rows("trained")
    assert [row["step"] for row in trained] == list(range(1, step + 3))
    assert [prompt_id for row in trained for prompt_id in row["prompt_ids"]] == list(range(2 * step + 4))
    capsys.readouterr()
    assert main(["inspect", str(run.run_dir)]) == 0
    assert capsys.readouterr().out.startswith(f"{run.run_dir}: finished, {step + 2} steps\n")


def test_ctrl_c(run: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """Finishes its step, writes a checkpoint, ends with 0 and says how to go on."""
    run.press(CTRL_C)
    assert run.wait() == 0, run.output
    step = latest_step(run.run_dir)
    assert step is not None and step == run.rows("trained")[-1]["step"], "nothing is trained again"
    assert ASKED in run.output and "Traceback" not in run.output
    assert run.output.endswith(f"stopped after step {step}; {go_on(run, step)}")
    resume_and_finish(run, capsys)


@pytest.mark.long
def test_ctrl_c_twice(run: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends at once, whatever state the ranks are in."""
    run.the("rank 1").suspend()  # so that it cannot end well in between
    run.press(CTRL_C)
    run.wait_until(lambda: ASKED in run.output)
    run.press(CTRL_C)
    assert run.wait() == 130, run.output
    step = latest_step(run.run_dir)
    assert step is not None
    assert "asa: stopping at once\n" in run.output and "Traceback" not in run.output
    assert run.output.endswith(f"asa: stopped at once; {go_on(run, step)}")
    resume_and_finish(run, capsys)

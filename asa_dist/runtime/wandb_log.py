"""Weights & Biases as a reader of the run folder, in a process of its own: whatever becomes of it, training goes on.

    RunRecorder ──► metrics.jsonl, samples.jsonl, events.jsonl ──► this process ──► wandb (its files in RUN/wandb)
        └── WandbProcess: starts it; its end of input is the end of the run

    python -m asa_dist.runtime.wandb_log RUN MODE PROJECT        what WandbProcess starts
    python -m asa_dist.runtime.wandb_log --check-login           whether `online` could work

The rows of metrics.jsonl are logged under their own keys, with `step` as the x-axis; of samples.jsonl one table per
step, `samples`; of events.jsonl the summary `events/NAME`, how often, and `events/last`. No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from asa_dist.config import ConfigError, MetricsConfig
from asa_dist.config_text import read_tree

POLL_SECONDS = 2.0
FINISH_SECONDS = 10.0  # for wandb to upload what is left at the end of a run
CLOSE_SECONDS = 10.0  # for the process to end after that; ending the parts of a run has a deadline of a minute
CHECK_SECONDS = 60.0


def check_wandb(metrics: MetricsConfig) -> None:
    """Before anything heavy is started: whether what `metrics.wandb` asks for can work here. No network is needed.

    Raises:
        ConfigError: wandb is not installed, or `online` without being logged in.
    """
    if metrics.wandb == "disabled":
        return
    wanted = f"metrics.wandb = {metrics.wandb!r}"
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"{wanted}: wandb is not installed: pip install 'asa-dist[wandb]', or metrics.wandb=disabled")
    if metrics.wandb == "offline":
        return
    if why := _why_not_online():
        raise ConfigError(
            f"{wanted}: {why}; run `wandb login` or set WANDB_API_KEY (in the environment, never in a config), or "
            "choose metrics.wandb=offline"
        )


def _why_not_online() -> str | None:
    """Asked of wandb in a process of its own; None: nothing speaks against it."""
    try:
        check = subprocess.run(
            [sys.executable, "-m", __name__, "--check-login"], env=os.environ | {"WANDB_SILENT": "true"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=CHECK_SECONDS,
        )  # fmt: skip  # silent: else it asks the server for the user's name, as long as there is no network
    except subprocess.TimeoutExpired:
        return f"wandb did not answer within {CHECK_SECONDS:g} s whether it is logged in"
    if check.returncode == 0:
        return None
    return (check.stdout.strip() or check.stderr.strip() or f"exit code {check.returncode}").splitlines()[-1]


class WandbProcess:
    """The trainer's side: one process beside rank 0. Nothing here raises or waits, but for ``close``.

    Args:
        say: shows one line to whoever watches the run.
    """

    def __init__(self, run_dir: Path, metrics: MetricsConfig, say: Callable[[str], None]):
        self._say = say
        self._folder = run_dir / "wandb"
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", __name__, str(run_dir), metrics.wandb, metrics.wandb_project]
        environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}  # its makers would hear of errors, offline too
        try:
            self._folder.mkdir(exist_ok=True)
            with (self._folder / "process.log").open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, env=environment
                )
        except OSError as error:
            self._warn(f"wandb could not be started: {error}")
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def look(self) -> None:
        """Passes on what it has said; once, that it has ended, if it has."""
        if self._process is None:
            return
        self._pass_on()
        if self._process.poll() is not None:
            self._pass_on()
            self._warn(f"wandb has ended (exit code {self._process.returncode}; {self._last_words()})")
            self._release()

    def close(self) -> None:
        """The run has ended: waits until everything is logged, but not for long."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(FINISH_SECONDS + CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill(self._process)
            code = self._process.wait()
        self._pass_on()
        if code != 0:
            self._warn(f"wandb did not finish (exit code {code}; {self._last_words()}); what it has: {self._folder}")
        self._release()

    def _pass_on(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in (self._process.stdout.read() or b"").decode(errors="replace").splitlines():
            self._say(line)

    def _warn(self, what: str) -> None:
        self._say(f"asa: warning: {what}; the run and its own logs go on without it")

    def _last_words(self) -> str:
        log = self._folder / "process.log"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), f"nothing in {log}")

    def _release(self) -> None:
        assert self._process is not None and self._process.stdout is not None and self._process.stdin is not None
        self._process.stdout.close()
        self._process.stdin.close()
        self._process = None

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        """It and wandb's own process, which stands in another session."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()


# --- the process --------------------------------------------------------------------------------------------------
class Follower:
    """The rows of a .jsonl file that is being written; a line without its newline is not written yet."""

    def __init__(self, path: Path):
        self._path = path
        self._num_bytes = 0

    def new_rows(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._num_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._num_bytes += len(line)
                with contextlib.suppress(ValueError):  # damaged; `asa inspect` tells of it
                    yield json.loads(line)


class Mirror:
    """Logs what is new in the run folder.

    Args:
        run: a wandb run.
        table: wandb.Table.
        logged_step: steps up to this one are at the server already, from before a resume. What is trained again gives
            the same or nearly the same rows, so they are not logged twice.
    """

    def __init__(self, run_dir: Path, run: Any, table: Callable[..., Any], logged_step: int):
        self._run, self._table, self._logged_step = run, table, logged_step
        self._metrics, self._samples, self._events = (
            Follower(run_dir / f"{name}.jsonl") for name in ("metrics", "samples", "events")
        )
        self._num_events: Counter[str] = Counter()

    def log_what_is_new(self) -> None:
        for row in self._metrics.new_rows():
            if row["step"] > self._logged_step:
                self._run.log({key: value for key, value in row.items() if value is not None})
        for step, groups in groupby(self._samples.new_rows(), key=lambda row: row["step"]):
            if step > self._logged_step:
                self._run.log({"step": step, "samples": self._table(**sample_table(list(groups)))})
        last = None
        for last in self._events.new_rows():
            self._num_events[f"events/{last['event']}"] += 1
        if last is not None:
            self._run.summary.update({**self._num_events, "events/last": json.dumps(last, ensure_ascii=False)})


def sample_table(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``columns`` and ``data``, one row per response, out of rows of samples.jsonl."""
    rows = []
    for group in groups:
        shared = {key: value for key, value in group.items() if key != "responses"}
        rows += [shared | response for response in group["responses"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def run_id(run_dir: Path) -> str:
    """The same in every part of a run: kept in its folder."""
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(secrets.token_hex(8), encoding="utf-8")
        os.replace(partial, path)
    return path.read_text(encoding="utf-8").strip()


def mirror(run_dir: Path, mode: str, project: str) -> None:
    """Logs the run folder until the input ends, and then what is left.

    An offline run cannot know what earlier parts of it have logged, and syncing one part replaces another: so a resumed
    one starts from step 0 again, out of the logs, and the newest folder holds the whole run.
    """
    import wandb

    run = wandb.init(
        project=project, name=run_dir.name, id=run_id(run_dir), resume="allow", dir=run_dir,
        mode="offline" if mode == "offline" else "online",
        config=read_tree(run_dir / "config.yaml"),
        settings=wandb.Settings(
            # no command line, source, git remote or console output: nobody was asked whether they hold secrets
            console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True,
            x_stats_pid=os.getppid(), finish_timeout=FINISH_SECONDS,
        ),
    )  # fmt: skip
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # wandb's own count of calls would not survive a resume
    if mode == "online":
        print(f"wandb: {run.url}", flush=True)
    logged_step = int(run.summary.get("step", -1)) if run.resumed else -1
    follow = Mirror(run_dir, run, wandb.Table, logged_step)
    has_ended = False
    while not has_ended:
        has_ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])  # nothing is ever written to it
        follow.log_what_is_new()
    run.finish()


def login_problem() -> str | None:
    """Why wandb has no credentials for its server; None if it has some, valid or not."""
    import wandb

    try:
        return None if wandb.login(verify=False, prompt=False) else "not logged in to wandb"
    except wandb.Error as error:
        return f"not logged in to wandb: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m asa_dist.runtime.wandb_log")
    parser.add_argument("--check-login", action="store_true")
    parser.add_argument("run", nargs="*", metavar="RUN MODE PROJECT")
    options = parser.parse_args()
    if options.check_login:
        if problem := login_problem():
            print(problem)
        return 1 if problem else 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the end of input is what ends this one
    run_dir, mode, project = options.run
    mirror(Path(run_dir), mode, project)
    return 0


if __name__ == "__main__":
    sys.exit(main())

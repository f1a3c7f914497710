"""Which GPUs train, and which generate, on machines that have none, too; what signals do; how a run's end is told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from asa_dist import launcher
from asa_dist.config import Config, ConfigError, load_config
from asa_dist.launcher import (
    GpuAssignment,
    StopOnSignal,
    assign_gpus,
    launcher_command,
    process_layout,
    report_end,
    run_training,
)
from asa_dist.runtime.ownership import take_over
from asa_dist.train import parse_arguments
from tests.run_folders import write_checkpoint, write_run

QUICKSTART = Path(__file__).parent.parent / "configs/quickstart.yaml"
SHARED = ("rollout.placement=shared", "rollout.max_policy_age=0", "rollout.engine=vllm")


def config(*overrides: str, train: int, workers: int, gpus_per_worker: int) -> Config:
    rollout = [f"rollout.workers={workers}", f"rollout.gpus_per_worker={gpus_per_worker}"]
    return load_config(QUICKSTART, [f"train.gpus={train}", *rollout, *overrides])


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None) -> None:
    monkeypatch.setattr(launcher, "GPU_DRIVER_FILES", (__file__,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_trainer_and_workers_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 8, None)
    found = assign_gpus(config(train=4, workers=2, gpus_per_worker=1), "x")
    assert (found.train, found.rollout) == (["0", "1", "2", "3"], ["4", "5"])


def test_only_gpus_that_were_made_visible_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers hand out GPUs by number or by name."""
    show_gpus(monkeypatch, 4, "7,2,GPU-8f0e,5")
    found = assign_gpus(config(train=2, workers=1, gpus_per_worker=1), "x")
    assert (found.train, found.rollout) == (["7", "2"], ["GPU-8f0e"])


@pytest.mark.parametrize(("train", "workers", "gpus_per_worker", "expected"), [
    (1, 1, 1, ["7"]), (4, 2, 1, ["7", "2"]), (4, 2, 2, ["7", "2", "GPU-8f0e", "5"])])
def test_in_turns_workers_have_the_first_gpus_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch, train: int, workers: int, gpus_per_worker: int, expected: list[str]
) -> None:
    show_gpus(monkeypatch, 4, "7,2,GPU-8f0e,5")
    found = assign_gpus(config(*SHARED, train=train, workers=workers, gpus_per_worker=gpus_per_worker), "x")
    assert (found.train, found.rollout) == (["7", "2", "GPU-8f0e", "5"][:train], expected)
    show_gpus(monkeypatch, train - 1, None)
    with pytest.raises(ConfigError, match=f" = {len(expected)} of the same need {train} GPUs, this machine shows "):
        assign_gpus(config(*SHARED, train=train, workers=workers, gpus_per_worker=gpus_per_worker), "x")


def test_one_line_says_where_workers_are() -> None:
    asked = {"train": 4, "workers": 2, "gpus_per_worker": 1}
    assert "  rollout workers: 2, on GPUs 4 to 5; engine hf" in process_layout(config(**asked))
    assert "  rollout workers: 2, on GPUs 0 to 1, in turns with the ranks; engine vllm" in process_layout(
        config(*SHARED, **asked))
    assert "  trainer ranks: 1, on GPU 0; ZeRO" in process_layout(config(train=1, workers=1, gpus_per_worker=1))
    on_cpus = process_layout(config(*SHARED, train=0, workers=2, gpus_per_worker=0))
    assert "  rollout workers: 2, on the CPU, threads each: 1, in turns with the ranks; engine vllm" in on_cpus


def test_one_gpu_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 2, "6,7")
    with pytest.raises(ConfigError, match=r"^x: train.gpus = 2 and .* = 1 need 3 GPUs, this machine shows 2$"):
        assign_gpus(config(train=2, workers=1, gpus_per_worker=1), "x")


def test_a_run_on_the_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 8, None)
    found = assign_gpus(load_config(QUICKSTART), "x")
    assert not found.train and not found.rollout


# --- signals ------------------------------------------------------------------------------------------------------
# In place of the deepspeed launcher and its ranks.
NOTE_PID = """
import os, sys, time
from pathlib import Path
run_dir = Path(sys.argv[1])
has_child = {fork}
if has_child != 0:
    (run_dir / ".pid").write_text(str(os.getpid()))
    (run_dir / ".pid").rename(run_dir / "pid")
"""
OBEDIENT = NOTE_PID.format(fork="None") + """
while not (run_dir / "stop").exists():
    time.sleep(0.02)
"""
DEAF_WITH_CHILD = NOTE_PID.format(fork="os.fork()") + """
time.sleep(600)
"""
DEADLINE_SECONDS = 60.0  # for a hang


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)
    return path.read_text()


def run_and(run_dir: Path, program: str, meanwhile: Callable[[int], None]) -> tuple[int, int | None]:
    """(exit code, signal that killed) of a launched program; ``meanwhile`` gets its process id, in a thread."""
    thread = threading.Thread(target=lambda: meanwhile(int(wait_for(run_dir / "pid"))))
    thread.start()
    with StopOnSignal(run_dir) as stop:
        assert not stop.was_asked
        code = stop.run([sys.executable, "-c", program, str(run_dir)], {}, ())
    thread.join()
    return code, stop.killed_by


def signal_this_process(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks(tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    assert run_and(tmp_path, OBEDIENT, lambda pid: signal_this_process(number)) == (0, None)
    assert (tmp_path / "stop").read_text() == f"asa train ({number.name})"
    assert capfd.readouterr().err == (
        "asa: stopping: finishing the step and writing a checkpoint (once more to stop at once)\n")


def test_the_second_signal_kills_what_is_stopped_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def meanwhile(pid: int) -> None:
        group = [pid, *(child.pid for child in psutil.Process(pid).children())]
        for member in group:
            os.kill(member, signal.SIGSTOP)
        signal_this_process(signal.SIGINT)
        wait_for(tmp_path / "stop")
        assert all(psutil.pid_exists(member) for member in group)
        signal_this_process(signal.SIGTERM)

    started = time.monotonic()
    assert run_and(tmp_path, DEAF_WITH_CHILD, meanwhile) == (-signal.SIGKILL, signal.SIGTERM)
    assert time.monotonic() - started < launcher.STOP_GRACE_SECONDS
    assert capfd.readouterr().err.splitlines()[-1] == "asa: stopping at once"


def test_what_a_killed_launcher_leaves_is_ended(tmp_path: Path) -> None:
    assert run_and(tmp_path, DEAF_WITH_CHILD, lambda pid: os.kill(pid, signal.SIGKILL)) == (-signal.SIGKILL, None)


def test_before_anything_is_launched_the_first_signal_ends_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cleaned_up = False
    with pytest.raises(SystemExit) as ended, StopOnSignal(tmp_path):  # noqa: PT012
        try:
            signal_this_process(signal.SIGTERM)
        finally:
            signal_this_process(signal.SIGINT)  # of the impatient: does not interrupt this
            cleaned_up = True
    assert ended.value.code == 128 + signal.SIGTERM and cleaned_up
    assert capfd.readouterr().err == "asa: stopping\n" and list(tmp_path.iterdir()) == []


def test_after_the_launcher_has_ended_nobody_is_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with StopOnSignal(tmp_path) as stop:
        assert stop.run([sys.executable, "-c", ""], {}, ()) == 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal_this_process(number)
    assert stop.killed_by is None and stop.was_asked  # who started it may still heed that
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_what_a_killed_launcher_leaves_is_ended_at_once_if_asked(tmp_path: Path) -> None:
    def meanwhile(pid: int) -> None:
        (child,) = psutil.Process(pid).children()
        child.suspend()  # SIGTERM does not reach it
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        signal_this_process(signal.SIGINT)

    started = time.monotonic()
    assert run_and(tmp_path, DEAF_WITH_CHILD, meanwhile) == (-signal.SIGKILL, None)
    assert time.monotonic() - started < launcher.STOP_GRACE_SECONDS and not (tmp_path / "stop").exists()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"{pid} is not waited for"
        time.sleep(0.01)


# --- what the ranks are told --------------------------------------------------------------------------------------
@pytest.mark.parametrize("resume", [False, True])
def test_the_ranks_understand_their_command(tmp_path: Path, resume: bool) -> None:
    gpus = GpuAssignment(["0", "1"], [])
    address = ("--ray-address", "127.0.0.1:6379")
    command = launcher_command(Config(), gpus, tmp_path, resume, 1763797931.1234567, *address)
    understood = parse_arguments(["--local_rank=1", *command[command.index("asa_dist.train") + 1 :]])
    assert understood.config == str(tmp_path / "config.yaml") and understood.run_dir == tmp_path
    assert understood.prepared and understood.resume is resume and understood.ray_address == "127.0.0.1:6379"
    assert understood.started_at == 1763797931.1234567


# --- the last words -----------------------------------------------------------------------------------------------
NO_CHECKPOINT = "no checkpoint yet; go on with: asa resume {}\n"
STEP_4 = "last checkpoint: {}/checkpoints/step-00000004; go on with: asa resume {}\n"


@pytest.mark.parametrize(("code", "killed_by", "step", "expected", "words"), [
    (0, None, 10, 0, "finished: {}\n"),
    (0, signal.SIGINT, 10, 0, "finished: {}\n"),
    (0, None, 4, 0, "stopped after step 4; " + STEP_4),
    (0, None, None, 0, "stopped; " + NO_CHECKPOINT),
    (75, None, 4, 75, "ended early after step 4; " + STEP_4),
    (-9, signal.SIGINT, 4, 130, "asa: stopped at once; " + STEP_4),
    (-9, signal.SIGTERM, None, 143, "asa: stopped at once; " + NO_CHECKPOINT),
    (1, None, 4, 1, "asa: the run failed (exit code 1); " + STEP_4),
    (76, None, 4, 76, "asa: another start has taken over {}, see above: the run goes on there, not here\n"),
    (247, None, 4, 247, "asa: the run failed (a rank was ended by signal 9); " + STEP_4),
    (-15, None, 4, 143, "asa: the run failed (the launcher was ended by signal 15); " + STEP_4),
])
def test_last_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int, killed_by: int | None, step: int | None,
    expected: int, words: str,
) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir)
    for earlier in range(1, (step or 0) + 1):
        write_checkpoint(run_dir, earlier)
    assert report_end(code, killed_by, run_dir, num_steps=10) == expected
    printed = capfd.readouterr()
    assert (printed.err if words.startswith("asa: ") else printed.out) == words.format(run_dir, run_dir)
    assert printed.out == "" or printed.err == ""


def test_the_last_checkpoint_is_one_that_can_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir)
    older, newer = write_checkpoint(run_dir, 4), write_checkpoint(run_dir, 10)
    (newer / "shards/rank-00000.safetensors").write_bytes(b"cut off")
    report_end(1, None, run_dir, num_steps=10)
    assert capfd.readouterr().err == "asa: the run failed (exit code 1); " + STEP_4.format(run_dir, run_dir)
    (older / "manifest.json").unlink()
    report_end(1, None, run_dir, num_steps=10)
    assert "; NONE of its checkpoints can be used; go on with: asa resume " in capfd.readouterr().err


def test_the_command_can_be_pasted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "my run")
    report_end(0, None, tmp_path / "my run", num_steps=10)
    assert capfd.readouterr().out.endswith(f"asa resume '{tmp_path}/my run'\n")


def test_a_failed_run_names_the_stacks_that_were_dumped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    (stacks / "worker-0.txt").write_text("host h, worker-0, while generating, deadline 300 s:\n", encoding="utf-8")
    report_end(1, None, tmp_path, num_steps=5)
    assert "stacks" not in capsys.readouterr().err, "it was killed, but did not hang"
    (stacks / "rank-1.txt").write_text("rank 1\nThread 0x1 (most recent call first):\n", encoding="utf-8")
    report_end(1, None, tmp_path, num_steps=5)
    assert f"(exit code 1; stacks: {stacks / 'rank-1.txt'})" in capsys.readouterr().err


def test_an_earlier_start_of_a_job_that_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    owner = take_over(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_training(load_config(QUICKSTART), tmp_path, GpuAssignment((), ()), resume=True, started_at=0.0) == 76
    assert capfd.readouterr().err.startswith("asa: SLURM has started this job anew since: process ")
    assert list(tmp_path.iterdir()) == [owner.folder]

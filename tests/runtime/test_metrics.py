"""What a run writes and shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa_dist.config import MetricsConfig
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.runtime.metrics import ProgressLine, RunRecorder


def row(step: int, **changes: float) -> dict[str, float]:
    values = {"loss/total": 1.25, "loss/mle": 2.5, "loss/self_align": -0.125, "trust/tau": 0.5, "trust/beta": 0.4}
    values |= {"perf/tokens_per_second": 12345.0, "rollout/max_abs_dlogp": 1e-6, "rollout/policy_age_max": 0.0}
    return {"step": step, **values, **{name.replace("__", "/"): value for name, value in changes.items()}}


def shown_in_a_terminal(num_steps: int, first_step: int, use: Callable[[ProgressLine], None]) -> str:
    """All that a live line writes while it is used."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 200))
    with os.fdopen(side, "w") as stream:
        line = ProgressLine(num_steps, first_step, stream)
        use(line)
        line.close()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: how a terminal ends
        while chunk := os.read(main, 65536):
            shown += chunk
    os.close(main)
    return shown.decode()


# --- the progress line --------------------------------------------------------------------------------------------
def test_plain_lines_come_at_intervals_and_at_the_end() -> None:
    stream = io.StringIO()
    line = ProgressLine(5, 0, stream, plain_every_seconds=1e9)
    for step in range(1, 6):
        line.show(row(step))
    line.close()
    shown = stream.getvalue().splitlines()
    assert [text.split(" ")[1] for text in shown] == ["1/5", "5/5"]
    assert shown[0].startswith("step 1/5 loss 1.250 mle 2.500 align -0.125 τ 0.50 β 0.4 12,345 tokens/s ")
    assert shown[-1].endswith("00:00 left")


def test_every_plain_line() -> None:
    stream = io.StringIO()
    line = ProgressLine(3, 0, stream, plain_every_seconds=0.0)
    for step in range(1, 4):
        line.show(row(step))
    assert len(stream.getvalue().splitlines()) == 3


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    stream = io.StringIO()
    line = ProgressLine(100, 90, stream, plain_every_seconds=0.0)
    line._started -= 50.0  # 10 s a step so far
    line.show(row(95))
    assert stream.getvalue().startswith("step 95/100 ") and stream.getvalue().endswith(" 00:50 left\n")


def test_a_resumed_runs_live_line_counts_from_where_it_goes_on() -> None:
    shown = shown_in_a_terminal(100, 90, lambda line: line.show(row(95)))
    assert "90/100" in shown and "95/100" in shown and " 0/100" not in shown


def test_an_evaluation_is_said_even_before_the_first_step() -> None:
    stream = io.StringIO()
    ProgressLine(3, 0, stream).show({"step": 0, "eval/perplexity": 321.456, "eval/bigram_perplexity": 12.0})
    assert stream.getvalue() == "step 0: held-out perplexity 321.46, bigram model of the same tokens 12.00\n"


def test_a_live_line_in_a_terminal() -> None:
    def use(line: ProgressLine) -> None:
        line.show(row(1))
        line.say("a message")
        line.show(row(3))

    shown = shown_in_a_terminal(3, 0, use)
    assert "\r" in shown and "a message\r\n" in shown
    assert "3/3" in shown and "100%" in shown and "step 3/3 loss" not in shown
    assert "loss 1.250 mle 2.500" in shown.rpartition("a message")[2]


# --- the files ----------------------------------------------------------------------------------------------------
def decode(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


def recorder(folder: Path, stream: io.StringIO, **settings: int) -> RunRecorder:
    return RunRecorder(folder, MetricsConfig(**settings), decode, ProgressLine(1000, 0, stream))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def response(token: int) -> Response:
    logprob_T = np.zeros(2, np.float32)
    return Response(np.array([token, 0], np.int32), logprob_T, logprob_T, True, ((0, 4),))


def test_what_was_recorded_is_read_back_and_another_recorder_goes_on(tmp_path: Path) -> None:
    groups = [
        RolloutGroup(1, place, Prompt(70 + place, 0, np.array([place, 9], np.int32)), (response(5), response(6)))
        for place in range(3)
    ]
    terms = [{"self": torch.tensor([[0.5, 0.25], [1.0, 2.0], [3.0, 4.0]])}]
    first = recorder(tmp_path, io.StringIO(), sample_groups=2)
    first.metrics(row(1))
    first.trained(1, [70, 71, 72])
    first.samples(1, groups, terms, tau=0.75)
    assert read(tmp_path, "metrics") == [row(1)], "flushed before it is closed"
    first.close()
    second = recorder(tmp_path, io.StringIO())
    second.metrics(row(2))
    second.close()
    assert read(tmp_path, "metrics") == [row(1), row(2)]
    assert read(tmp_path, "trained") == [{"step": 1, "prompt_ids": [70, 71, 72]}]
    samples = read(tmp_path, "samples")
    assert [(sample["prompt_id"], sample["prompt"], sample["tau"]) for sample in samples] == [
        (70, "0 9", 0.75),
        (71, "1 9", 0.75),
    ]
    assert samples[1]["responses"] == [
        {"text": "5 0", "finished": True, "version": 4, "self": 1.0},
        {"text": "6 0", "finished": True, "version": 4, "self": 2.0},
    ]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """`NaN` is no JSON: a reader would stop at it; and a diagnostic that overflows is no reason to end a run."""
    recording = recorder(tmp_path, io.StringIO())
    recording.metrics(row(1, rollout__mismatch_kl=float("inf")))
    recording.close()
    assert read(tmp_path, "metrics") == [row(1) | {"rollout/mismatch_kl": None}]


def test_a_step_without_an_update_is_told_three_times(tmp_path: Path) -> None:
    stream = io.StringIO()
    recording = recorder(tmp_path, stream)
    recording.trained(4, [70, 71])
    recording.trained(5, [72, 73], skipped=True)
    recording.skipped(5, "not finite: loss/total", [72])
    recording.close()
    assert read(tmp_path, "trained") == [
        {"step": 4, "prompt_ids": [70, 71]},
        {"step": 5, "prompt_ids": [72, 73], "skipped": True},
    ]
    (event,) = read(tmp_path, "events")
    assert (event["event"], event["step"], event["prompt_ids"]) == ("step_skipped", 5, [72])
    assert stream.getvalue() == "asa: warning: step 5 made no update: not finite: loss/total\n"


def test_events_have_a_time_and_any_details(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    recording = recorder(tmp_path, io.StringIO())
    recording.event("checkpoint_damaged", name="step-00000010", reason="shards/rank-00000.safetensors: 3 bytes short")
    assert recording.sync() is True
    (event,) = read(tmp_path, "events")
    recording.close()
    time = datetime.fromisoformat(event.pop("time"))
    assert before - timedelta(seconds=1) <= time <= datetime.now(UTC)
    assert event == {
        "event": "checkpoint_damaged",
        "name": "step-00000010",
        "reason": "shards/rank-00000.safetensors: 3 bytes short",
    }


def test_a_full_disk_is_said_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """The system refuses bytes beyond a limit; pytest's own files must not meet it, hence the process."""
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["False", "True"]
    first, second = ended.stderr.splitlines()
    assert first.startswith(f"asa: warning: {tmp_path / 'events.jsonl'}: File too large: ")
    assert first.endswith("training goes on") and second.endswith("what waited in memory is written")
    assert [trained["step"] for trained in read(tmp_path, "trained")] == list(range(1, 12))
    assert [event["step"] for event in read(tmp_path, "events")] == list(range(1, 12))


FULL_DISK = """
import resource, sys
from pathlib import Path
from asa_dist.config import MetricsConfig
from asa_dist.runtime.metrics import ProgressLine, RunRecorder

recording = RunRecorder(Path(sys.argv[1]), MetricsConfig(), str, ProgressLine(100, 0, sys.stderr))
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for step in range(1, 11):
    recording.trained(step, list(range(10)))
    recording.event("checkpoint", step=step)
print(recording.sync())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recording.trained(11, [])
recording.event("checkpoint", step=11)
print(recording.sync())
recording.close()
"""

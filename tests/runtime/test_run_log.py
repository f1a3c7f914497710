"""Lines that a full disk delays but never tears; files cut back to a checkpoint's step."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from asa_dist.runtime.run_log import RunLog, read_events, read_rows, truncate_logs


def write_lines(path: Path, *lines: str, torn: str = "") -> None:
    path.write_text("".join(f"{line}\n" for line in lines) + torn, encoding="utf-8")


def cut(run_dir: Path, step: int) -> None:
    """As a start does that has its own folder."""
    work = run_dir / "work"
    work.mkdir(exist_ok=True)
    truncate_logs(run_dir, step, work)
    assert list(work.iterdir()) == []


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path))


# --- a full disk ----------------------------------------------------------------------------------------------------
FILL = """
import json, resource, sys
from pathlib import Path
from asa_dist.runtime.run_log import RunLog

path = Path(sys.argv[1])
log = RunLog(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))  # the system refuses what goes beyond
seen = []
for step in range(10):
    error = log.append({"step": step, "text": "x" * 40})
    seen.append((error and error.errno, log.num_pending, path.read_bytes().endswith(b"}\\n")))
error = log.sync()
seen.append((error and error.errno, log.num_pending, path.read_bytes().endswith(b"}\\n")))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before = len(path.read_bytes().splitlines())
seen.append((log.append({"step": 10}), log.num_pending, log.sync()))
print(json.dumps([before, seen]))
"""


def test_lines_wait_for_room_and_none_is_torn_or_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ended = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    written, seen = json.loads(ended.stdout)
    waiting = 10 - written
    assert 0 < written < 10
    assert seen[:written] == [[None, 0, True]] * written
    assert seen[written:10] == [[errno.EFBIG, count, True] for count in range(1, waiting + 1)]
    assert seen[10] == [errno.EFBIG, waiting, True], "what waits is not durable"
    assert seen[11] == [None, 0, None]
    assert rows(path) == [{"step": step, "text": "x" * 40} for step in range(10)] + [{"step": 10}]


# --- appending ------------------------------------------------------------------------------------------------------
def test_a_torn_last_line_is_cut_before_more_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, '{"step": 1}', torn='{"st')
    assert rows(path) == [{"step": 1}]
    log = RunLog(path)
    assert log.append({"step": 2, "τ": 0.5}) is None and log.sync() is None
    log.close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2, "τ": 0.5}\n'


def test_a_file_that_is_one_long_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, torn="x" * 200_000)
    log = RunLog(path)
    log.append({"step": 1})
    log.close()
    assert rows(path) == [{"step": 1}]


def test_what_is_no_json_is_refused_and_does_not_wait(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("nan")})
    assert log.num_pending == 0
    log.close()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "events.jsonl")

    def append(thread: int) -> None:
        for number in range(200):
            log.append({"thread": thread, "number": number})

    threads = [threading.Thread(target=append, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = rows(tmp_path / "events.jsonl")
    for thread in range(4):
        assert [row["number"] for row in found if row["thread"] == thread] == list(range(200))


def test_what_comes_after_the_end_is_dropped(tmp_path: Path) -> None:
    """A thread may be late; its descriptor belongs to another file by then."""
    log = RunLog(tmp_path / "events.jsonl")
    log.append({"event": "finished"})
    log.close()
    with (tmp_path / "other").open("wb") as other:
        assert log.append({"event": "worker_died"}) is None and log.sync() is None
        log.close()
        assert os.fstat(other.fileno()).st_size == 0, "it was given the descriptor of the log"
    assert rows(tmp_path / "events.jsonl") == [{"event": "finished"}]


# --- reading and cutting --------------------------------------------------------------------------------------------
def test_a_file_that_is_not_there_yet_has_no_rows(tmp_path: Path) -> None:
    assert rows(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize("damaged", ["{]", "", "\0" * 50, "\0" * 51, "3"])
def test_a_damaged_line_that_is_needed_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "trained.jsonl"
    write_lines(path, '{"step": 1}', damaged, '{"step": 3}')
    write_lines(tmp_path / "metrics.jsonl", *(f'{{"step": {step}}}' for step in range(9)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for read in (
        lambda: rows(path),
        lambda: cut(tmp_path, 3),  # a needed row follows
        lambda: cut(tmp_path, 2),  # it is that of step 2 itself
    ):
        with pytest.raises(ValueError, match=r"trained.jsonl, line 2: no JSON object$"):
            read()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before, "what is refused changes nothing"


@pytest.mark.parametrize("damage", ["{]\n", "\0" * 4096, "\0" * 4096 + '1}\n{"step": 4}\n', '3\n\n{"step": 3}\n\0'])
@pytest.mark.parametrize("name", ["metrics", "samples", "trained"])
def test_what_is_damaged_behind_the_last_step_needed_is_cut_off(tmp_path: Path, name: str, damage: str) -> None:
    """A loss of power leaves it there: only what stood before a checkpoint is durable."""
    write_lines(tmp_path / f"{name}.jsonl", '{"step": 1}', '{"step": 2}', torn=damage)
    cut(tmp_path, 2)
    assert rows(tmp_path / f"{name}.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_log_without_a_row_for_every_step(tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", '{"step": 1}', "{]", '{"step": 51}')
    cut(tmp_path, 50)
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1}]


def test_a_damaged_end_counts_as_not_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "trained.jsonl", '{"step": 1}', "\0\0", "{]", torn="{")
    assert rows(tmp_path / "trained.jsonl") == [{"step": 1}]


def test_damaged_events_are_counted(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []
    write_lines(tmp_path / "events.jsonl", '{"event": "started"}', "\0\0", '{"event": "resumed"}', torn="{")
    assert list(read_events(tmp_path)) == [
        {"event": "started"}, {"event": "unreadable", "line": 2}, {"event": "resumed"}]


def test_later_rows_and_torn_lines_are_cut_and_events_stay(tmp_path: Path) -> None:
    steps = [f'{{"step": {step}}}' for step in (0, 1, 2, 2, 3, 4)]
    write_lines(tmp_path / "metrics.jsonl", *steps, torn='{"step": 5')
    write_lines(tmp_path / "trained.jsonl", *steps[:2], torn='{"step": 2}')
    write_lines(tmp_path / "events.jsonl", '{"event": "started"}', '{"event": "checkpoint", "step": 9}', torn="{")
    for _ in range(2):
        cut(tmp_path, 2)
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 2]
        assert (tmp_path / "trained.jsonl").read_text(encoding="utf-8") == '{"step": 0}\n{"step": 1}\n'
        assert [row["event"] for row in rows(tmp_path / "events.jsonl")] == ["started", "checkpoint"]
        assert (tmp_path / "events.jsonl").read_bytes().endswith(b"9}\n")
    assert not (tmp_path / "samples.jsonl").exists()
    cut(tmp_path, -1)
    assert rows(tmp_path / "metrics.jsonl") == []


def test_reading_needs_no_torch() -> None:
    code = "import sys, asa_dist.runtime.run_log; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

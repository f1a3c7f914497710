"""Two starts of one run: whatever the older one is about to do when the newer one comes, it changes nothing then."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from asa_dist.runtime import checkpoint_files as files
from asa_dist.runtime import ownership
from asa_dist.runtime.checkpoint_files import Manifest
from asa_dist.runtime.ownership import JobStart, Ownership, TakenOver, read_owner, take_over
from asa_dist.runtime.run_log import RunLog, read_rows, truncate_logs
from tests.disk_steps import STEPS, before_disk_step

SHARD = "shards/rank-00000.safetensors"


def save(start: Ownership, step: int, keep: int = 1) -> None:
    """What Checkpointer.save does on one rank."""
    folder = files.start_partial(start.folder, step)
    record = files.write_file(folder / SHARD, [f"start {start.generation}, step {step}".encode()])
    name = files.complete(start.run_dir, folder, Manifest(step, 1, 3, {}, {}, {SHARD: record}))
    files.settle(start.run_dir, start.folder, name, keep)


def history(run_dir: Path) -> dict[str, bytes]:
    """Every file of checkpoints/."""
    folder = run_dir / files.FOLDER
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest_step(run_dir: Path) -> int:
    return files.list_checkpoints(run_dir)[0].step


def starts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob(".start*"))


# --- who owns it --------------------------------------------------------------------------------------------------
def test_the_newest_start_owns_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_owner(tmp_path) is None
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    first = take_over(tmp_path)
    assert first.lost_to() is None
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr("socket.gethostname", lambda: "node3")
    second = take_over(tmp_path)
    owner = read_owner(tmp_path)
    assert owner is not None and starts(tmp_path) == [".start-2"]
    assert (owner.generation, str(owner)) == (2, f"process {os.getpid()} of job 123, restart 2, on host node3")
    second.require()
    with pytest.raises(TakenOver) as lost:
        first.require()
    assert str(lost.value) == f"another start of this run ({owner}) took over {tmp_path} at {owner.time}; this one ends"


def test_a_run_folder_that_was_deleted(tmp_path: Path) -> None:
    start = take_over(tmp_path)
    shutil.rmtree(tmp_path)
    assert "it was deleted" in str(start.lost_to())


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"generation": 2, "unheard": 1}', b"\0\0"])
def test_an_owner_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """It has just begun, or was cut off: it counts as a start all the same."""
    (tmp_path / ".start-2").mkdir()
    if content is not None:
        (tmp_path / ".start-2/owner.json").write_bytes(content)
    assert read_owner(tmp_path) is None
    assert take_over(tmp_path).generation == 3


# --- checkpoints ----------------------------------------------------------------------------------------------------
def test_whatever_a_zombie_is_about_to_do_to_checkpoints(tmp_path: Path) -> None:
    """It commits and removes what is too old, but for the successor that comes before one of its steps on the disk."""
    seen = set()
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        zombie, found = take_over(run_dir), list[dict[str, bytes]]()
        for step in (1, 2):
            save(zombie, step, keep=9)

        def come(run_dir: Path = run_dir, found: list[dict[str, bytes]] = found) -> None:
            take_over(run_dir)
            found.append(history(run_dir))

        with before_disk_step(number, come):
            try:
                save(zombie, 3)
            except OSError:
                assert zombie.lost_to() is not None
        if not found:
            break
        assert history(run_dir) == found[0], f"step {number} of its steps"
        assert starts(run_dir) == [".start-2"]
        with pytest.raises(FileNotFoundError):
            save(zombie, 4)
        seen.add(newest_step(run_dir))
    assert seen == {2, 3} and number > 12, "before and after it committed"


def test_a_zombie_sets_nothing_aside(tmp_path: Path) -> None:
    """It found the newest one damaged before its successor wrote one of that name."""
    zombie = take_over(tmp_path)
    successor = take_over(tmp_path)
    save(successor, 2)
    before = history(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.set_aside(tmp_path, zombie.folder, "step-00000002")
    assert history(tmp_path) == before


def test_the_successor_goes_on(tmp_path: Path) -> None:
    zombie = take_over(tmp_path)
    save(zombie, 1)
    folder = files.start_partial(zombie.folder, 2)
    with (folder / SHARD).open("wb") as still_open:
        successor = take_over(tmp_path)
        still_open.write(b"zombie")
    save(successor, 2, keep=2)
    assert [entry.step for entry in files.list_checkpoints(tmp_path)] == [2, 1]
    assert (tmp_path / "checkpoints/step-00000002" / SHARD).read_bytes() == b"start 2, step 2"


# --- logs -----------------------------------------------------------------------------------------------------------
def test_what_a_zombie_logs_is_nobodys(tmp_path: Path) -> None:
    take_over(tmp_path)
    names = ("metrics", "samples", "trained", "events")
    logs = {name: RunLog(tmp_path / f"{name}.jsonl") for name in names}
    for name, log in logs.items():
        for step in (1, 2, 3):
            log.append({"step": step} if name != "events" else {"event": "checkpoint", "step": step})
    truncate_logs(tmp_path, 2, take_over(tmp_path).folder)
    own = {name: RunLog(tmp_path / f"{name}.jsonl") for name in names}
    before = {name: list(read_rows(tmp_path / f"{name}.jsonl")) for name in names}
    assert [row["step"] for row in before["trained"]] == [1, 2] and len(before["events"]) == 3
    for name in names:
        logs[name].append({"step": 4, "by": "zombie"})
        own[name].append({"step": 3, "by": "successor"})
        logs[name].append({"step": 5, "by": "zombie"})
        assert logs[name].sync() is None
        logs[name].close()
        own[name].close()
        assert list(read_rows(tmp_path / f"{name}.jsonl")) == [*before[name], {"step": 3, "by": "successor"}]


def test_a_zombie_cuts_no_logs(tmp_path: Path) -> None:
    """As one that loaded its checkpoint for so long that it has been replaced."""
    zombie = take_over(tmp_path)
    log = RunLog(tmp_path / "trained.jsonl")
    log.append({"step": 1})
    log.close()
    take_over(tmp_path)
    with pytest.raises(OSError, match=r"\.start-1"):
        truncate_logs(tmp_path, -1, zombie.folder)
    assert list(read_rows(tmp_path / "trained.jsonl")) == [{"step": 1}]


# --- taking over ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("others", [1, 2])
def test_starts_at_the_same_time(tmp_path: Path, others: int) -> None:
    """Before one of its steps on the disk others take over, too: in the end one start owns the folder."""
    seen = set()
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        zombie, came = take_over(run_dir), list[Ownership]()

        def come(run_dir: Path = run_dir, came: list[Ownership] = came) -> None:
            came.extend(take_over(run_dir) for _ in range(others))

        with before_disk_step(number, come):
            try:
                mine = take_over(run_dir)
            except TakenOver:
                mine = zombie
        owners = [start for start in (zombie, mine, *came) if start.lost_to() is None]
        assert len(owners) == 1 and owners[0] is not zombie, f"step {number} of its steps"
        assert starts(run_dir) == [owners[0].folder.name]
        save(owners[0], 1)
        seen.add(owners[0] is mine)
        if not came:
            break
    assert seen == {True, False} and number > 5


# --- starts of one job ----------------------------------------------------------------------------------------------
def take_over_as(run_dir: Path, job: str, restart: int) -> Ownership:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", job)
        patch.setenv("SLURM_RESTART_COUNT", str(restart))
        return take_over(run_dir)


def test_of_one_job_the_later_restart_stays(tmp_path: Path) -> None:
    second = take_over_as(tmp_path, "4711", 2)
    (tmp_path / ".start-7").mkdir()  # somebody's who was killed
    with pytest.raises(TakenOver) as late:
        take_over_as(tmp_path, "4711", 1)
    assert str(late.value).startswith(
        f"SLURM has started this job anew since: process {os.getpid()} of job 4711, restart 2, on host ")
    assert second.lost_to() is None and starts(tmp_path) == [".start-1", ".start-7"]
    for job, restart, generation in (("4711", 2, 8), ("4711", 3, 9), ("4710", 0, 10), ("4711", 0, 11)):
        assert take_over_as(tmp_path, job, restart).generation == generation
        assert starts(tmp_path) == [f".start-{generation}"]


def test_earlier_starts_of_a_job_come_late(tmp_path: Path) -> None:
    """Before any of its steps on the disk two of them come: even where these leave it a number below theirs."""
    for number in itertools.count(1):
        run_dir, came = tmp_path / str(number), list[int]()
        run_dir.mkdir()
        take_over(run_dir)

        def come(run_dir: Path = run_dir, came: list[int] = came) -> None:
            for restart in (0, 1):
                came.append(restart)
                with suppress(TakenOver):
                    take_over_as(run_dir, "4711", restart)

        with before_disk_step(number, come):
            mine = take_over_as(run_dir, "4711", 2)
        assert mine.lost_to() is None and starts(run_dir) == [mine.folder.name], f"step {number} of its steps"
        if not came:
            break
    assert number > 10


class Gate:
    """Where a thread waits before its n-th step on the disk."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.reached, self.opened = threading.Event(), threading.Event()

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.reached.set()
            assert self.opened.wait(60)


def take_over_at_once(run_dir: Path, gates: dict[JobStart, Gate]) -> dict[JobStart, Ownership]:
    """The starts begin one after the other, each up to its gate, and go on in that order; what they got."""
    here, got = threading.local(), dict[JobStart, Ownership]()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if (start := getattr(here, "start", None)) is not None:
                gates[start].step()
            return function(*arguments, **options)

        return act

    def run(start: JobStart) -> None:
        here.start = start
        try:
            got[start] = take_over(run_dir)
        except TakenOver:
            pass
        finally:
            gates[start].reached.set()

    threads = {start: threading.Thread(target=run, args=(start,)) for start in gates}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobStart, "here", lambda: here.start)
        for module, name in STEPS:
            patch.setattr(module, name, watched(getattr(module, name)))
        for start, thread in threads.items():
            thread.start()
            assert gates[start].reached.wait(60)
        for start, thread in threads.items():
            gates[start].opened.set()
            thread.join(60)
    return got


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_two_starts_of_a_job_at_once(tmp_path: Path, order: tuple[int, int]) -> None:
    """However their steps on the disk fall: the later restart owns the folder."""
    num_late = 0
    for numbers in itertools.product(range(1, 14), repeat=2):
        run_dir = tmp_path / "-".join(map(str, numbers))
        run_dir.mkdir()
        take_over_as(run_dir, "4711", 0)
        by_restart = {restart: JobStart("4711", restart) for restart in order}
        gates = {by_restart[restart]: Gate(number) for restart, number in zip(order, numbers, strict=True)}
        got = take_over_at_once(run_dir, gates)
        owner, earlier = got[by_restart[2]], got.get(by_restart[1])
        assert owner.lost_to() is None and starts(run_dir) == [owner.folder.name], numbers
        assert earlier is None or earlier.lost_to() is not None
        num_late += earlier is None
    assert 0 < num_late < 169, "both before and after the other"


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


def test_killed_anywhere_while_taking_over(tmp_path: Path) -> None:
    seen = set()
    for number in itertools.count(1):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        first = take_over(run_dir)
        save(first, 1)
        files.start_partial(first.folder, 2)
        before = history(run_dir)

        def die() -> None:
            raise Killed

        with before_disk_step(number, die):
            try:
                take_over(run_dir)
                break
            except Killed:
                pass
        assert history(run_dir) == before
        seen.add(first.lost_to() is None)
        third = take_over(run_dir)
        assert starts(run_dir) == [third.folder.name] and third.lost_to() is None and first.lost_to() is not None
        assert sorted(path.name for path in third.folder.iterdir()) == ["owner.json"]
        save(third, 2)
        assert newest_step(run_dir) == 2
    assert seen == {True, False} and number > 5


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A write beyond that fails, as on a full disk (EFBIG instead of ENOSPC)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(tmp_path: Path) -> None:
    """Who cannot take over has changed nothing, nor who cannot cut the logs: all of them, or none."""
    first = take_over(tmp_path)
    for name, length in (("metrics", 1), ("trained", 1000)):
        log = RunLog(tmp_path / f"{name}.jsonl")
        for step in (1, 2):
            log.append({"step": step, "text": "x" * length})
        log.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with largest_file(60):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            take_over(tmp_path)
        assert starts(tmp_path) == [".start-1"] and first.lost_to() is None
        with pytest.raises(OSError, match=r"trained\.jsonl"):
            truncate_logs(tmp_path, 1, first.folder)
    assert {path: path.read_bytes() for path in before} == before
    truncate_logs(tmp_path, 1, first.folder)
    assert [row["step"] for row in read_rows(tmp_path / "trained.jsonl")] == [1]


def test_what_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS its start might still commit it."""
    first = take_over(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(ownership, "ATTEMPT_SECONDS", 0.0)
        with pytest.raises(OSError, match="an earlier start still writes here, or it cannot be removed: try again"):
            take_over(tmp_path)
    assert first.lost_to() is not None
    assert take_over(tmp_path).generation == 3 and starts(tmp_path) == [".start-3"]

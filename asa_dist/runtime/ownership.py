"""One owner per run folder, whatever hosts it is used from: the newest start. Older ones can change nothing any more.

A job is requeued while its lost host, cut off for a minute, still trains: two starts of one run share a folder then,
and a host's locks do not help. So every start has a folder of its own, whose number is its generation:

    RUN/.start-3/owner.json        who, where, since when, and the fencing token: job and restart
                 step-00000300     a checkpoint being written, or one being removed
                 metrics.jsonl     a log being cut

Checkpoints and logs appear by a rename out of that folder, and go by one into it. To take over is to take this folder
away from every earlier start: from then on its renames fail, at whatever line it wakes up again. There is no moment
between a check and what it allows, and no clock.

Two starts at once: the higher generation stays. But of one job the later restart does, however late the earlier one
comes: a start's folder appears whole, token and all, and only then does the start look for others, so that of two one
at least sees the other's. No torch here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from asa_dist.runtime.checkpoint_files import sync_folder, write_atomically

OWNER = "owner.json"
FOLDER = re.compile(r"\.start-(\d+)")
DRAFT = ".starting-"  # a start's folder before it has a number
REMOVAL_ATTEMPTS, ATTEMPT_SECONDS = 20, 0.1


class TakenOver(Exception):
    """A later start owns the run folder, so this one ends; the message names it."""


@dataclass(frozen=True)
class JobStart:
    """Which start of which job of SLURM: the fencing token."""

    job: str  # empty: none
    restart: int  # SLURM counts them from 0

    @classmethod
    def here(cls) -> JobStart:
        """This process's."""
        return cls(os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    def is_before(self, other: JobStart) -> bool:
        """Whether SLURM has started the job anew since; starts of different jobs have no order."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart


@dataclass(frozen=True)
class Owner:
    """Who has started a run."""

    generation: int  # the first start's is 1
    by: str  # e.g. "process 4711 of job 123, restart 1"
    job: str  # with `restart`: the token
    restart: int
    host: str
    time: str  # of taking over, UTC, ISO 8601

    @property
    def start(self) -> JobStart:
        return JobStart(self.job, self.restart)

    def __str__(self) -> str:
        return f"{self.by}, on host {self.host}"


@dataclass(frozen=True)
class Ownership:
    """One start's right to change a run folder. Rank 0 takes it; all ranks write into ``folder``."""

    run_dir: Path
    generation: int

    @property
    def folder(self) -> Path:
        """Is there as long as no later start has taken over; nobody makes it again."""
        return self.run_dir / f".start-{self.generation}"

    def lost_to(self) -> str | None:
        """Who took over, as a message; None: nobody has."""
        try:
            os.utime(self.folder)  # over NFS this asks the server, where a look might be answered from memory
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return self.describe_loss()
        return None

    def require(self) -> None:
        """Raises :class:`TakenOver` if a later start has taken over."""
        if (successor := self.lost_to()) is not None:
            raise TakenOver(successor)

    def describe_loss(self) -> str:
        """Who took over, once it is known that somebody has."""
        owner = read_owner(self.run_dir) if self.run_dir.is_dir() else None
        if owner is None or owner.generation <= self.generation:
            return f"{self.folder} is gone: another start of this run has just begun, or it was deleted; this one ends"
        return f"another start of this run ({owner}) took over {self.run_dir} at {owner.time}; this one ends"


def take_over(run_dir: Path) -> Ownership:
    """Makes this start the owner. On return no earlier start can change checkpoints or logs: then they may be read.

    Killed anywhere in it: either the earlier start still owns the folder, or nobody does until the next one.

    Raises:
        TakenOver: another start, at the same time, was faster; or SLURM has started this job anew since.
        OSError: the run folder cannot be written to; nothing has changed. Or what an earlier start was writing cannot
            be removed; then that start has ended, too.
    """
    mine = _new_start(run_dir)
    try:
        refuse_late_start(run_dir)
    except (TakenOver, OSError):
        shutil.rmtree(mine.folder, ignore_errors=True)
        raise
    others = [Ownership(run_dir, number) for number in _generations(run_dir) if number != mine.generation]
    if higher := [other for other in others if other.generation > mine.generation]:
        owners = [_read(other) for other in higher]
        shutil.rmtree(mine.folder, ignore_errors=True)  # never later: a number must not be given twice
        if all(owner is not None and owner.start.is_before(JobStart.here()) for owner in owners):
            return take_over(run_dir)  # above these: whoever takes a number away has a higher one
        raise TakenOver(mine.describe_loss())
    for earlier in others:
        _take_away(earlier.folder, mine.folder)
    for draft in run_dir.glob(f"{DRAFT}*"):  # of a start that was killed; of another one: it makes it again
        _take_away(draft, mine.folder)
    mine.require()
    sync_folder(run_dir)
    return mine


def refuse_late_start(run_dir: Path) -> None:
    """Raises :class:`TakenOver` if a later start of this job has come already; OSError: that cannot be read."""
    for number in _generations(run_dir):
        owner = _read(Ownership(run_dir, number))
        if owner is not None and JobStart.here().is_before(owner.start):
            raise TakenOver(f"SLURM has started this job anew since: {owner} took over {run_dir} at {owner.time}; "
                            "this start came too late, and ends")  # fmt: skip


def read_owner(run_dir: Path) -> Owner | None:
    """The newest start; None: nobody has trained here, or it cannot be read."""
    for generation in sorted(_generations(run_dir), reverse=True):
        with suppress(OSError):
            if (owner := _read(Ownership(run_dir, generation))) is not None:
                return owner
    return None


def _read(start: Ownership) -> Owner | None:
    """None: it is being removed, damaged, or of another version. Raises OSError."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Owner(**json.loads((start.folder / OWNER).read_bytes()))
    return None


def _new_start(run_dir: Path) -> Ownership:
    """A number above all there are, in a folder that appears with its owner in it. Raises OSError."""
    while True:
        start = Ownership(run_dir, max(_generations(run_dir), default=0) + 1)
        draft = run_dir / f"{DRAFT}{uuid.uuid4().hex}"
        draft.mkdir()
        try:
            write_atomically(draft / OWNER, json.dumps(asdict(_this_process(start.generation)), indent=1) + "\n")
            draft.rename(start.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
        else:  # otherwise a start at the same time has this number, or took the draft away
            return start


def _generations(run_dir: Path) -> list[int]:
    return [int(match[1]) for path in run_dir.iterdir() if (match := FOLDER.fullmatch(path.name))]


def _this_process(generation: int) -> Owner:
    start = JobStart.here()
    by = f"process {os.getpid()}" + (f" of job {start.job}, restart {start.restart}" if start.job else "")
    return Owner(generation, by, start.job, start.restart, socket.gethostname(),
                 datetime.now(UTC).isoformat(timespec="seconds"))  # fmt: skip


def _take_away(folder: Path, mine: Path) -> None:
    grave = mine / folder.name
    with suppress(FileNotFoundError):  # a start at the same time was faster: with this folder, or with ours
        folder.rename(grave)  # no path of that start leads anywhere any more
    for _ in range(REMOVAL_ATTEMPTS):  # over NFS its host may still know the folder by its handle: until it is empty
        shutil.rmtree(grave, ignore_errors=True)
        if not grave.exists():
            return
        time.sleep(ATTEMPT_SECONDS)
    raise OSError(errno.ENOTEMPTY, "an earlier start still writes here, or it cannot be removed: try again", str(grave))

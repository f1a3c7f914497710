"""One process at a time works on a run folder: RUN/.lock, held as long as anything may be written there.

The kernel drops the lock (flock) when its last holder ends, however that ends; a file left behind means nothing.

A host that SLURM has lost may hold it on, from a file system that all hosts share. A later start of the same job takes
over then, with a lock file of its own in the place of that one, but only where nothing that both write counts: see
``fenced``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asa_dist.config import ConfigError
from asa_dist.runtime.ownership import JobStart

LOCK_FILE = ".lock"
NEXT_LOCK_FILE = ".lock.next"  # of who takes over
PATIENCE_SECONDS = 1.0  # `lock_holder` holds the lock for a moment, too
ENDING_PATIENCE_SECONDS = 30.0  # what a killed process has started ends by itself
LOST = "it is an earlier start of this job, on a host that SLURM has given up"
NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # e.g. Lustre mounted without -o flock


class RunInUseError(ConfigError):
    """Another process works on this run folder."""


@contextmanager
def hold_run_folder(run_dir: Path, *, fenced: bool = False) -> Iterator[tuple[int, ...]]:
    """Makes the folder if need be, and keeps other processes from working on it.

    Args:
        fenced: a start on a lost host can do no harm, because ``ownership`` fences all it writes that counts, as it
            does in training; then a later start of its job takes over. What a round of UDASA measures is not fenced:
            rows are appended for hours, and two starts would answer the same prompts. There the later one is refused.

    Yields:
        descriptors for `subprocess.Popen(pass_fds=…)`: a child that has them prolongs the lock until its own end.

    Raises:
        RunInUseError: another process holds it; the message names that.
        ConfigError: the folder cannot be made or written to.
    """
    is_new = not run_dir.exists()
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, fenced)
    except OSError as error:
        raise ConfigError(f"run folder {run_dir}: {error.strerror or error}") from None
    try:
        yield () if descriptor is None else (descriptor,)
    finally:
        if descriptor is not None:
            if _is_file(path, descriptor):  # else who took over has its own there
                path.unlink(missing_ok=True)  # while it is held: see _acquire
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # unless something was written there
                run_dir.rmdir()


def _acquire(path: Path, fenced: bool) -> int | None:
    """The descriptor that holds the lock; None: there are no locks here."""
    started = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):  # else its last holder has just removed it
                _sign(descriptor)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode()
            is_lost = _is_on_lost_host(holder)
            if is_lost and fenced and (own := _take_place(path, descriptor)) is not None:
                os.close(descriptor)
                print(f"asa: warning: {path.parent}: {_describe(holder)}; {LOST}: this start takes over",
                      file=sys.stderr, flush=True)  # fmt: skip
                return own
            if time.monotonic() - started > (ENDING_PATIENCE_SECONDS if _has_ended(holder) else PATIENCE_SECONDS):
                os.close(descriptor)
                way_on = _when_it_is_gone(path.parent) if is_lost and not fenced else ""
                raise RunInUseError(f"{path.parent} is in use: {_describe(holder)}{way_on}") from None
            time.sleep(0.05)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS_HERE:
                raise
            print(f"asa: warning: {path.parent}: this file system has no locks, so nothing keeps two processes from "
                  "working on the same run", file=sys.stderr, flush=True)
            return None
        os.close(descriptor)


def _take_place(path: Path, lost: int) -> int | None:
    """The lock on a new file in the place of ``lost``, which is then without a name. None: try again, all has changed.

    Who takes over holds the new file's lock before it gets its place, so of several on one host one does.
    """
    new = path.with_name(NEXT_LOCK_FILE)
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_file(new, descriptor) and _is_file(path, lost):
            _sign(descriptor)
            new.replace(path)
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _sign(descriptor: int) -> None:
    """Who holds it: process, host, and within a job which start of it."""
    start = JobStart.here()
    os.ftruncate(descriptor, 0)
    text = f"{os.getpid()} {socket.gethostname()}" + (f" {start.job} {start.restart}" if start.job else "")
    os.write(descriptor, f"{text}\n".encode())


def lock_holder(run_dir: Path) -> str | None:
    """Who works on the run folder, for people; None = nobody. Writes nothing."""
    path = run_dir / LOCK_FILE
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _describe(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return None


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        opened, found = os.fstat(descriptor), path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the latter: over NFS, of one that was replaced
            raise
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _is_on_lost_host(holder: str) -> bool:
    """Whether SLURM has started the holder's job anew since, as this process, elsewhere."""
    _, host, start = _parts(holder)
    return start.is_before(JobStart.here()) and host != socket.gethostname()


def _when_it_is_gone(run_dir: Path) -> str:
    return (f"; {LOST}, but what it still writes here would count: once it is gone, `asa submit` again with --run-dir "
            f"{shlex.quote(str(run_dir))}; a job that is requeued tries again by itself")  # fmt: skip


def _parts(holder: str) -> tuple[str, str, JobStart]:
    """(process id, host, job's start); each may be empty."""
    pid, host, job, restart = (*holder.split(), "", "", "", "")[:4]
    return pid, host, JobStart(job, int(restart or 0))


def _has_ended(holder: str) -> bool:
    """Whether the process that took the lock is known to be gone: then children of it hold the lock."""
    import psutil

    pid, host, _ = _parts(holder)
    if host != socket.gethostname():
        return False
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _describe(holder: str) -> str:
    """``holder``: content of the lock file."""
    pid, host, _ = _parts(holder)
    if not host:  # it has just been taken
        return "another process has just started to work on it"
    ended = " (it has ended; what it started has not yet)" if _has_ended(holder) else ""
    return f"process {pid} on host {host} works on it{ended}"

"""One process at a time works on a run folder: RUN/.lock, held as long as anything may be written there.

The kernel drops the lock (flock) when its last holder ends, however that ends; a file left behind means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asa_dist.config import ConfigError

LOCK_FILE = ".lock"
PATIENCE_SECONDS = 1.0  # `lock_holder` holds the lock for a moment, too
ENDING_PATIENCE_SECONDS = 30.0  # what a killed process has started ends by itself
NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # e.g. Lustre mounted without -o flock


class RunInUseError(ConfigError):
    """Another process works on this run folder."""


@contextmanager
def hold_run_folder(run_dir: Path) -> Iterator[tuple[int, ...]]:
    """Makes the folder if need be, and keeps other processes from working on it.

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
        descriptor = _acquire(path)
    except OSError as error:
        raise ConfigError(f"run folder {run_dir}: {error.strerror or error}") from None
    try:
        yield () if descriptor is None else (descriptor,)
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is held: see _acquire
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # unless something was written there
                run_dir.rmdir()


def _acquire(path: Path) -> int | None:
    """The descriptor that holds the lock; None: there are no locks here."""
    started = time.monotonic()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):  # else its last holder has just removed it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()} {_job()}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode()
            if _is_earlier_start(holder):
                os.close(descriptor)
                print(f"asa: warning: {path.parent}: {_describe(holder)}; it is an earlier start of this job, on a "
                      "host that SLURM has given up: this start takes over", file=sys.stderr, flush=True)
                return None
            if time.monotonic() - started > (ENDING_PATIENCE_SECONDS if _has_ended(holder) else PATIENCE_SECONDS):
                os.close(descriptor)
                raise RunInUseError(f"{path.parent} is in use: {_describe(holder)}") from None
            time.sleep(0.05)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS_HERE:
                raise
            print(f"asa: warning: {path.parent}: this file system has no locks, so nothing keeps two processes from "
                  "working on the same run", file=sys.stderr, flush=True)
            return None
        os.close(descriptor)


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
    opened = os.fstat(descriptor)
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _job() -> str:
    """The SLURM job that this process belongs to; empty: none."""
    return os.environ.get("SLURM_JOB_ID", "")


def _is_earlier_start(holder: str) -> bool:
    """Whether SLURM has started this job anew since, elsewhere: what is left of it cannot change anything that counts.

    runtime/ownership.py sees to that.
    """
    _, host, job = _parts(holder)
    is_restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return is_restarted and bool(job) and job == _job() and host != socket.gethostname()


def _parts(holder: str) -> tuple[str, str, str]:
    """(process id, host, job); each may be empty."""
    pid, host, job = (*holder.split(), "", "", "")[:3]
    return pid, host, job


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

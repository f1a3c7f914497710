"""Starting and ending what rollouts run on: a local Ray, and the connection to any Ray.

    asa train ── start_local_ray ──► ray_head (own session) ──► Ray's processes
        │ environment of the handle
        └──► trainer ranks: connect(address), then a RolloutClient each
                 └──► rank 0: RolloutSystem, the actors of the run
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

STOP_GRACE_SECONDS = 10.0
CONNECT_TIMEOUT_SECONDS = 10.0
# Ray replaces 127.0.0.1 by the host's outside address and listens on all interfaces, unless it believes that it is on
# a system without clusters; this is its only switch for that, the name notwithstanding.
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class ClusterError(Exception):
    """Ray cannot be started, reached or is too small; the message says what to do."""


class RayHandle:
    """A local Ray that this process started, and ends with :meth:`stop` (or as a context manager).

    Attributes:
        address: "127.0.0.1:port", for :func:`connect`.
        environment: what a process needs in its environment *before* it first imports ray, in order to connect.
            It holds the access token: pass it to child processes, do not write it anywhere.
    """

    def __init__(self, address: str, environment: dict[str, str], head: subprocess.Popen[bytes],
                 owned_folder: Path | None) -> None:
        self.address = address
        self.environment = environment
        self._head = head
        self._owned_folder = owned_folder

    def stop(self) -> None:
        """Ends every process of this Ray, and only those; returns when they are gone. May be called again."""
        _end_session(self._head)
        if self._owned_folder is not None:
            shutil.rmtree(self._owned_folder, ignore_errors=True)

    def __enter__(self) -> RayHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()


def start_local_ray(num_cpus: int, num_gpus: int, object_store_bytes: int, temp_dir: Path | None = None, *,
                    head_environment: Mapping[str, str] | None = None, timeout_seconds: float = 120.0) -> RayHandle:
    """Starts a Ray that only this machine's loopback reaches, in a session of its own, token required.

    Args:
        num_cpus, num_gpus: what Ray may hand out to actors.
        object_store_bytes: shared memory for weights and groups.
        temp_dir: Ray's logs and sockets, at most about 40 characters (a socket's path is limited); None: a folder
            that ``stop`` removes.
        head_environment: added to Ray's own environment, e.g. CUDA_VISIBLE_DEVICES without the trainers' GPUs.

    Raises:
        ClusterError: Ray did not start; with the end of its log.
    """
    folder = temp_dir or Path(tempfile.mkdtemp(prefix="asa-ray-"))
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        LOOPBACK_SWITCH: "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let the trainer starve the actors it waits for
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # an answer nobody waits for any more is no news
    }
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "object_store_bytes": object_store_bytes,
               "temp_dir": str(folder.resolve()), "remove_temp_dir": temp_dir is None}
    log = folder / "ray_head.log"
    with log.open("wb") as log_file:
        head = subprocess.Popen([sys.executable, "-m", "asa_dist.rollout.ray_head"], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=log_file, bufsize=0, start_new_session=True,
                                env={**os.environ, **(head_environment or {}), **environment})
    assert head.stdin is not None and head.stdout is not None
    handle = RayHandle("", environment, head, folder if temp_dir is None else None)
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended already: there will be no answer
            head.stdin.write(json.dumps(options).encode() + b"\n")
        ready, _, _ = select.select([head.stdout], [], [], timeout_seconds)
        answer = head.stdout.readline() if ready else b""
        if not answer:
            what = "ended" if ready else f"did not answer within {timeout_seconds:g} s"
            _end_session(head)  # now its log is complete
            raise ClusterError(f"Ray did not start: its head process {what}. The end of its log:\n"
                               + log.read_text(errors="replace")[-2000:])
    except BaseException:
        handle.stop()
        raise
    handle.address = json.loads(answer)["address"]
    return handle


def _end_session(head: subprocess.Popen[bytes]) -> None:
    """Asks the head to end Ray, then ends what is left of its session."""
    assert head.stdin is not None and head.stdout is not None
    head.stdin.close()
    try:
        head.wait(STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    head.stdout.close()
    end_session(head.pid)


def end_session(session: int) -> None:
    """Waits for all processes of a session to end, and after a grace ends them, by process id."""
    import psutil

    def survivors() -> list[int]:
        alive = (process for process in psutil.process_iter() if _session_of(process.pid) == session)
        return [process.pid for process in alive if not _is_zombie(process)]  # where PID 1 does not reap, they stay

    deadline = time.monotonic() + STOP_GRACE_SECONDS
    while left := survivors():
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _is_zombie(process: Any) -> bool:
    import psutil

    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def connect(address: str) -> None:
    """Joins this process to a running Ray; it must have been started with :attr:`RayHandle.environment`, or with the
    environment of the cluster. Leaves the process's SIGTERM handler as it was.

    Raises:
        ClusterError: nothing answers there, or it does not accept this process.
    """
    # Ray itself would retry for minutes in silence if one of these is amiss.
    host, _, port = address.rpartition(":")
    for variable in ("RAY_AUTH_MODE", LOOPBACK_SWITCH) if host.startswith("127.") else ("RAY_AUTH_MODE",):
        if variable not in os.environ:
            raise ClusterError(f"cannot connect to Ray at {address}: set {variable} in the environment as the cluster "
                               "has it (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or disabled, on every host)")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"cannot connect to Ray at {address!r} (host:port of its head): {error}") from None

    import ray

    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except Exception as error:
        raise ClusterError(f"cannot connect to Ray at {address}: {error}. Are RAY_AUTH_MODE and RAY_AUTH_TOKEN "
                           "of this process those of the cluster?") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, sigterm_handler)  # Ray takes it for itself


def disconnect() -> None:
    """Leaves Ray; actors and objects that this process created end. Harmless without a connection."""
    import ray

    ray.shutdown()


@contextlib.contextmanager
def connection(address: str, owned: RayHandle | None = None) -> Iterator[None]:
    """Connected as long as it lasts.

    Args:
        owned: the Ray at this address, if this process started it: it ends, too.

    Raises:
        ClusterError: as :func:`connect`.
    """
    try:
        connect(address)
        yield
    finally:
        disconnect()
        if owned is not None:
            owned.stop()

"""A Ray across hosts: `start` runs on every host as long as Ray does there, `wait` until all of them are there.

    python -m asa_dist.rollout.ray_hosts start --head node0:20001 --num-cpus 8     on every host, by srun or ssh
    python -m asa_dist.rollout.ray_hosts wait --head node0:20001 node0 node1       on one of them

The environment is that of the whole cluster: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or with RAY_AUTH_TOKEN_PATH where
`start --token-from-stdin` keeps it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from asa_dist.rollout.cluster import ClusterError, connect, disconnect, end_session

TEMP_FOLDER = "/tmp"  # not TMPDIR: the path of a socket is limited to 107 bytes, of which Ray needs 60
LOCK = "lock"
TOKENS = "asa-launch-*/token"  # of launch/deepspeed.sh, in TEMP_FOLDER
DEVICE_FOLDER = "/dev"
STOP_GRACE_SECONDS = 10.0
POLL_SECONDS = 0.5
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h, as of a run that is to be started again
ENVIRONMENT = {
    # a lost host is noticed after 8 to 12 s, Ray's own settings take a minute; 5 s without network are survived
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",  # Ray's 15 would let the trainer starve the actors it waits for
    "RAY_USAGE_STATS_ENABLED": "0",
}


class HostMissing(ClusterError):
    """A host did not come in time: the next start may find all of them there, or be on others."""


def address_of(host: str) -> str:
    """
    Raises:
        ClusterError: the name leads nowhere.
    """
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:  # the latter: not even the form of a name
        raise ClusterError(f"host {host}: its name leads nowhere from {socket.gethostname()} ({error}): is it spelt as "
                           "in /etc/hosts or DNS? An alias of ssh alone is not enough") from None


def own_address() -> str:
    """This host's address, as the other hosts know it.

    Raises:
        ClusterError: its name leads nowhere, or back to itself.
    """
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ClusterError(f"host {host}: its own name has no address ({error}): add it to /etc/hosts") from None
    if address.startswith("127."):
        raise ClusterError(f"host {host}: its own name means {address}, where no other host reaches it: remove that "
                           "line from its /etc/hosts, or give the address that the other hosts use")
    return address


def ray_gpus(num_gpus: int, gpus_per_host: int, placement: str) -> list[str]:
    """``num_gpus`` of the host's GPUs, for actors; ranks take the first ones.

    Args:
        placement: `rollout.placement`: separate = the last ones, shared = the first ones, too.

    Raises:
        ClusterError: what the launcher shows of this host's GPUs is not what the job was made for.
    """
    made_for = f"host {socket.gethostname()}: the job is made for {gpus_per_host} GPUs per node"
    advice = "ask for as many GPUs as there are"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:  # all of them
        found = len(list(Path(DEVICE_FOLDER).glob("nvidia[0-9]*")))
        if 0 < found < gpus_per_host:  # 0: they may be of another kind
            raise ClusterError(f"{made_for}, but this one has {found} ({DEVICE_FOLDER}/nvidia*): {advice}")
        gpus = [str(index) for index in range(gpus_per_host)]
    else:
        gpus = visible.split(",") if visible else []
        if len(gpus) != gpus_per_host:
            raise ClusterError(f"{made_for}, but here CUDA_VISIBLE_DEVICES = {visible or '(empty: none)'}: {advice}")
    return gpus[:num_gpus] if placement == "shared" else gpus[gpus_per_host - num_gpus :]


def start_command(options: argparse.Namespace, address: str, folder: str) -> list[str]:
    """`ray start` for this host: the head's, if it is the head."""
    head, _, port = options.head.rpartition(":")
    is_head = address_of(head) == address
    here = ["--head", f"--port={port}", "--include-dashboard=false"] if is_head else [f"--address={options.head}"]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *here, f"--node-ip-address={address}",
            f"--num-cpus={options.num_cpus}", f"--num-gpus={options.num_gpus}", f"--temp-dir={folder}",
            "--disable-usage-stats"]  # fmt: skip


def _wait_for_head(options: argparse.Namespace, is_asked_to_end: Callable[[], bool] = lambda: False) -> None:
    host, _, port = options.head.rpartition(":")
    address_of(host)  # else it would be looked up again and again
    deadline = time.monotonic() + options.timeout_seconds
    while not is_asked_to_end():
        try:
            return socket.create_connection((host, int(port)), timeout=5.0).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostMissing(
                    f"host {socket.gethostname()}: no answer from Ray's head {options.head} within "
                    f"{options.timeout_seconds:g} s: {error}. What does that host say? Is the port open to it?"
                ) from None
            time.sleep(POLL_SECONDS)


def start(options: argparse.Namespace) -> None:
    """Runs Ray on this host until asked to end (SIGTERM, SIGINT, SIGUSR1; the end of stdin, if that has the token).

    Its files are in a folder of its own, with mode 700, that goes with it.

    Raises:
        ClusterError: Ray did not start, or ended by itself; with the end of its log.
    """
    asked_to_end: list[int] = []  # noted, not raised: else a process that is just being started would be lost
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # srun passes on no other than the last
        signal.signal(number, lambda number, _: asked_to_end.append(number))

    def is_asked_to_end() -> bool:
        return bool(asked_to_end) or (options.token_from_stdin and _is_at_end_of_stdin())

    with token_of_stdin() if options.token_from_stdin else contextlib.nullcontext():
        _run_ray(options, is_asked_to_end)


@contextlib.contextmanager
def token_of_stdin() -> Iterator[None]:
    """Ray's token, the first line of stdin, is in the file RAY_AUTH_TOKEN_PATH meanwhile, for this user only.

    Raises:
        ClusterError: its folder belongs to somebody else, or others may look into it.
    """
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # not a byte more than the line
        token = stdin.readline()
    with contextlib.suppress(FileExistsError):  # hosts may share this folder
        path.parent.mkdir(mode=0o700)
    made = path.parent.lstat()
    if made.st_uid != os.geteuid() or made.st_mode != stat.S_IFDIR | 0o700:
        raise ClusterError(f"host {socket.gethostname()}: {path.parent} is there already, and not this user's alone")
    file = _held(path, token)
    try:
        yield
    finally:
        os.close(file)
        _remove_token(path)


def _held(path: Path, content: bytes = b"") -> int:
    """A new file for this user only, locked before anybody can see it; until the descriptor is closed."""
    file, part = tempfile.mkstemp(dir=path.parent)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, content)
    os.rename(part, path)
    return file


def _remove_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the launch script's own files are there, too
        path.parent.rmdir()


def _run_ray(options: argparse.Namespace, is_asked_to_end: Callable[[], bool]) -> None:
    address = own_address()
    environment = os.environ | ENVIRONMENT
    if options.gpus_per_host:
        gpus = ray_gpus(options.num_gpus, options.gpus_per_host, options.placement)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if address_of(options.head.rpartition(":")[0]) != address:
        _wait_for_head(options, is_asked_to_end)
    remove_leftovers()
    folder = tempfile.mkdtemp(prefix=f"{options.name}{_of_this_host()}", dir=TEMP_FOLDER)
    log = Path(folder, "start.log")
    ray: subprocess.Popen[bytes] | None = None
    try:
        _held(Path(folder, LOCK))  # until this process ends
        with log.open("wb") as output:
            ray = subprocess.Popen(start_command(options, address, folder), stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, env=environment, start_new_session=True)  # fmt: skip
        while ray.poll() is None and not is_asked_to_end():
            time.sleep(POLL_SECONDS)
        if is_asked_to_end():  # srun signals every process of a step: Ray may have ended already
            return
        raise ClusterError(f"host {socket.gethostname()}: Ray ended with {ray.returncode}. The end of its log:\n"
                           + log.read_text(errors="replace")[-2000:])  # fmt: skip
    finally:
        if ray is not None:
            _end(ray)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Folders and tokens of this user's earlier starts that had no time to end, as SLURM gives them none."""
    for lock in Path(TEMP_FOLDER).glob(f"asa-*{_of_this_host()}*/{LOCK}"):
        if _is_left(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)
    for token in Path(TEMP_FOLDER).glob(TOKENS):
        if _is_left(token):
            _remove_token(token)


def _is_left(path: Path) -> bool:
    """Whether a file, and its folder, are this user's, and no process holds it any more."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # not to be opened, or held
        # anybody may have put anything there: opening a pipe would wait for ever
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        stack.callback(os.close, file)
        folder, found = path.parent.lstat(), os.fstat(file)
        is_own = folder.st_uid == found.st_uid == os.geteuid()
        if is_own and stat.S_ISDIR(folder.st_mode) and stat.S_ISREG(found.st_mode):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _of_this_host() -> str:
    """Hosts may share even TEMP_FOLDER; short, for it is part of paths of sockets."""
    return f"-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"


def _is_at_end_of_stdin() -> bool:
    return bool(select.select([0], [], [], 0)[0]) and not os.read(0, 4096)


def _end(ray: subprocess.Popen[bytes]) -> None:
    """With all of its processes: the agents of a raylet that was killed take a while to notice."""
    ray.terminate()
    try:
        ray.wait(STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        ray.kill()
        ray.wait()
    end_session(ray.pid)


def wait(options: argparse.Namespace) -> None:
    """Until every host is in this Ray; prints what Ray may use on each.

    Raises:
        ClusterError: a name leads nowhere, the head does not answer, or a host is still missing at the deadline.
    """
    started = time.monotonic()
    address_by_host = {host: address_of(host) for host in options.hosts}
    _wait_for_head(options)
    connect(options.head)
    import ray  # not before it is there: Ray reads the environment when it is imported

    try:
        while True:
            nodes: dict[str, Any] = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
            missing = [host for host, address in address_by_host.items() if address not in nodes]
            if not missing:
                break
            if time.monotonic() - started > options.timeout_seconds:
                raise HostMissing(f"no Ray on {', '.join(missing)} after {options.timeout_seconds:g} s, but on "
                                  f"{len(address_by_host) - len(missing)} of the {len(address_by_host)} hosts that it "
                                  "is to be on: is that host up, and does its name lead to the others?")
            time.sleep(POLL_SECONDS)
    finally:
        disconnect()
    for host, address in address_by_host.items():
        resources = nodes[address]["Resources"]
        print(f"  Ray on {host} ({address}): {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m asa_dist.rollout.ray_hosts", description="A Ray across hosts.")
    commands = parser.add_subparsers(required=True)
    starting = commands.add_parser("start", help="run Ray on this host until asked to end")
    starting.add_argument("--num-cpus", type=int, default=0, help="that actors may use here")
    starting.add_argument("--num-gpus", type=int, default=0, help="that actors may use here")
    starting.add_argument("--placement", choices=("separate", "shared"), default="separate",
                          help="of these GPUs: the last ones, or the first ones, which ranks have, too")  # fmt: skip
    starting.add_argument("--gpus-per-host", type=int, default=0, help="those of trainer ranks, too")
    starting.add_argument("--name", default="asa-hosts", help="first part of the temporary folder's name")
    starting.add_argument("--token-from-stdin", action="store_true",
                          help="the first line is Ray's token, kept at RAY_AUTH_TOKEN_PATH; end when stdin does")
    starting.set_defaults(action=start)
    waiting = commands.add_parser("wait", help="until Ray is on all hosts")
    waiting.add_argument("hosts", nargs="+", metavar="HOST")
    waiting.set_defaults(action=wait)
    for command in (starting, waiting):
        command.add_argument("--head", required=True, metavar="HOST:PORT", help="where Ray's head is, or is to be")
        command.add_argument("--timeout-seconds", type=float, default=120.0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 ended as asked, or all hosts are there; with a message 75: one did not come in time, 1: else."""
    options = parse_arguments(arguments)
    try:
        options.action(options)
    except ClusterError as error:
        print(f"asa: {error}", file=sys.stderr, flush=True)
        return EXIT_TRY_AGAIN if isinstance(error, HostMissing) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

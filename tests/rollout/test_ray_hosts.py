"""A Ray across hosts, as far as one host can tell: what a host refuses, and what it says. tests/cluster has several."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from asa_dist.rollout import ray_hosts
from asa_dist.rollout.cluster import ClusterError
from asa_dist.rollout.ray_hosts import own_address, parse_arguments, ray_gpus, start_command

HOST = socket.gethostname()


@pytest.mark.parametrize(("addresses", "message"), [
    ({HOST: "127.0.1.1"}, f"host {HOST}: its own name means 127.0.1.1, where no other host reaches it"),
    ({}, f"host {HOST}: its own name has no address"),
])
def test_a_host_that_others_do_not_reach(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str], message: str
) -> None:
    def look_up(name: str) -> str:
        if name not in addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return addresses[name]

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    with pytest.raises(ClusterError, match=message):
        own_address()


@pytest.mark.parametrize("arguments", [
    ["start", "--head", "node7:1"], ["wait", "--head", "node0:1", "node7"], ["wait", "--head", "node7:1", "node0"]])
def test_a_name_that_leads_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def look_up(name: str) -> str:
        if name == "node7":
            raise socket.gaierror(-2, "Name or service not known")
        return "10.0.0.1"

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay as they are
    assert ray_hosts.main(arguments) == 1
    assert capsys.readouterr().err == (
        f"asa: host node7: its name leads nowhere from {HOST} ([Errno -2] Name or service not known): is it spelt as "
        "in /etc/hosts or DNS? An alias of ssh alone is not enough\n"
    )


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of /dev; nothing is said of GPUs in the environment."""
    monkeypatch.setattr(ray_hosts, "DEVICE_FOLDER", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize(("placement", "visible", "num_gpus", "expected"), [
    ("separate", None, 3, ["5", "6", "7"]), ("separate", None, 0, []), ("separate", "8,9,a,b,c,d,e,f", 2, ["e", "f"]),
    ("shared", None, 3, ["0", "1", "2"]), ("shared", None, 0, []), ("shared", "8,9,a,b,c,d,e,f", 2, ["8", "9"])])
@pytest.mark.parametrize("num_devices", [0, 8, 16])
def test_rollouts_have_the_last_gpus_or_share_the_first(
    monkeypatch: pytest.MonkeyPatch, devices: Path, placement: str, visible: str | None, num_gpus: int,
    expected: list[str], num_devices: int,
) -> None:  # fmt: skip
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(num_devices))):
        (devices / name).touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ray_gpus(num_gpus, 8, placement) == expected


@pytest.mark.parametrize(("visible", "shown"), [
    ("0,1", "but here CUDA_VISIBLE_DEVICES = 0,1: ask"), ("", r"but here CUDA_VISIBLE_DEVICES = \(empty: none\): ask"),
    (None, r"but this one has 2 \(/.*/nvidia\*\): ask")])
def test_other_gpus_than_the_job_is_made_for(
    monkeypatch: pytest.MonkeyPatch, devices: Path, visible: str | None, shown: str
) -> None:
    for number in range(2):
        (devices / f"nvidia{number}").touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ClusterError, match=f"the job is made for 8 GPUs per node, {shown}"):
        ray_gpus(4, 8, "separate")


def test_the_head_is_who_has_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", {"node0": "10.0.0.1", "node1": "10.0.0.2"}.__getitem__)
    options = parse_arguments(["start", "--head", "node0:20001", "--num-cpus", "3", "--timeout-seconds", "0.1"])
    command = start_command(options, "10.0.0.1", "/tmp/x")
    assert {"--head", "--port=20001", "--node-ip-address=10.0.0.1", "--num-cpus=3", "--temp-dir=/tmp/x"} <= {*command}
    command = start_command(options, "10.0.0.2", "/tmp/x")
    assert "--address=node0:20001" in command and "--head" not in command


def test_a_head_that_does_not_answer() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "asa_dist.rollout.ray_hosts", "wait", "--head", f"localhost:{port}",
             "--timeout-seconds", "0.1", "localhost"],
            text=True, capture_output=True, timeout=60, check=False)  # fmt: skip
    assert ended.returncode == 75
    assert f"no answer from Ray's head localhost:{port} within 0.1 s" in ended.stderr


@pytest.mark.parametrize("how", ["eof", "signal"])
def test_it_ends_with_its_starter_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    """`ray start` is replaced by a sleep: what is tested is its surroundings."""
    token = tmp_path / "private/token"
    script = tmp_path / "start.py"
    script.write_text(
        "import sys\nfrom asa_dist.rollout import ray_hosts\n"
        "ray_hosts.own_address = lambda: '10.0.0.1'\n"
        "def command(options, address, folder):\n    print(folder, flush=True)\n    return ['sleep', '100']\n"
        "ray_hosts.start_command = command\n"
        "ray_hosts.socket.gethostbyname = lambda name: '10.0.0.1'\n"
        "sys.exit(ray_hosts.main(['start', '--head', 'x:1', '--token-from-stdin', '--name', 'asa-test']))\n",
        encoding="utf-8")  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_TOKEN_PATH": str(token)})  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("secret\n")
    process.stdin.flush()
    folder = Path(process.stdout.readline().strip())
    assert folder.parent == Path(ray_hosts.TEMP_FOLDER) and folder.stat().st_mode & 0o777 == 0o700
    assert folder.name.startswith("asa-test-")
    assert token.read_text() == "secret\n" and token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    if how == "eof":
        process.stdin.close()
    else:
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert not folder.exists() and not token.parent.exists()
    process.stdin.close()
    process.stdout.close()


def test_a_token_is_not_put_where_others_may_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with (tmp_path / "stdin").open("wb+") as stdin:
        monkeypatch.setattr(ray_hosts, "open", lambda *_, **__: stdin, raising=False)
        told = pytest.raises(ClusterError, match="is there already, and not this user's alone")
        with told, ray_hosts.token_of_stdin():
            pass
    assert not (tmp_path / "token").exists()


def test_what_earlier_starts_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_hosts, "TEMP_FOLDER", str(tmp_path))
    here = ray_hosts._of_this_host()
    with monkeypatch.context() as other:
        other.setattr(socket, "gethostname", lambda: f"{HOST}.org")
        elsewhere = ray_hosts._of_this_host()
    tokens = ["asa-launch-left/token", "asa-launch-used/token"]
    locks = [f"asa-1-0{here}left/lock", f"asa-2-0{here}used/lock", f"asa-1-0{elsewhere}elsewhere/lock",
             f"mine{here}x/lock"]  # fmt: skip
    for name in (*tokens, *locks):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    launch_folder = tmp_path / "asa-launch-begun"  # of a launch script that has not said its token yet
    launch_folder.mkdir()
    with (tmp_path / tokens[1]).open() as token, (tmp_path / locks[1]).open() as lock:
        for file in (token, lock):
            fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as other:
            other.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
            ray_hosts.remove_leftovers()
        assert len(list(tmp_path.iterdir())) == len([*tokens, *locks, launch_folder])  # of another user: they stay
        ray_hosts.remove_leftovers()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()} == {
        tokens[1], *locks[1:]}  # fmt: skip
    assert launch_folder.exists() and len(list(tmp_path.iterdir())) == 5


def test_traps_among_what_earlier_starts_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    monkeypatch.setattr(ray_hosts, "TEMP_FOLDER", str(temp))
    pipe, link, linked = (temp / f"asa-{name}{ray_hosts._of_this_host()}x" for name in ("pipe", "link", "linked"))
    for folder in (temp, elsewhere, pipe, link):
        folder.mkdir()
    os.mkfifo(pipe / "lock")  # who opens it waits for ever for somebody who writes
    (elsewhere / "lock").touch()
    (link / "lock").symlink_to(elsewhere / "lock")
    linked.symlink_to(elsewhere)
    ray_hosts.remove_leftovers()
    assert {*temp.iterdir()} == {pipe, link, linked} and (elsewhere / "lock").exists()

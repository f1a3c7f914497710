"""Several hosts on one machine: namespaces of the kernel, joined by a bridge, with real ssh and SLURM daemons.

    with Cluster(["node0", "node1"], folder) as cluster:
        cluster.start_slurm()
        cluster.run("node0", "srun", "-N2", "hostname")

Each host has its own name, network, processes, /tmp, /dev/shm, /run and /etc/hosts. They share the rest of the disk,
and what this test, this repository and Python have in /tmp. Nothing can leave the machine: no host has a default route,
and the machine itself has none to them. Everything hangs from this process: when it dies, however, the kernel ends
every host, and with its last process a host's network and mounts are gone, too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
BOOT = Path(__file__).with_name("boot.sh")
CONTROLLER = "ctl"  # the host of SLURM's controller
NEEDED = ("ip", "unshare", "nsenter", "setpriv", "tini", "iptables", "ssh", "ssh-keygen", "sshd", "pdsh", "munged",
          "slurmctld", "slurmd", "sbatch", "srun")  # fmt: skip
PACKAGES = "iproute2 util-linux tini iptables openssh-client openssh-server pdsh munge slurmctld slurmd slurm-client"
DAEMONS = {"tini", "sshd", "munged", "slurmd", "slurmctld", "slurmstepd", "slurmscriptd"}
START_SECONDS, END_SECONDS, POLL_SECONDS = 30.0, 90.0, 0.1

SSH_CONFIG = """Host *
  IdentityFile {ssh}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """Port 22
HostKey {ssh}/host_key
AuthorizedKeysFile {ssh}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
UseDNS no
"""
# a host that is lost without a word is given up after about 30 s, and never trusted again; a requeued job waits for 5 s
# instead of two minutes, what is ended has 15 s instead of 30
SLURM_CONFIG = """ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation={slurm}/state
SlurmdSpoolDir={slurm}/spool-%n
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={slurm}/slurmctld.log
SlurmdLogFile={slurm}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=0
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=15
MinJobAge=3600
WaitTime=0
MessageTimeout=10
TCPTimeout=2
NodeName={nodes} CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=NO
"""


def why_not_here() -> str | None:
    """Why no hosts can be made on this machine; None: they can."""
    if os.geteuid() != 0:
        return "several hosts on one machine need root"
    if missing := [program for program in NEEDED if _find(program) is None]:
        return f"not installed: {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    made = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"],
                          capture_output=True, text=True)  # fmt: skip
    return f"no namespaces here: {made.stderr.strip()}" if made.returncode else None


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def wait_until(is_so: Callable[[], Any], what: str, timeout_seconds: float) -> Any:
    """The first answer that is true; fails with ``what`` at the deadline."""
    deadline = time.monotonic() + timeout_seconds
    while not (answer := is_so()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)
    return answer


class Cluster:
    """Hosts, from ``with`` to its end.

    Args:
        nodes: names of the hosts, in the order of their addresses; there is one more, CONTROLLER.
        folder: for what they mount, and for logs of the daemons.
        environment: of every command.
    """

    def __init__(self, nodes: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.nodes = list(nodes)
        self._etc, self._slurm = folder / "etc", folder / "slurm"
        shared = [path for path in (ROOT, Path(sys.prefix), folder) if path.is_relative_to("/tmp")]
        self._shared_of_tmp = sorted({str(Path(*path.parts[:3])) for path in shared})
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._environment = {**os.environ, **(environment or {}), "PATH": programs}
        self._address = {CONTROLLER: "10.77.0.10"} | {
            node: f"10.77.0.{100 + index}" for index, node in enumerate(nodes)
        }
        self._holders: dict[str, subprocess.Popen[bytes]] = {}  # by host: ends it when it ends
        self._init: dict[str, int] = {}  # by host: its first process, as seen from outside
        self._namespaces: set[str] = set()  # of all hosts there have been
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._write_etc()
            switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
                                      stdin=subprocess.DEVNULL)  # fmt: skip
            self._holders["switch"] = switch
            wait_until(lambda: _namespace(switch.pid, "net") != _namespace(os.getpid(), "net"), "switch", START_SECONDS)
            self._on_switch("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
            self._on_switch("ip", "link", "set", "br0", "up")
            for host in self._address:
                self._boot(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._stack.close()

    # --- commands --------------------------------------------------------------------------------------------------
    def start(self, host: str, *command: str, environment: Mapping[str, str] | None = None,
              **options: Any) -> subprocess.Popen[Any]:  # fmt: skip
        """Starts a command on a host. Options: as :class:`subprocess.Popen`; cwd holds there, too."""
        into = ["nsenter", "--target", str(self._init[host]), "--uts", "--ipc", "--mount", "--pid", "--net",
                f"--wdns={options.get('cwd') or os.getcwd()}"]  # fmt: skip
        return subprocess.Popen([*into, "--", *command], env=self._environment | dict(environment or {}),
                                **{"stdin": subprocess.DEVNULL, **options})  # fmt: skip

    def run(self, host: str, *command: str, timeout_seconds: float = 120.0, check: bool = True, **options: Any) -> str:
        """What a command on a host prints, stderr too. Raises :class:`AssertionError` with it if it fails."""
        with self.start(host, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                        **options) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                raise
        assert process.returncode == 0 or not check, f"{host}: {command} ended with {process.returncode}:\n{output}"
        return str(output).strip()

    def processes(self, host: str) -> list[psutil.Process]:
        """All that run on a host, but for its first ones and the daemons of ssh and SLURM."""
        found = []
        for process in self._members(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                is_idle = process.cmdline() == ["sleep", "infinity"]
                if not is_idle and process.name() not in DAEMONS and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until_idle(self) -> None:
        """Fails if anything still runs on a host after a while, or if it has left files in /tmp or /dev/shm."""
        def left() -> list[str]:
            running = [f"{host}: {' '.join(p.cmdline())}" for host in self._init for p in self.processes(host)]
            return running or [f"{host}: {path}" for host in self._init for path in self._files(host)]

        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left(), "nothing is left", END_SECONDS)
        assert not left(), f"left: {left()}"

    # --- faults ----------------------------------------------------------------------------------------------------
    def crash(self, host: str) -> None:
        """Power loss: nobody is told, no connection is closed. The host does not come back."""
        self.cut(host)
        self._end_host(host)

    def cut(self, host: str) -> None:
        """Nothing gets to the host or from it; it runs on."""
        self._on_switch("ip", "link", "set", f"v-{host}", "down")

    def heal(self, host: str) -> None:
        self._on_switch("ip", "link", "set", f"v-{host}", "up")

    @contextlib.contextmanager
    def mounted(self, host: str, source: Path, target: Path, *options: str) -> Iterator[None]:
        """On this host alone ``source`` is in the place of ``target``. Options: e.g. "-o", "ro"."""
        self.run(host, "mount", "--bind", *options, str(source), str(target))
        try:
            yield
        finally:
            self.run(host, "umount", "--lazy", str(target))

    @contextlib.contextmanager
    def port_blocked(self, host: str, port: int) -> Iterator[None]:
        """The host drops whatever others send to this port, as a firewall does."""
        rule = ["INPUT", "--protocol", "tcp", "--in-interface", "eth0", "--dport", str(port), "--jump", "DROP"]
        self.run(host, "iptables", "--append", *rule)
        try:
            yield
        finally:
            self.run(host, "iptables", "--delete", *rule)

    # --- daemons ---------------------------------------------------------------------------------------------------
    def start_ssh(self) -> None:
        for node in self.nodes:
            self.run(node, _find("sshd") or "sshd", "-f", str(self._etc / "sshd_config"))

    def start_slurm(self) -> None:
        """Its controller on CONTROLLER, its daemon on all nodes; returns when all are idle."""
        for host in self._address:
            (self._slurm / f"spool-{host}").mkdir(parents=True)
            self.run(host, "munged", f"--key-file={self._etc}/munge.key", "--log-file=/run/munge/munged.log",
                     "--seed-file=/run/munge/seed", "--pid-file=/run/munge/munged.pid")  # fmt: skip
        with (self._slurm / "start.log").open("wb") as log:
            for host in self._address:
                command = ["slurmctld"] if host == CONTROLLER else ["slurmd", "-N", host]
                assert self.start(host, *command, stdout=log, stderr=log).wait(START_SECONDS) == 0
        wait_until(lambda: self.run(CONTROLLER, "sinfo", "-h", "-N", "-o", "%N %T", check=False).count(" idle")
                   == len(self.nodes), f"SLURM's nodes are idle; see {self._slurm}", START_SECONDS)  # fmt: skip

    # --- the parts -------------------------------------------------------------------------------------------------
    def _write_etc(self) -> None:
        for folder in (self._etc / "ssh", self._etc / "slurm"):
            folder.mkdir(parents=True)
        ssh = self._etc / "ssh"
        names = "".join(f"{address} {host}\n" for host, address in self._address.items())
        (self._etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self._etc / "resolv.conf").touch()
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True)
        (ssh / "ssh_config").write_text(SSH_CONFIG.format(ssh=ssh))
        (self._etc / "sshd_config").write_text(SSHD_CONFIG.format(ssh=ssh))
        (self._etc / "slurm/slurm.conf").write_text(
            SLURM_CONFIG.format(controller=CONTROLLER, slurm=self._slurm, nodes=",".join(self.nodes)))  # fmt: skip
        (self._etc / "munge.key").write_bytes(secrets.token_bytes(128))
        (self._etc / "munge.key").chmod(0o600)

    def _boot(self, host: str) -> None:
        unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, "bash", str(BOOT), host, str(self._etc),
                   *self._shared_of_tmp]  # fmt: skip
        with (self._etc / f"console.{host}").open("wb") as console:
            holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=console, env=self._environment)
        self._holders[host] = holder
        wait_until(lambda: (self._etc / f"up.{host}").exists() or holder.poll() is not None, f"{host} is up",
                   START_SECONDS)  # fmt: skip
        assert holder.poll() is None, f"{host} did not come up: {(self._etc / f'console.{host}').read_text()}"
        init = psutil.Process(holder.pid).children()[0].pid
        self._init[host] = init
        self._namespaces |= _namespaces(init)
        self._on_switch("ip", "link", "add", f"v-{host}", "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self._on_switch("ip", "link", "set", f"v-{host}", "master", "br0", "up")
        self.run(host, "ip", "addr", "add", f"{self._address[host]}/24", "dev", "eth0")
        self.run(host, "ip", "link", "set", "eth0", "up")

    def _on_switch(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self._holders["switch"].pid), "--net", *command], check=True,
                       env=self._environment)  # fmt: skip

    def _end_host(self, host: str) -> None:
        """The kernel ends all of its processes with its first one."""
        if host in self._init:
            members = self._members(host)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init.pop(host), signal.SIGKILL)
            psutil.wait_procs(members, timeout=START_SECONDS)
        holder = self._holders.pop(host)
        holder.kill()
        holder.wait()

    def _members(self, host: str) -> list[psutil.Process]:
        """Whatever is in the host's namespace of processes, wherever it was started from."""
        here = _namespace(self._init[host], "pid")
        return [process for process in psutil.process_iter() if _namespace(process.pid, "pid") == here]

    def _files(self, host: str) -> list[str]:
        """What the host has of its own in /tmp and /dev/shm, folders too; not where it has something mounted."""
        mounts = [line.split()[1] for line in Path(f"/proc/{self._init[host]}/mounts").read_text().splitlines()]
        found = self.run(host, "find", "/tmp", "/dev/shm", "-mindepth", "1", "-mount",
                         "-not", "-name", "torchinductor_*").splitlines()  # fmt: skip  # torch makes it when imported
        return [path for path in found if not any(f"{mount}/".startswith(f"{path}/") for mount in mounts)]

    def _end(self) -> None:
        for host in list(self._holders):
            self._end_host(host)
        left = [process for process in psutil.process_iter() if _namespaces(process.pid) & self._namespaces]
        assert not left, f"still in a host's namespaces: {left}"


def _namespace(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:  # it has ended
        return ""


def _namespaces(pid: int) -> set[str]:
    """A namespace, and what is mounted in it, goes with its last process."""
    return {_namespace(pid, kind) for kind in ("net", "pid", "mnt", "uts")} - {""}

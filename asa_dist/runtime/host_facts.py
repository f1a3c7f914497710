"""What a host is like, as far as a run over several hosts depends on it; and what is wrong with it, beside the others.

No torch here: a task in Ray looks at hosts that only generate.
"""

from __future__ import annotations

import errno
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("asa-dist", "torch", "deepspeed", "transformers", "ray", "safetensors", "numpy")
LARGEST_CLOCK_DIFFERENCE_SECONDS = 5.0  # time stamps of events are compared, tokens expire
LARGEST_TEMP_USED = 0.95  # Ray's own bound, local_fs_capacity_threshold: above it, it moves no objects to disk
SHARED_MEMORY = "/dev/shm"
SHARING_SECONDS = 5.0  # a network file system may be slow to show a new file


@dataclass(frozen=True)
class HostFacts:
    """One host's; JSON has it as a mapping."""

    host: str
    address: str  # what its own name means there; empty: nothing
    versions: dict[str, str]  # python, and of PACKAGES; empty: not installed
    folder_problem: str  # why the run folder cannot be written to; empty: it can
    free_bytes: int  # of its disk; 0 if it cannot
    temp_used: float  # share of the disk of Ray's temporary folder that is in use, 0 to 1
    shared_memory_free_bytes: int
    problems: list[str]  # without which nothing is worth trying between hosts; each names it


def look(run_dir: Path, probe: str, temp_folder: str) -> HostFacts:
    """
    Args:
        probe: of the file that every host makes in the run folder: with its host's name added. The caller removes it.
        temp_folder: where Ray keeps its logs, and objects for which there is no room in memory.
    """
    host = socket.gethostname()
    problems: list[str] = []
    address = _address(host, problems)
    folder_problem, free_bytes = _write(run_dir, probe, host)
    temp = shutil.disk_usage(temp_folder)
    shared_memory = shutil.disk_usage(SHARED_MEMORY)
    temp_used = 1 - temp.free / temp.total
    return HostFacts(
        host, address, _versions(), folder_problem, free_bytes, temp_used, shared_memory.free, problems)  # fmt: skip


def _write(run_dir: Path, probe: str, host: str) -> tuple[str, int]:
    """(why it failed, bytes that are free)."""
    try:
        (run_dir / f"{probe}.{host}").write_text(host, encoding="utf-8")
        return "", shutil.disk_usage(run_dir).free
    except OSError as error:
        advice = "It has to be on a file system that all hosts share, for this user to write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Make room there, or choose another run folder"
        return f"{host}: the run folder {run_dir} cannot be written to: {error.strerror}. {advice}", 0


def _address(host: str, problems: list[str]) -> str:
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        problems.append(f"{host}: its own name has no address ({error}): add it to its /etc/hosts")
        return ""
    if address.startswith("127."):
        problems.append(
            f"{host}: its own name means {address}, where no other host reaches it: remove that line from its "
            "/etc/hosts, or give there the address that the other hosts use"
        )
    return address


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def odd_versions(facts: Iterable[HostFacts]) -> list[str]:
    """Hosts whose packages are not those of most hosts; of two equal parties, those of the first host count."""
    found = list({fact.host: fact for fact in facts}.values())
    problems = []
    for package in ("python", *PACKAGES):
        usual, _ = Counter(fact.versions[package] for fact in found).most_common(1)[0]
        for fact in found:
            if (here := fact.versions[package]) != usual:
                problems.append(
                    f"{fact.host}: {package} {here or 'is not installed'}, other hosts have {usual or 'none'}: install "
                    "the same everywhere (pip install -c constraints.txt)"
                )
    return problems


def too_full(facts: Iterable[HostFacts], needed_bytes: int) -> list[str]:
    """Hosts from where the run folder's disk has too little room for one more checkpoint; a problem of all of them."""
    found = {fact.host: fact for fact in facts if not fact.folder_problem and fact.free_bytes < needed_bytes}
    if not found:
        return []
    free_bytes = min(fact.free_bytes for fact in found.values())
    return [
        f"{', '.join(found)}: the disk of the run folder has {megabytes(free_bytes)} left, a checkpoint takes "
        f"{megabytes(needed_bytes)}: make room, or choose another run folder"
    ]


def too_full_for_ray(facts: Iterable[HostFacts], temp_folder: str) -> list[str]:
    """Hosts where Ray would refuse to move objects to disk when its memory is full."""
    return [
        f"{fact.host}: the disk of {temp_folder}, where Ray keeps its logs and what does not fit into memory, is "
        f"{100 * fact.temp_used:.1f} % full; above {100 * LARGEST_TEMP_USED:g} % Ray refuses to use it: make room there"
        for fact in facts
        if fact.temp_used > LARGEST_TEMP_USED
    ]


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def unseen(facts: Iterable[HostFacts], run_dir: Path, probe: str) -> list[str]:
    """Hosts whose probe file is not to be seen from here, even after SHARING_SECONDS: they write somewhere else."""
    own, writers = socket.gethostname(), [fact.host for fact in facts if not fact.folder_problem]
    if own not in writers:  # that is said already; where the others write is not known
        return []
    deadline = time.monotonic() + SHARING_SECONDS
    while missing := [host for host in writers if not (run_dir / f"{probe}.{host}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return [
        f"{host}: what it writes to {run_dir} is not to be seen on {own}: choose a run folder that all hosts share"
        for host in dict.fromkeys(missing)
    ]


def odd_clocks(unix_seconds: dict[str, float]) -> list[str]:
    """``unix_seconds``: what every host's clock shows at the same moment."""
    middle = sorted(unix_seconds.values())[len(unix_seconds) // 2]
    return [
        f"{host}: its clock is {seconds - middle:+.1f} s off the other hosts': synchronise it (chrony, ntpd)"
        for host, seconds in unix_seconds.items()
        if abs(seconds - middle) > LARGEST_CLOCK_DIFFERENCE_SECONDS
    ]


@dataclass
class Verdict:
    """On hosts, for people: a line for each thing that was looked at, and a list of what is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, is_fine: str, problems: Iterable[str]) -> None:
        found = list(dict.fromkeys(problem for problem in problems if problem))
        self.problems += found
        self.lines.append(f"  {what}: {is_fine if not found else 'NOT as it should be'}")

    def add_hosts(
        self, facts: Sequence[HostFacts], run_dir: Path, probe: str, temp_folder: str, needed_bytes: int
    ) -> None:
        """What is found on the hosts, beside each other. Args: as :func:`look`; ``needed_bytes``: by a checkpoint."""
        hosts = ", ".join(dict.fromkeys(fact.host for fact in facts))
        self.add("hosts", hosts, [problem for fact in facts for problem in fact.problems])
        versions = ", ".join(f"{name} {number}" for name, number in facts[0].versions.items() if number)
        self.add("versions", versions, odd_versions(facts))
        unwritable = [fact.folder_problem for fact in facts]
        self.add("run folder", f"{run_dir}, shared by all", [*unwritable, *unseen(facts, run_dir, probe)])
        free_bytes = min((fact.free_bytes for fact in facts if not fact.folder_problem), default=0)
        room = f"{megabytes(free_bytes)}, a checkpoint takes {megabytes(needed_bytes)}"
        self.add("room in it", room, too_full(facts, needed_bytes))
        used, shared = max(fact.temp_used for fact in facts), min(fact.shared_memory_free_bytes for fact in facts)
        room = f"{temp_folder} {100 * used:.0f} % full at most, {SHARED_MEMORY} {megabytes(shared)} free at least"
        self.add("room for Ray", room, too_full_for_ray(facts, temp_folder))

    def text(self, headline: str, seconds: float) -> str:
        if not self.problems:
            return "\n".join([headline, *self.lines, f"preflight: ready, after {seconds:.1f} s"])
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        listed = [f"  - {problem}" for problem in self.problems]
        return "\n".join([headline, *self.lines, f"preflight: NOT ready, {count}, after {seconds:.1f} s:", *listed])

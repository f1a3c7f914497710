"""What a host is like, as far as a run over several hosts depends on it; and what is wrong with it, beside the others.

No torch here: a task in Ray looks at hosts that only generate.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("asa-dist", "torch", "deepspeed", "transformers", "ray", "safetensors", "numpy")
LARGEST_CLOCK_DIFFERENCE_SECONDS = 5.0  # time stamps of events are compared, tokens expire


@dataclass(frozen=True)
class HostFacts:
    """One host's; JSON has it as a mapping."""

    host: str
    address: str  # what its own name means there; empty: nothing
    versions: dict[str, str]  # python, and of PACKAGES; empty: not installed
    free_bytes: int  # of the run folder's disk; -1: unknown
    problems: list[str]  # found on the host alone; each names it


def look(run_dir: Path, probe: str) -> HostFacts:
    """
    Args:
        probe: of the file that every host makes in the run folder: with its host's name added. The caller removes it.
    """
    host = socket.gethostname()
    problems: list[str] = []
    address = _address(host, problems)
    free_bytes = -1
    try:
        (run_dir / f"{probe}.{host}").write_text(host, encoding="utf-8")
        free_bytes = shutil.disk_usage(run_dir).free
    except OSError as error:
        problems.append(
            f"{host}: the run folder {run_dir} cannot be written to: {error.strerror}. It has to be on a file system "
            "that all hosts share, for this user to write to"
        )
    return HostFacts(host, address, _versions(), free_bytes, problems)


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
    """Hosts from where the run folder's disk has too little room."""
    return [
        f"{fact.host}: the disk of the run folder has {fact.free_bytes / 1e9:.1f} GB left, a checkpoint needs about "
        f"{needed_bytes / 1e9:.1f} GB: make room, or choose another run folder"
        for fact in facts
        if 0 <= fact.free_bytes < needed_bytes
    ]


def unseen(run_dir: Path, probe: str, hosts: Sequence[str]) -> list[str]:
    """Hosts whose probe file is not to be seen from here: they write somewhere else."""
    here = set(os.listdir(run_dir))
    return [
        f"{host}: what it writes to {run_dir} is not to be seen on {socket.gethostname()}: the folder is not shared"
        for host in hosts
        if f"{probe}.{host}" not in here
    ]


def odd_clocks(unix_seconds: dict[str, float]) -> list[str]:
    """``unix_seconds``: what every host's clock shows at the same moment."""
    middle = sorted(unix_seconds.values())[len(unix_seconds) // 2]
    return [
        f"{host}: its clock is {seconds - middle:+.1f} s off the other hosts': synchronise it (chrony, ntpd)"
        for host, seconds in unix_seconds.items()
        if abs(seconds - middle) > LARGEST_CLOCK_DIFFERENCE_SECONDS
    ]

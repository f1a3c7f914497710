"""Runs a command as its users do, and sees what it imports and starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "deepspeed", "ray", "datasets", "numpy"}
DEADLINE_SECONDS = 120.0  # for a hang; what is slow shows in what is imported
# Runs a module as `python -m` does, then reports what was imported and which processes were started.
OBSERVER = """
import json, runpy, sys
report, module, *sys.argv[1:] = sys.argv[1:]
started = []
sys.addaudithook(lambda event, details: started.append(str(details[1])) if event == "subprocess.Popen" else None)
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    with open(report, "w") as file:
        json.dump({"imported": sorted(sys.modules), "started": started}, file)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    imported: set[str]
    started: list[str]  # command lines

    @property
    def is_light(self) -> bool:
        return not HEAVY & self.imported

    @property
    def started_nothing(self) -> bool:
        return not any("deepspeed" in command or "asa_dist" in command for command in self.started)


def run(folder: Path, *arguments: str | Path, module: str = "asa_dist.cli") -> Outcome:
    """In an empty folder of its own, ``folder``/cwd."""
    working, report = folder / "cwd", folder / "report.json"
    working.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    ended = subprocess.run(
        [sys.executable, "-c", OBSERVER, report, module, *map(str, arguments)], cwd=working, env=environment, text=True,
        capture_output=True, timeout=DEADLINE_SECONDS, check=False)
    seen = json.loads(report.read_text())
    return Outcome(ended.returncode, ended.stdout, ended.stderr, set(seen["imported"]), seen["started"])

"""The README explains every metric that a run writes, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.asa.local_run import local_run
from tests.distributed import tiny
from tests.udasa.local_run import local_run as local_udasa_run

README = Path(__file__).parent.parent / "README.md"


def explained_keys() -> list[str]:
    """The first column of the table under "Metric keys"."""
    section = README.read_text(encoding="utf-8").partition("## Metric keys\n")[2].partition("\n## ")[0]
    table = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [key for cell in table for key in re.findall("`([^`]+)`", cell)]


def test_readme_explains_every_key_once_and_no_other(tmp_path: Path) -> None:
    run = local_run(tiny.config(stage=0, metrics={"samples_every_steps": 1}), tmp_path)
    run.loop.run(2)
    udasa_run = local_udasa_run(tmp_path / "udasa")
    udasa_run.loop.run()
    assert sorted(explained_keys()) == sorted(set().union(*run.recorder.rows, *udasa_run.recorder.rows))

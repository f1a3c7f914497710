"""Every shell command in the documents works: it runs in .ci/run, or here, or says why it does neither.

A fenced ``sh`` block may follow ``<!-- not-ci: reason -->``; then only its syntax is checked. Every line of any other
block is either, word for word, a line of .ci/run, or cheap (``asa … --help``, ``asa train … --dry-run``) and run here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
FENCE = re.compile(r"^( *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_CI = re.compile(r"<!-- not-ci: \S[^>]* -->\s*\Z")


@dataclass(frozen=True)
class ShellBlock:
    place: str  # file:line
    text: str
    marked_not_ci: bool

    @property
    def commands(self) -> list[str]:
        """One command each: continued lines joined; comments and empty lines left out."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line]


def shell_blocks(document: str) -> list[ShellBlock]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = []
    for fence in FENCE.finditer(text):
        place = f"{document}:{text.count(chr(10), 0, fence.start()) + 1}"
        assert fence["language"] not in ("bash", "shell", "console"), f"{place}: write ```sh, so that it is checked"
        if fence["language"] == "sh":
            marked = NOT_CI.search(text, 0, fence.start()) is not None
            blocks.append(ShellBlock(place, textwrap.dedent(fence["text"]), marked))
    assert blocks, f"{document} shows no command at all"
    return blocks


def is_cheap(command: str) -> bool:
    words = shlex.split(command)
    return words[0] == "asa" and ("--help" in words or (words[1:2] == ["train"] and "--dry-run" in words))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_valid_shell(document: str) -> None:
    for block in shell_blocks(document):
        checked = subprocess.run(
            ["bash", "-n"], input=block.text, text=True, capture_output=True, timeout=30, check=False
        )
        assert checked.returncode == 0, f"{block.place}: {checked.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_run_somewhere(document: str) -> None:
    run_by_ci = {line.strip() for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()}
    for block in shell_blocks(document):
        unknown = [line for line in block.commands if line not in run_by_ci and not is_cheap(line)]
        assert block.marked_not_ci or not unknown, (
            f"{block.place}: nothing runs {unknown}: add it to .ci/run, or put <!-- not-ci: reason --> above the block"
        )


def test_cheap_commands_work() -> None:
    blocks = [block for document in DOCUMENTS for block in shell_blocks(document) if not block.marked_not_ci]
    cheap = {command: block.place for block in blocks for command in block.commands if is_cheap(command)}
    assert cheap, "the documents show neither `asa --help` nor a --dry-run"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            shlex.split(command), cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240, check=False
        )

    with ThreadPoolExecutor(2) as pool:  # each is little else than imports, on one core
        for (command, place), ran in zip(cheap.items(), pool.map(run, cheap), strict=True):
            assert ran.returncode == 0, f"{place}: {command}\n{ran.stdout}{ran.stderr}"


def test_the_tests_it_names_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 20, "the table of faults is gone, or written otherwise"
    for file, function in named:
        path = ROOT / (file if "/" in file else f"tests/faults/{file}")
        assert f"def {function}(" in path.read_text(encoding="utf-8"), f"{path}: {function}"

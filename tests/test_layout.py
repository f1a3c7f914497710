"""The repository looks the way its documents say: top-level entries, file names, docstrings, file sizes."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    "setup.py", "asa_dist", "kernels", "configs", "tests", "README.md",
    "pyproject.toml", "constraints.txt", "Makefile", ".ci", ".gitignore", "LICENSE", "CONTRIBUTING.md",
}
MAY_BE_EMPTY = {"launch", "benchmarks"}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "manager.py"}
MAX_LINES = 450


@pytest.fixture(scope="module")
def tracked_files() -> list[PurePosixPath]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True, check=True, timeout=30)
    return [PurePosixPath(name) for name in listed.stdout.split("\0") if name]


def test_top_level_entries(tracked_files: list[PurePosixPath]) -> None:
    assert {path.parts[0] for path in tracked_files} - MAY_BE_EMPTY == TOP_LEVEL


def test_no_file_named_after_nothing(tracked_files: list[PurePosixPath]) -> None:
    assert [str(path) for path in tracked_files if path.name in FORBIDDEN_NAMES] == []


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "a package called kernels hides Hugging Face's of that name"


def test_every_package_says_what_it_is(tracked_files: list[PurePosixPath]) -> None:
    code = [path for path in tracked_files if path.suffix == ".py" and path.parts[0] in ("asa_dist", "kernels")]
    packages = {path.parent for path in code}
    assert {PurePosixPath("asa_dist"), PurePosixPath("kernels/asa_kernels")} <= packages
    for package in packages:
        source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(source)), f"{package}/__init__.py needs a docstring"


def test_files_stay_readable(tracked_files: list[PurePosixPath]) -> None:
    code = [path for path in tracked_files if path.suffix == ".py" and path.parts[0] == "asa_dist"]
    lines = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in code}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}, "split these by subject"

"""The repository looks the way its documents say: top-level entries, the README's tree, names, docstrings, sizes."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    "setup.py", "asa_dist", "kernels", "configs", "launch", "benchmarks", "tests", "README.md",
    "pyproject.toml", "constraints.txt", "Makefile", ".ci", ".gitignore", "LICENSE", "CONTRIBUTING.md",
}
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "manager.py"}
MAX_LINES = 450
LISTED_BY_MODULE = ("asa_dist", "kernels", "benchmarks")  # of other folders the README's tree names no files
TREE_LINE = re.compile(r"(?P<indent>(?:  )*)(?P<name>[\w.-]+(?:/[\w.-]+)*(?:/|\.py)) +(?P<purpose>\S.*)|(?P<top>\w+/)")


@pytest.fixture(scope="module")
def tracked_files() -> list[PurePosixPath]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True, check=True, timeout=30)
    return [PurePosixPath(name) for name in listed.stdout.split("\0") if name]


def test_top_level_entries(tracked_files: list[PurePosixPath]) -> None:
    assert {path.parts[0] for path in tracked_files} == TOP_LEVEL


def readme_tree() -> list[PurePosixPath]:
    """The paths of the tree under "Files", folders too; every line but a top-level folder's says what it is for."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Files\n")[2]
    parents: list[PurePosixPath] = [PurePosixPath()]  # by depth
    paths = []
    for line in section.partition("```text\n")[2].partition("\n```")[0].splitlines():
        match = TREE_LINE.fullmatch(line)
        assert match, f"not a line of the tree: {line!r}"
        depth = len(match["indent"] or "") // 2
        assert depth < len(parents), f"too far to the right: {line!r}"
        paths.append(parents[depth] / (match["name"] or match["top"]))
        parents[depth + 1 :] = [paths[-1]]
    return paths


def test_the_readme_names_every_module(tracked_files: list[PurePosixPath]) -> None:
    tree = readme_tree()
    assert [str(path) for path in tree if not (ROOT / path).exists()] == [], "not there"
    assert len(tree) == len(set(tree)), "named twice"
    modules = {path for path in tracked_files if path.suffix == ".py" and path.parts[0] in LISTED_BY_MODULE}
    named = {path for path in tree if path.suffix == ".py"}
    assert {str(path) for path in modules if path.name != "__init__.py"} == {str(path) for path in named}


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

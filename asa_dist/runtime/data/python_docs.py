"""The embedded corpus: English prose that ships with every Python, read as text and never imported."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from asa_dist.runtime.data.errors import DataError

# Folders that are no part of the library itself: tests, and what people installed.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
# A heading of the language reference: a line underlined by at least three of the same mark.
HEADING = re.compile(r'^(?=\S[^\n]*\n([*=\-~^"])\1{2,}$)', re.MULTILINE)
# A repeated paragraph shorter than this is a turn of phrase ("For example:"), not a copy.
COPY_CHARACTERS = 40
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_documents() -> Iterator[str]:
    """Sections of the language reference, then docstrings, one document per module, class or function at top level.

    Deterministic for a given Python version: files in path order, definitions in file order. Copies of an earlier
    paragraph are left out (topics quote each other at length): else the held-out split would be partly known.

    Raises:
        DataError: this Python has no standard library source, or a file of it does not parse.
    """
    seen: set[str] = set()
    for text in _all_documents(Path(sysconfig.get_path("stdlib"))):
        document = _without_copies(text, seen)
        if document:
            yield document


def _all_documents(root: Path) -> Iterator[str]:
    topics = root / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise DataError(f"data source python_docs: {topics} is missing: this Python came without its documentation; "
                        "use another Python, or a text, jsonl, parquet or dataset source")
    for text in _topics(topics):
        start = 0
        for heading in HEADING.finditer(text):
            yield text[start:heading.start()]
            start = heading.start()
        yield text[start:]
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings(path)


def _topics(path: Path) -> list[str]:
    """The values of the one dictionary ``topics = {…}`` in the file."""
    for statement in _parse(path).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return list(ast.literal_eval(statement.value).values())
    raise DataError(f"data source python_docs: {path}: no dictionary of topics in it; use another Python or source")


def _docstrings(path: Path) -> Iterator[str]:
    module = _parse(path)
    yield ast.get_docstring(module) or ""
    for definition in module.body:
        nodes = (node for node in ast.walk(definition) if isinstance(node, DOCUMENTED))
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in library files are not the reader's business
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"data source python_docs: {path} cannot be read: {error}") from None


def _without_copies(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        wording = " ".join(paragraph.split())
        if len(wording) < COPY_CHARACTERS or wording not in seen:
            kept.append(paragraph)
        seen.add(wording)
    return "\n\n".join(kept).strip()

from __future__ import annotations

import os
import platform
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from asa_dist.config import DataConfig
from asa_dist.runtime.data.prepare import prepare
from asa_dist.runtime.data.python_docs import python_documents
from tests.runtime.data.corpora import rollout_config

ELSEWHERE = """
import hashlib, sys
from asa_dist.runtime.data.python_docs import python_documents
before = set(sys.modules)
digest = hashlib.blake2b("".join(python_documents()).encode()).hexdigest()
print(digest, *sorted(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(python_documents())


def test_documents_are_prose_without_copies(texts: list[str]) -> None:
    assert all(text.strip() == text != "" for text in texts)
    paragraphs = [" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 40]
    assert len(long) == len(set(long))
    assert any('The "assert" statement' in text for text in texts)  # the language reference
    assert any("Remove any common leading whitespace from every line" in text for text in texts)  # textwrap.dedent


def test_another_process_reads_the_same_and_imports_nothing_of_it(texts: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", ELSEWHERE], text=True, capture_output=True, check=True, timeout=120,
                            env={**os.environ, "PYTHONHASHSEED": "7"})
    digest, *imported = result.stdout.split()
    assert digest == blake2b("".join(texts).encode()).hexdigest()
    assert not {"pydoc_data.topics", "tkinter", "this", "antigravity"} & set(imported)


def test_the_default_corpus_is_large_enough(tmp_path: Path, texts: list[str]) -> None:
    summary = prepare(DataConfig(), rollout_config(), 0, tmp_path / "run", print)
    assert summary.vocab_size == 2048
    assert summary.tokens > 500_000
    assert summary.documents == len(texts)
    assert summary.python_version == platform.python_version()

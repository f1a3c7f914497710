from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asa_dist.config import DataConfig
from asa_dist.runtime.data.prepare import prepare
from asa_dist.runtime.data.python_docs import python_documents
from tests.runtime.data.corpora import rollout_config


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(python_documents())


def test_documents_are_prose_without_copies(texts: list[str]) -> None:
    assert all(text.strip() == text != "" for text in texts)
    paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n")]
    long = [p for p in paragraphs if len(p) >= 40]
    assert len(long) == len(set(long))
    assert any("The \"assert\" statement" in text for text in texts)  # the language reference
    assert any("Dedent" in text or "dedent" in text for text in texts)  # docstrings


def test_nothing_is_imported(texts: list[str]) -> None:
    code = ("import sys; from asa_dist.runtime.data.python_docs import python_documents; before = set(sys.modules)\n"
            "assert sum(1 for _ in python_documents()) > 1000; print(sorted(set(sys.modules) - before))")
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, timeout=120)
    assert "pydoc_data" not in result.stdout
    assert "tkinter" not in result.stdout


def test_the_default_corpus_is_large_enough_and_deterministic(tmp_path: Path, texts: list[str]) -> None:
    runs = [prepare(DataConfig(), rollout_config(), 0, tmp_path / name, print) for name in ("a", "b")]
    assert runs[0] == runs[1]
    assert runs[0].vocab_size == 2048
    assert runs[0].tokens > 500_000
    assert runs[0].documents == len(texts)
    assert runs[0].python_version == ".".join(map(str, sys.version_info[:3]))
    for name in ("tokenizer/tokenizer.json", "data/source_0/tokens.bin", "data/source_0/heldout.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

"""Real runs for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.real_run import Start, runs_of_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-points", type=int, default=2, metavar="N",
                     help="how often test_exact_resume.py kills a process; 9 for each kind once")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with runs_of_tiny(tmp_path_factory) as start:
        yield start

"""One real run on two ranks, that learns, for all tests of what is made of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_run import ASA, Run, runs_of_tiny

LEARNING = ["optimizer.lr_psi=0.01", "optimizer.lr_phi=0.02", "optimizer.lr_xi=0.01"]
# the next step, and its samples, are those of the checkpoint before the last
LENGTH = ["train.steps=4", "checkpoint.every_steps=3", "train.eval_every_steps=3"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Checkpoints of steps 3 and 4, evaluated at both."""
    with runs_of_tiny(tmp_path_factory) as start:
        run = start(ASA, *LEARNING, *LENGTH)
        assert run.wait() == 0, run.errors
        yield run


@pytest.fixture(scope="session")
def run_dir(trained: Run) -> Path:
    return trained.run_dir

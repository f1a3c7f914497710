"""Ray itself stands still: its store answers nobody, and what is on its way through it never returns."""

from __future__ import annotations

import pytest

from asa_dist.runtime.checkpoint_files import list_checkpoints
from tests.real_run import ASA, Start

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

DEADLINES = ["rollout.timeout_seconds=15", "train.collective_timeout_seconds=20", "checkpoint.timeout_seconds=30"]


def test_a_ray_that_stands_still_ends_the_run_with_its_last_step_saved(
        start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_max_direct_call_object_size", "1000")  # bytes: prompts and groups go through the store
    run = start(ASA, "train.steps=1000000", "train.eval_every_steps=1000000", "rollout.prompts_per_step=16", *DEADLINES)
    run.wait_until(lambda: len(run.steps) >= 3)
    run.the("raylet").suspend()
    assert run.wait() == 1, run.errors  # nothing of it is left, the stopped process included
    assert "Traceback" not in run.errors and "waited 15 s for " in run.errors, run.errors
    assert list_checkpoints(run.run_dir)[0].step == len(run.steps)
    assert f"asa resume {run.run_dir}" in run.errors

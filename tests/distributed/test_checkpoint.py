"""Real checkpoints of real engines: nothing of the training state is lost, whatever ranks and ZeRO stages read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import checkpoint_cases as cases
from tests.distributed.checkpoint_cases import CASES, FLOAT32, SAVED_AFTER, Seen
from tests.distributed.ranks import run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank saw; every entry is a set of fresh processes, and each reads what those before it wrote."""
    root = str(tmp_path_factory.mktemp("runs"))
    return {
        "straight at 2": run_on_ranks(cases.straight, 2, root),
        "straight at 1": run_on_ranks(cases.one_rank, 1, root),
        "resumed at 2": run_on_ranks(cases.two_ranks_again, 2, root),
        "resumed at 1": run_on_ranks(cases.another_model, 1, root),
    }


def seen_by(runs: dict[str, list[Any]], which: str, case: cases.Case) -> list[Seen]:
    """In rank order."""
    return [(of_rank if which == "straight at 2" else of_rank[0])[case] for of_rank in runs[which]]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resuming_is_bit_for_bit(runs: dict[str, list[Any]], case: cases.Case, num_ranks: int) -> None:
    straight = seen_by(runs, f"straight at {num_ranks}", case)
    for rank, (whole, rest) in enumerate(zip(straight, seen_by(runs, f"resumed at {num_ranks}", case), strict=True)):
        assert rest.losses == whole.losses[SAVED_AFTER:], f"rank {rank}"
        assert all(map(np.array_equal, rest.served, whole.served)), f"rank {rank} served other weights after the load"
        differing = [name for name in whole.state if not np.array_equal(rest.state[name], whole.state[name])]
        assert rest.state.keys() == whole.state.keys() and differing == [], f"rank {rank}"
        assert rest.adam_steps == whole.adam_steps and len(whole.adam_steps) == 1


def test_the_runs_do_learn_something(runs: dict[str, list[Any]]) -> None:
    """Else equal losses would mean little."""
    losses = seen_by(runs, "straight at 2", FLOAT32)[0].losses
    assert losses[-1] < losses[SAVED_AFTER] - 0.01 < losses[0] - 0.02


@pytest.mark.parametrize("stage", ["3", "1"])
def test_another_number_of_ranks_in_between(runs: dict[str, list[Any]], stage: str) -> None:
    wanted = seen_by(runs, "straight at 2", (int(stage), "float32", 0))[0].losses[SAVED_AFTER:]
    found = runs["straight at 1"][0][1][stage] + runs["resumed at 2"][0][1][stage]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("chain", ["3-2-3", "3-0-1"])
def test_another_zero_stage_in_between(runs: dict[str, list[Any]], chain: str) -> None:
    wanted = seen_by(runs, "straight at 2", FLOAT32)[0].losses[SAVED_AFTER:]
    np.testing.assert_allclose(runs["resumed at 2"][0][1][chain], wanted, rtol=1e-5)


def test_a_checkpoint_of_another_model_is_refused_by_name(runs: dict[str, list[Any]]) -> None:
    shape, absent = runs["resumed at 1"][0][1]
    assert "lm.model.layers.0.mlp.gate_proj.weight is (48, 32) there and (64, 32) here" in shape, shape
    assert "lm.lm_head.weight is absent there" in absent, absent


def test_no_pickle_and_one_shard_per_rank(runs: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = next(tmp_path_factory.getbasetemp().glob("runs*")) / "2-3-float32-0" / "checkpoints"
    found = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    assert found == [
        "latest", "step-00000002/loop.safetensors", "step-00000002/manifest.json",
        "step-00000002/rollouts.safetensors", "step-00000002/shards/rank-00000.safetensors",
        "step-00000002/shards/rank-00001.safetensors",
    ]

"""Real checkpoints of real engines: nothing of the training state is lost, whatever ranks and ZeRO stages read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from asa_dist.runtime.checkpoint_files import read_manifest
from asa_dist.runtime.parameter_state import KINDS
from tests.distributed import checkpoint_cases as cases
from tests.distributed.checkpoint_cases import CASES, FLOAT32, SAVED_AFTER, Seen
from tests.distributed.ranks import run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, list[Any]]:
    """What each rank saw; every entry is a set of fresh processes, and each reads what those before it wrote."""
    return {
        "straight at 2": run_on_ranks(cases.straight, 2, str(root)),
        "straight at 1": run_on_ranks(cases.one_rank, 1, str(root)),
        "resumed at 2": run_on_ranks(cases.two_ranks_again, 2, str(root)),
        "resumed at 1": run_on_ranks(cases.another_model, 1, str(root)),
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


def test_no_pickle_and_one_shard_per_rank(runs: dict[str, list[Any]], root: Path) -> None:
    folder = cases.folder_of(str(root), 2, FLOAT32) / "checkpoints"
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == [
        "latest", "step-00000002/loop.safetensors", "step-00000002/manifest.json",
        "step-00000002/rollouts.safetensors", "step-00000002/shards/rank-00000.safetensors",
        "step-00000002/shards/rank-00001.safetensors",
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_hold_every_element_once_and_no_padding(
    runs: dict[str, list[Any]], root: Path, case: cases.Case
) -> None:
    folder = cases.folder_of(str(root), 2, case) / "checkpoints" / "step-00000002"
    found: dict[str, list[tuple[int, int]]] = {}  # KIND/NAME → (start, length) of its pieces
    for path in (folder / "shards").iterdir():
        with safe_open(path, framework="np") as file:
            starts = json.loads(file.metadata()["pieces"])
            for name in file.keys():  # noqa: SIM118  # not a mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == np.float32
                found.setdefault(name, []).append((starts[name.partition("/")[2]][0], len(tensor)))
    shapes = read_manifest(folder).parameters
    assert found.keys() == {f"{kind}/{name}" for kind in KINDS for name in shapes}
    for name, pieces in found.items():
        end = 0
        for start, length in sorted(pieces):
            assert start == end, name
            end += length
        assert end == math.prod(shapes[name.partition("/")[2]]), name
    assert any(math.prod(shape) % 2 for shape in shapes.values()), "nothing here needs padding"

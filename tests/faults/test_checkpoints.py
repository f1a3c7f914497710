"""Checkpoints that are damaged, cannot be written, or whose writer is killed: real files, real processes."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from asa_dist.runtime.checkpoint_files import PARTIAL, list_checkpoints, read_latest, verify
from tests.distributed import checkpoint_cases as cases
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

NUM_RANKS = 2
DEADLINE_SECONDS = 120.0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(cases.damaged_ones, NUM_RANKS, str(tmp_path_factory.mktemp("damaged")))


@pytest.mark.parametrize(("damage", "reason"), [
    ("truncated", "shards/rank-00001.safetensors: 5,000 bytes instead of"),
    ("flipped", "shards/rank-00000.safetensors: its checksum does not match: bytes were changed"),
    ("missing", "loop.safetensors: missing"),
    ("no manifest", "manifest.json: missing"),
    ("half a manifest", "manifest.json: not a checkpoint's manifest, or cut off"),
    ("removed", "the folder is missing"),
])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    outcomes: list[dict[str, Any]], damage: str, reason: str
) -> None:
    (told, *_), (told_rank_1, *_) = (of_rank[damage] for of_rank in outcomes)
    assert len(told) == 1 and told[0].startswith(f"step-00000002: {reason}") and told_rank_1 == []
    for rank, of_rank in enumerate(outcomes):
        _, step, is_that_step = of_rank[damage]
        assert step == 1 and is_that_step, f"rank {rank}"


def test_all_damaged_is_an_error_that_lists_them(tmp_path: Path) -> None:
    messages = run_on_ranks(cases.all_damaged, NUM_RANKS, str(tmp_path))
    assert messages[0] == messages[1]
    first, newer, older = messages[0].splitlines()
    assert first == f"no checkpoint in {tmp_path / 'checkpoints'} can be used:"
    assert newer == "  step-00000002: manifest.json: missing"
    assert older.startswith("  step-00000001: shards/rank-00001.safetensors: 5,000 bytes instead of")


def test_a_full_disk_leaves_the_previous_one_and_the_training_as_they_were(tmp_path: Path) -> None:
    undisturbed = run_on_ranks(cases.straight_losses, NUM_RANKS)[0]
    for seen in run_on_ranks(cases.full_disk, NUM_RANKS, str(tmp_path)):
        for rank in (0, 1):
            assert seen[f"rank {rank}"].startswith(f"rank {rank}: [Errno 27] File too large: "), seen
            assert f"rank-0000{rank}.safetensors" in seen[f"rank {rank}"]
        assert seen["logs"] == "rank 0: the run's own log files cannot be written"
        assert seen["left"] == ["latest", "step-00000001"] and seen["unharmed"]
        assert seen["later"] == (True, "step-00000002", True)
        assert seen["losses"] == undisturbed[1:]
    assert [verify(entry.path) for entry in list_checkpoints(tmp_path)] == [[], []]


def test_kill_9_while_saving_leaves_the_previous_one(tmp_path: Path) -> None:
    roots = [tmp_path / f"rank-{rank}-killed" for rank in range(NUM_RANKS)]
    for rank, root in enumerate(roots):
        root.mkdir()
        kill_while_saving(root, rank)
        assert list((root / "checkpoints").glob(f"{PARTIAL}*")), "killed between two saves"
        newest = list_checkpoints(root)[0]
        assert verify(newest.path) == [] and (root / "checkpoints" / str(read_latest(root))).is_dir()
    newest_steps = [list_checkpoints(root)[0].step for root in roots]
    per_rank = run_on_ranks(cases.after_the_kill, NUM_RANKS, [str(root) for root in roots])
    for of_rank in per_rank:
        assert of_rank == [(step, {float(step)}) for step in newest_steps], "a mixture, or not the newest"
    assert not [path for root in roots for path in (root / "checkpoints").glob(f"{PARTIAL}*")]


def kill_while_saving(root: Path, rank: int) -> None:
    """SIGKILL for one of the ranks that save for ever, at a moment when a partial folder stands there."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    with ThreadPoolExecutor() as pool:
        ranks = pool.submit(run_on_ranks, cases.save_for_ever, NUM_RANKS, str(root))
        while len(list_checkpoints(root)) < 2 or not list((root / "checkpoints").glob(f"{PARTIAL}step-*/shards/*")):
            assert time.monotonic() < deadline and not ranks.done(), "they do not save"
            time.sleep(0.001)
        os.kill(int((root / f"pid-{rank}").read_text()), signal.SIGKILL)
        with pytest.raises(AssertionError, match=r"died|gloo|Connection"):
            ranks.result()

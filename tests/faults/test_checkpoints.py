"""Checkpoints that are damaged, cannot be written, or whose writer is killed: real files, real processes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from asa_dist.runtime.checkpoint_files import list_checkpoints, list_set_aside, read_latest, verify
from tests.distributed import checkpoint_cases as cases
from tests.distributed.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

NUM_RANKS = 2
DEADLINE_SECONDS = 120.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> list[dict[str, Any]]:
    """Of each rank."""
    return run_on_ranks(cases.file_faults, NUM_RANKS, str(root))


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
    (told, *_), (told_rank_1, *_) = (of_rank["damaged"][damage] for of_rank in outcomes)
    assert list(told) == ["step-00000002"] and told["step-00000002"].startswith(reason) and told_rank_1 == {}
    for rank, of_rank in enumerate(outcomes):
        _, step, is_that_step = of_rank["damaged"][damage]
        assert step == 1 and is_that_step, f"rank {rank}"


@pytest.mark.parametrize("damage", cases.DAMAGES)
def test_what_was_passed_over_never_comes_back(outcomes: list[dict[str, Any]], root: Path, damage: str) -> None:
    """The logs go on from the older one: loading the newer one later, readable again, would leave a gap in them."""
    run_dir = root / "damaged" / damage
    assert [entry.name for entry in list_checkpoints(run_dir)] == ["step-00000001"]
    assert read_latest(run_dir) == "step-00000001"
    assert list_set_aside(run_dir) == ([] if damage == "removed" else ["damaged-step-00000002"])


def test_all_damaged_stay_where_they_are(outcomes: list[dict[str, Any]], root: Path) -> None:
    """Perhaps only the disk cannot be read at present."""
    assert [entry.step for entry in list_checkpoints(root / "all damaged")] == [2, 1]
    assert list_set_aside(root / "all damaged") == []


def test_what_cannot_be_tidied_up_is_a_warning(outcomes: list[dict[str, Any]]) -> None:
    for of_rank in outcomes:
        result, loaded_step = of_rank["untidy"]
        assert result.ok and result.name == "step-00000002" and loaded_step == 2
        assert "Not a directory" in result.reason and "Is a directory" in result.reason


def test_all_damaged_is_an_error_that_lists_them(outcomes: list[dict[str, Any]], root: Path) -> None:
    message, on_rank_1 = (of_rank["all damaged"] for of_rank in outcomes)
    assert message == on_rank_1
    first, newer, older = message.splitlines()
    assert first == f"no checkpoint in {root / 'all damaged' / 'checkpoints'} can be used:"
    assert newer == "  step-00000002: manifest.json: missing"
    assert older.startswith("  step-00000001: shards/rank-00001.safetensors: 5,000 bytes instead of")


def test_a_full_disk_leaves_the_previous_one_and_the_training_as_they_were(
    outcomes: list[dict[str, Any]], root: Path
) -> None:
    for of_rank in outcomes:
        seen = of_rank["full disk"]
        for rank in (0, 1):
            assert seen[f"rank {rank}"].startswith(f"rank {rank}: [Errno 27] File too large: "), seen
            assert f"rank-0000{rank}.safetensors" in seen[f"rank {rank}"]
        assert seen["logs"] == "rank 0: the run's own log files cannot be written"
        assert seen["left"] == [["latest", "step-00000001"], ["owner.json"]] and seen["unharmed"]
        assert seen["later"] == (True, "step-00000002", True)
        assert seen["losses"] == of_rank["undisturbed"][1:]
    assert [verify(entry.path) for entry in list_checkpoints(root / "full")] == [[], []]


def test_a_start_that_has_been_replaced_changes_nothing_and_says_so(
    outcomes: list[dict[str, Any]], root: Path
) -> None:
    """As after a partition: the job was requeued elsewhere, and the old ranks go on where they stood."""
    for of_rank in outcomes:
        seen = of_rank["taken over"]
        for said in seen["said"]:
            assert re.fullmatch(rf"another start of this run \(process \d+.*, on host .+\) took over {root}/taken over "
                                r"at 20[\d:T+-]+; this one ends", said), seen
        assert len(seen["said"]) == 3
        assert seen["steps"] == [2, 1] and seen["loaded"] == 3
    assert list_set_aside(root / "taken over") == []


def test_kill_9_while_saving_leaves_the_previous_one(tmp_path: Path) -> None:
    roots = [tmp_path / f"rank-{rank}-killed" for rank in range(NUM_RANKS)]
    for rank, root in enumerate(roots):
        root.mkdir()
        kill_while_saving(root, rank)
        newest = list_checkpoints(root)[0]
        assert verify(newest.path) == [] and (root / "checkpoints" / str(read_latest(root))).is_dir()
    newest_steps = [list_checkpoints(root)[0].step for root in roots]
    per_rank = run_on_ranks(cases.after_the_kill, NUM_RANKS, [str(root) for root in roots])
    for of_rank in per_rank:
        assert of_rank == [(step, {float(step)}) for step in newest_steps], "a mixture, or not the newest"
    assert not [path for root in roots for path in root.glob(".start-*/step-*")]


def kill_while_saving(root: Path, rank: int) -> None:
    """SIGKILL for one of the ranks that save for ever; it is stopped first, to be sure that it is in the middle."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    with ThreadPoolExecutor() as pool:
        ranks = pool.submit(run_on_ranks, cases.save_for_ever, NUM_RANKS, str(root))
        while len(list_checkpoints(root)) < 2:
            assert time.monotonic() < deadline and not ranks.done(), "they do not save"
            time.sleep(0.01)
        process = psutil.Process(int((root / f"pid-{rank}").read_text()))
        while not is_writing(root) or not stopped(process) or not is_writing(root):
            process.resume()
            assert time.monotonic() < deadline and not ranks.done(), "never seen in the middle of a save"
            time.sleep(0.001)
        process.kill()
        with pytest.raises(AssertionError, match=r"died|gloo|Connection"):
            ranks.result()


def is_writing(root: Path) -> bool:
    return any(root.glob(".start-*/step-*/shards/*"))


def stopped(process: psutil.Process) -> bool:
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)
    return True

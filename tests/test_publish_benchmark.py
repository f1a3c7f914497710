"""benchmarks/publish.py without its minutes: what it makes of measurements, and one way after another on two ranks."""

from __future__ import annotations

import copy
import mmap
from pathlib import Path
from typing import Any

import pytest
from publish import TRIED, measure, names_of, parse_arguments, ratios_of_case
from publish_case import CASES, MEMCPY, OURS, PER_PARAMETER, SLOW_LINK, SMOKE_CASES, THREE_AT_ONCE, WAYS

SHARD_BYTES = 1000
OF_OURS = (OURS, THREE_AT_ONCE)
MEASURED: dict[str, Any] = {
    "turns": {way: [{"stall_seconds": 1.0, "served_seconds": 2.0, "cpu_seconds": 1.0}] * 3 for way in WAYS},
    "memory": {way: {"own_bytes": 0, "shared_bytes": SHARD_BYTES, "all_bytes": SHARD_BYTES} for way in WAYS},
    "shard_bytes": SHARD_BYTES, "standing_bytes": 2 * SHARD_BYTES, "tensors": 7,
}  # fmt: skip


def stalls(**seconds: float) -> dict[str, Any]:
    measured = copy.deepcopy(MEASURED)
    names = {"ours": OURS, "memcpy": MEMCPY, "per_parameter": PER_PARAMETER}
    for key, value in seconds.items():
        measured["turns"][names[key]] = [{"stall_seconds": value, "served_seconds": value, "cpu_seconds": value}] * 3
    return measured


@pytest.mark.parametrize(("ours", "is_met"), [(1.5, True), (1.51, False)])
def test_a_stall_is_held_against_a_copy_of_as_many_bytes(ours: float, is_met: bool) -> None:
    ratio = ratios_of_case("c", stalls(ours=ours, per_parameter=10.0))[0]
    assert (ratio.name, ratio.value, ratio.is_met) == ("stall, of memcpy: c", ours, is_met)
    assert ratio.why == ("" if is_met else (
        f"ms: ours 1510.00, memcpy 1000.00, per-parameter gather + broadcast 10000.00; 7 tensors. {TRIED}"))


@pytest.mark.parametrize(("theirs", "is_met"), [(5.0, True), (4.9, False)])
def test_gathering_is_to_take_five_times_as_long(theirs: float, is_met: bool) -> None:
    assert ratios_of_case("c", stalls(per_parameter=theirs))[1].is_met is is_met


@pytest.mark.parametrize(("extra_bytes", "is_met"), [(SHARD_BYTES, True), (1.1 * SHARD_BYTES, False)])
def test_memory_beyond_a_shard_is_a_broken_promise(extra_bytes: float, is_met: bool) -> None:
    measured = copy.deepcopy(MEASURED)
    measured["memory"][OURS]["all_bytes"] = extra_bytes
    *_, extra, with_buffers = ratios_of_case("c", measured)
    assert extra.is_met is is_met
    assert extra.why == ("" if is_met else "0 pages more than the shard's 0")
    assert with_buffers.value == pytest.approx(extra.value + 2) and with_buffers.target is None


def test_three_in_a_row_are_held_against_three_copies() -> None:
    ratio = ratios_of_case("c", MEASURED)[3]
    assert (ratio.value, ratio.baseline) == (pytest.approx(1 / 3, abs=1e-3), "3 × memcpy")


def test_cases_of_the_sizes() -> None:
    assert names_of(parse_arguments([])) == [*CASES, SLOW_LINK]
    assert [CASES[name].num_ranks for name in names_of(parse_arguments(["--short"]))[:-1]] == [1, 2, 1, 2]
    assert names_of(parse_arguments(["--smoke"])) == list(SMOKE_CASES)


@pytest.mark.distributed
@pytest.mark.slow
def test_every_way_publishes_on_real_ranks(tmp_path: Path) -> None:
    measured = measure("smoke", turns=1)
    assert all(len(turns) == 1 for turns in measured["turns"].values())
    for way, (turn,) in measured["turns"].items():
        assert min(turn["stall_seconds"], turn["served_seconds"]) > 0, way
        assert way not in OF_OURS or turn["stall_seconds"] <= turn["served_seconds"], way
    whole_pages = measured["shard_bytes"] - 2 * mmap.PAGESIZE  # the first and the last may hold something else, too
    assert measured["memory"][OURS]["shared_bytes"] >= whole_pages  # it does go through Ray's store
    assert measured["standing_bytes"] >= 2 * measured["shard_bytes"] - 4 * mmap.PAGESIZE, "both buffers"
    assert {ratio.name for ratio in ratios_of_case("smoke", measured)} > {"stall, of memcpy: smoke"}

"""The preflight's verdict: two ranks of one host for real, and what hosts differ in, by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asa_dist.launcher import free_port
from asa_dist.preflight import BYTES_PER_PARAMETER, host_by_launcher
from asa_dist.runtime.host_facts import (
    PACKAGES,
    HostFacts,
    look,
    odd_clocks,
    odd_versions,
    too_full,
    too_full_for_ray,
    unseen,
)
from asa_dist.runtime.rendezvous import open_store

DEADLINE_SECONDS = 250  # for a hang, not for a slow machine
VERSIONS = dict.fromkeys(("python", *PACKAGES), "1.0")
FACTS = [HostFacts(f"node{n}", f"10.0.0.{n}", VERSIONS, "", 10**12, 0.5, 10**10, []) for n in range(3)]


# --- between hosts ------------------------------------------------------------------------------------------------
def test_another_version_is_named_with_its_host() -> None:
    assert odd_versions(FACTS) == []
    odd = replace(FACTS[1], versions=VERSIONS | {"torch": "0.9", "ray": ""})
    assert [problem.partition(": install")[0] for problem in odd_versions([FACTS[0], odd, odd, odd, FACTS[2]])] == [
        "node1: torch 0.9, other hosts have 1.0", "node1: ray is not installed, other hosts have 1.0"]  # fmt: skip


def test_a_full_disk_is_named() -> None:
    full = [replace(FACTS[0], free_bytes=1), replace(FACTS[1], free_bytes=999_999_999)]
    unwritable = replace(FACTS[2], folder_problem="it cannot be written to", free_bytes=0)
    assert too_full([FACTS[0], unwritable], 10**9) == []
    assert too_full([full[1], FACTS[0], unwritable], 10**9) == [
        "node1: the disk of the run folder has 1,000.0 MB left, a checkpoint takes 1,000.0 MB: make room, or choose "
        "another run folder"]  # fmt: skip
    [problem] = too_full(full, 10**9)  # one disk: said once
    assert problem.startswith("node0, node1: the disk of the run folder has 0.0 MB left")


def test_a_disk_that_ray_would_not_use() -> None:
    assert too_full_for_ray([replace(FACTS[0], temp_used=0.95)], "/tmp") == []
    [problem] = too_full_for_ray([FACTS[0], replace(FACTS[1], temp_used=0.951)], "/tmp")
    assert problem.startswith("node1: the disk of /tmp, where Ray keeps its logs") and "95.1 % full" in problem


def test_bytes_of_a_checkpoint() -> None:
    from asa_dist.runtime.parameter_state import KINDS

    assert len(KINDS) * torch.float32.itemsize == BYTES_PER_PARAMETER


def test_a_clock_that_is_off() -> None:
    assert odd_clocks({"node0": 100.0, "node1": 104.9}) == []
    [problem] = odd_clocks({"node0": 100.0, "node1": 40.0, "node2": 100.1})
    assert problem.startswith("node1: its clock is -60.0 s off")


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    facts = look(tmp_path, ".probe", "/tmp")
    assert unseen([facts], tmp_path, ".probe") == [] == unseen([FACTS[0]], tmp_path, ".probe")
    [problem] = unseen([facts, replace(facts, host="node7")], tmp_path, ".probe")
    assert problem.startswith("node7: what it writes to ")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    facts = look(tmp_path / "missing", ".probe", "/tmp")
    assert facts.free_bytes == 0 and "cannot be written to: No such file or directory" in facts.folder_problem
    assert unseen([facts], tmp_path / "missing", ".probe") == []


# --- ranks --------------------------------------------------------------------------------------------------------
def start(rank: int, port: int, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ASA_TRAINER_HOSTS": "node0,node1", "LOCAL_WORLD_SIZE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "asa_dist.preflight", "tests/tiny.yaml", "data.sources.0.path=README.md", *options]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)  # fmt: skip


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, out, err


def test_two_ranks_get_the_same_verdict(tmp_path: Path) -> None:
    port = free_port()
    processes = [start(rank, port, "--run-dir", str(tmp_path)) for rank in range(2)]
    (code, out, _), (other_code, other_out, _) = map(outcome, processes)
    assert "  versions: python " in out and ", a checkpoint takes 0.3 MB\n" in out
    loopback_only = "its own name means 127." in out  # this machine's own name may be known to itself alone
    assert code == other_code == (1 if loopback_only else 0)
    assert ("  all-reduce: gloo, 2 ranks" in out and "  clocks: within" in out) is not loopback_only
    assert ("NOT ready, 1 problem," if loopback_only else "preflight: ready, after") in out and other_out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    code, _, err = outcome(start(0, free_port(), "--run-dir", str(tmp_path), "--start-timeout-seconds", "10"))
    assert code == 75 and "rank 1 (node1) did not come to 127.0.0.1:" in err and "within 10 s, unlike rank 0 (" in err


@pytest.mark.parametrize(("variables", "expected"), [
    ({"ASA_TRAINER_HOSTS": "node0 node1", "LOCAL_WORLD_SIZE": "2"}, ["node0", "node0", "node1", "node1"]),  # srun
    ({"ASA_TRAINER_HOSTS": "node0,node1", "LOCAL_SIZE": "2"}, ["node0", "node0", "node1", "node1"]),  # deepspeed
    ({"ASA_TRAINER_HOSTS": "node0,node1", "LOCAL_SIZE": "1"}, [""] * 4),  # one of them has three: which?
    ({}, [""] * 4),
])
def test_the_host_of_a_rank_that_does_not_come(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[str]
) -> None:
    for name in ("ASA_TRAINER_HOSTS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [host_by_launcher(rank, 4) for rank in range(4)] == expected


def test_a_rank_that_comes_and_is_silent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    process = start(0, port, "--run-dir", str(tmp_path), "--timeout-seconds", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = open_store("preflight", 1, 2, DEADLINE_SECONDS)
    for key in ("gone/1", "host/1"):  # it is not waited for at the end
        store.set(key, "node9")
    code, _, err = outcome(process)
    assert code == 75
    assert "rank 1 (node9) came, but did not get through with a look at its host within 3 s, unlike rank 0 (" in err
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_does_not_answer_is_named(tmp_path: Path) -> None:
    code, _, err = outcome(start(1, free_port(), "--run-dir", str(tmp_path), "--start-timeout-seconds", "3"))
    assert code == 75 and "does not reach rank 0 at 127.0.0.1:" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to" in look(tmp_path, ".probe", "/tmp").folder_problem


def test_a_config_that_cannot_be_used_is_said_once(tmp_path: Path) -> None:
    port = free_port()
    processes = [start(rank, port, "train.steps=0", "--run-dir", str(tmp_path)) for rank in range(2)]
    (code, _, err), (other_code, _, other_err) = map(outcome, processes)
    assert code == other_code == 2 and other_err == "" and "tests/tiny.yaml: train.steps = 0 (override)" in err

"""Real runs of tests/tiny.yaml through the whole system: ranks, Ray, rollouts, weights, files, and every way to end.

All learning rates are 0, so that runs can be compared with each other step by step.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from asa_dist.config import load_config
from asa_dist.launcher import free_port
from asa_dist.runtime.checkpoint_files import list_checkpoints, read_latest, read_manifest, verify
from tests.real_run import ASA, TINY, Run, Start, runs_of_tiny

pytestmark = [pytest.mark.distributed, pytest.mark.ray, pytest.mark.slow]

EVAL_KEYS = {"eval/perplexity", "eval/bigram_perplexity"}
STEP_KEYS = {"step"} | {f"{group}/{name}" for group, names in {
    "tokens": "corpus rollout",
    "train": "skipped_steps",
    "loss": "total mle self_align meta heads",
    "reward": "self intrinsic logic fact behav used",
    "trust": "tau rho valid_groups",
    "omega": "logic fact behav",
    "lr": "psi phi xi",
    "grad_norm": "psi phi xi",
    "rollout": "policy_age_max policy_age_mean mismatch_kl max_abs_dlogp entropy length_mean distinct_fraction "
               "truncated_fraction empty_fraction importance_mean clipped_fraction",
    "time": "step_seconds data_seconds wait_rollout_seconds publish_seconds collective_seconds compute_seconds",
    "perf": "tokens_per_second",
    "memory": "peak_bytes",
}.items() for name in names.split()}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with runs_of_tiny(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def finished(start: Start) -> Run:
    """`asa train` on two ranks, to the end."""
    run = start(ASA)
    assert run.wait() == 0, run.errors
    return run


# --- a run that ends well -----------------------------------------------------------------------------------------
def test_metrics(finished: Run) -> None:
    assert [step["step"] for step in finished.steps] == [1, 2, 3]
    for row in finished.rows("metrics"):
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values()), row
    for step in finished.steps:
        assert STEP_KEYS - step.keys() == set()
    evaluated = [row["step"] for row in finished.rows("metrics") if row.keys() >= EVAL_KEYS]
    assert evaluated == [0, 2, 3], "before step 1, every two steps, at the end"
    assert [row["step"] for row in finished.rows("metrics") if "time/checkpoint_seconds" in row] == [3]


def test_nothing_moves_at_learning_rate_0(finished: Run) -> None:
    """What the worker samples is what the trainer computes."""
    for step in finished.steps:
        assert step["rollout/max_abs_dlogp"] < 1e-4
        assert abs(step["rollout/mismatch_kl"]) < 1e-6
        assert step["rollout/policy_age_max"] == step["rollout/policy_age_mean"] == 0
        assert step["rollout/length_mean"] > 0
        assert step["lr/psi"] == step["lr/phi"] == step["lr/xi"] == 0
        assert min(step["grad_norm/psi"], step["grad_norm/phi"], step["grad_norm/xi"]) > 0
    perplexities = [row["eval/perplexity"] for row in finished.rows("metrics") if "eval/perplexity" in row]
    assert perplexities == pytest.approx([perplexities[0]] * 3, rel=1e-6)


def test_self_alignment_takes_part(finished: Run) -> None:
    assert [step["trust/beta"] > 0 for step in finished.steps] == [False, True, True]


def test_run_folder(finished: Run) -> None:
    # the tokenised corpus; the trunk's configuration, for workers; who trained
    kept_by_the_run = {"data", "model", ".start-1"}
    names = {"config.yaml", "metrics.jsonl", "samples.jsonl", "trained.jsonl", "events.jsonl", "checkpoints",
             "tokenizer", "report.html"}
    assert {path.name for path in finished.run_dir.iterdir()} == names | kept_by_the_run
    resolved = load_config(finished.run_dir / "config.yaml")
    assert resolved == load_config(TINY, [f"data.sources.0.path={resolved.data.sources[0].path}"])


def test_checkpoint(finished: Run) -> None:
    checkpoint, = list_checkpoints(finished.run_dir)
    assert checkpoint.name == read_latest(finished.run_dir) and checkpoint.step == 3
    assert verify(checkpoint.path) == []
    assert read_manifest(checkpoint.path).num_ranks == 2
    assert not list(finished.run_dir.rglob("*.pt")), "nothing is pickled"


def test_samples_and_trained_prompts(finished: Run) -> None:
    trained = finished.rows("trained")
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert [row["prompt_ids"] for row in trained] == [[0, 1], [2, 3], [4, 5]], "each prompt once, in order"
    for row in finished.rows("samples"):
        assert row["prompt"] and len(row["responses"]) == 3
        for response in row["responses"]:
            assert response["version"] == row["step"] - 1
            assert {"text", "self", "intrinsic", "logic", "fact", "behav", "used"} <= response.keys()


def test_only_lines_of_our_own_are_shown(finished: Run) -> None:
    """No warning of torch, deepspeed or Ray, which would bury them."""
    assert all(line.startswith(("ψ", "step ")) for line in finished.errors.splitlines()), finished.errors
    assert finished.output.splitlines()[-1] == f"finished: {finished.run_dir}"
    assert len(finished.output.splitlines()) < 10, finished.output


# --- the other launchers ------------------------------------------------------------------------------------------
LAUNCHERS = {
    "torchrun, 2 ranks": ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                          "--master-port", "{port}", "-m", "asa_dist.train"],
    "deepspeed, 1 rank": ["deepspeed.launcher.runner", "--num_accelerators", "1", "--hostfile", os.devnull,
                          "--master_addr", "127.0.0.1", "--master_port", "{port}", "--module", "asa_dist.train"],
}


def texts_of_first_groups(run: Run) -> dict[int, list[str]]:
    """By step. Rank 0 writes samples of its own groups, of which the first is the same for any number of ranks."""
    return {row["step"]: [response["text"] for response in row["responses"]] for row in reversed(run.rows("samples"))}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_other_launchers_do_the_same(start: Start, finished: Run, launcher: list[str]) -> None:
    """One rank = two ranks, through the whole system: same rows, prompts, samples, losses."""
    run = start([word.format(port=free_port()) for word in launcher])
    assert run.wait() == 0, run.errors
    assert run.rows("trained") == finished.rows("trained")
    compared = [key for key in finished.steps[0] if key.split("/")[0] not in ("time", "perf", "memory")]
    for step, expected in zip(run.steps, finished.steps, strict=True):
        assert {key: step[key] for key in compared} == pytest.approx(
            {key: expected[key] for key in compared}, rel=1e-5, abs=1e-5)
    assert texts_of_first_groups(run) == texts_of_first_groups(finished)


def test_wrong_content_is_said_once_and_ends_all_ranks(start: Start) -> None:
    torchrun = [word.format(port=free_port()) for word in LAUNCHERS["torchrun, 2 ranks"]]
    run = start(torchrun, "data.heldout_fraction=1.0e-9")
    assert run.wait() > 0
    said = [line for line in run.errors.splitlines() if line.startswith("asa: ")]
    assert len(said) == 1 and "the held-out split is empty" in said[0]
    assert not run.run_dir.exists()


# --- runs that end otherwise --------------------------------------------------------------------------------------
ENDLESS = ["train.steps=1000000", "train.eval_every_steps=1000000"]


@pytest.fixture
def training(start: Start) -> Run:
    """`asa train` in its first steps, with no end in sight."""
    run = start(ASA, *ENDLESS)
    run.wait_until(lambda: len(run.steps) >= 2)
    return run


def files_with(text: bytes, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint(training: Run, number: signal.Signals) -> None:
    tokens = {(process.info["environ"] or {}).get("RAY_AUTH_TOKEN") for process in training.processes()} - {None}
    assert training.process is not None
    training.process.send_signal(number)
    assert training.wait() == 0, training.errors
    assert len(tokens) == 1, "the run's processes share one secret"
    assert files_with(tokens.pop().encode(), training.folder) == [], "the secret was written down"
    last = training.steps[-1]["step"]
    assert list_checkpoints(training.run_dir)[0].step == last
    assert f"stopped after step {last}; last checkpoint: " in training.output
    assert f"go on with: asa resume {training.run_dir}" in training.output
    assert "Traceback" not in training.errors and "finished" not in training.output


def test_a_signal_while_ray_starts(start: Start) -> None:
    run = start(ASA, *ENDLESS)
    run.wait_until(lambda: "starting Ray" in run.output and len(run.processes()) > 1)
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert "Traceback" not in run.errors

"""`asa train` on one machine: checks, data, an own Ray, then the deepspeed launcher in a session of its own.

    asa train ──┬── Ray's head process (own session; loopback, token)
                └── deepspeed launcher (own session) ── rank 0 … rank N − 1
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asa_dist.config import Config, ConfigError

STOP_GRACE_SECONDS = 40.0  # the deepspeed launcher itself waits 30 s before it kills its ranks


def process_layout(config: Config) -> str:
    """Who runs where, for people."""
    train, rollout = config.train, config.rollout
    ranks = (f"{train.gpus} trainer ranks on GPUs 0–{train.gpus - 1}" if train.gpus
             else f"{train.ranks} trainer ranks on the CPU, {train.threads_per_rank} thread(s) each")
    gpus = rollout.workers * rollout.gpus_per_worker
    workers = (f"{rollout.workers} rollout workers on GPUs {train.gpus}–{train.gpus + gpus - 1}" if gpus
               else f"{rollout.workers} rollout workers on the CPU, {rollout.threads_per_worker} thread(s) each")
    per_rank = f"{train.corpus_rows_per_step // config.num_ranks} corpus rows, {rollout.prompts_per_step // config.num_ranks} groups"
    return (f"  {ranks}: ZeRO-{train.zero_stage}, {train.accumulation_steps} micro-batch(es) per step; per rank and step {per_rank}\n"
            f"  {workers}: engine {rollout.engine}, {config.groups_per_lease} groups of {rollout.responses_per_prompt} per call\n"
            f"  1 coordinator; policy age at most {rollout.max_policy_age}")


def describe(config: Config) -> str:
    """Parameter counts of ψ, φ, ξ and the process layout; builds the model without memory.

    Raises:
        ModelError, DataError: a pretrained model or tokenizer that cannot be used.
    """
    import torch

    from asa_dist.runtime.data.tokenizer import load_pretrained_tokenizer
    from asa_dist.runtime.model import build_model, count_parameters

    tokenizer = config.data.tokenizer
    vocab_size = tokenizer.train.vocab_size if tokenizer.train else len(load_pretrained_tokenizer(str(tokenizer.path)))
    with torch.device("meta"):
        counts = count_parameters(build_model(config, vocab_size, eos_token_id=0, on_cuda=False))
    return ("parameters\n" + "".join(f"  {symbol} {name}: {counts[part]:,}\n" for symbol, name, part in (
        ("ψ", "generator", "psi"), ("φ", "evaluator heads", "phi"), ("ξ", "meta-optimizer", "xi")))
        + "processes\n" + process_layout(config))


def assign_gpus(config: Config) -> tuple[list[str], list[str]]:
    """Disjoint device ids for (trainer ranks, rollout workers) out of the visible ones.

    Raises:
        ConfigError: fewer GPUs than asked for.
    """
    num_train, num_rollout = config.train.gpus, config.rollout.workers * config.rollout.gpus_per_worker
    if num_train + num_rollout == 0:
        return [], []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or len(devices) < num_train + num_rollout:
        found = len(devices) if torch.cuda.is_available() else 0
        raise ConfigError(f"train.gpus = {num_train} and rollout.workers x gpus_per_worker = {num_rollout} "
                          f"need {num_train + num_rollout} GPUs, this machine shows {found}")
    return devices[:num_train], devices[num_train:num_train + num_rollout]


def run_training(config: Config, config_path: Path, overrides: Sequence[str], run_dir: Path) -> int:
    """Trains to the end on this machine. Returns the launcher's exit code; ends every process it started.

    Raises:
        ConfigError, DataError, ModelError, ClusterError: before any rank starts.
    """
    from asa_dist.rollout.cluster import start_local_ray
    from asa_dist.train import object_store_bytes, prepare_run_folder

    train_gpus, rollout_gpus = assign_gpus(config)
    summary = prepare_run_folder(config, run_dir)
    print(f"run folder {run_dir}: {summary.documents:,} documents, {summary.tokens:,} tokens, vocabulary {summary.vocab_size:,}", flush=True)
    weight_bytes = _generator_bytes(config, summary.vocab_size)
    with StopOnSignal() as stop, start_local_ray(
            config.rollout.workers * config.rollout.threads_per_worker, len(rollout_gpus), object_store_bytes(weight_bytes),
            head_environment={"CUDA_VISIBLE_DEVICES": ",".join(rollout_gpus)}) as ray:
        environment = {**os.environ, **ray.environment, "OMP_NUM_THREADS": str(config.train.threads_per_rank)}
        if train_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(train_gpus)
        else:
            environment["DS_ACCELERATOR"] = "cpu"
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--hostfile", os.devnull, "--num_accelerators", str(config.num_ranks),
            "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", "asa_dist.train",
            str(config_path), *overrides, "--run-dir", str(run_dir), "--ray-address", ray.address]
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        stop.watch(launcher)
        code = launcher.wait()
    if code == 0:
        print(f"finished: {run_dir}", flush=True)
    elif not stop.asked:
        print(f"asa: the run failed (exit code {code}); what is written so far stands in {run_dir}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _generator_bytes(config: Config, vocab_size: int) -> int:
    import torch

    from asa_dist.runtime.model import build_model, count_parameters

    with torch.device("meta"):
        num_parameters = count_parameters(build_model(config, vocab_size, eos_token_id=0, on_cuda=False))["psi"]
    return num_parameters * (2 if config.model.dtype == "bfloat16" else 4)


class StopOnSignal:
    """The first SIGINT or SIGTERM asks the launcher to end its ranks, the second kills its session."""

    def __init__(self) -> None:
        self.asked = 0
        self._launcher: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._launcher is not None and self._launcher.poll() is None:
            self._end(signal.SIGTERM)
            try:
                self._launcher.wait(STOP_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._end(signal.SIGKILL)
                self._launcher.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def watch(self, launcher: subprocess.Popen[bytes]) -> None:
        self._launcher = launcher

    def _on_signal(self, number: int, frame: object) -> None:
        self.asked += 1
        if self._launcher is None:
            raise KeyboardInterrupt
        print("asa: stopping (once more to stop at once)" if self.asked == 1 else "asa: stopping at once", file=sys.stderr, flush=True)
        self._end(signal.SIGTERM if self.asked == 1 else signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._launcher is not None and self._launcher.poll() is None:
            os.killpg(self._launcher.pid, number)


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

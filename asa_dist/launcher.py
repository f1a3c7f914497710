"""`asa train` and `asa resume` on one machine: checks, data, an own Ray, the deepspeed launcher in an own session.

    asa train ──┬── Ray's head process (own session; loopback, token)
                └── deepspeed launcher (own session) ── rank 0 … rank N − 1
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asa_dist.config import Config, ConfigError
from asa_dist.job_layout import gpu_names, in_turns
from asa_dist.rollout.engine_choice import describe_engine
from asa_dist.runtime.checkpoint_files import CheckpointFolder, list_checkpoints, newest_whole
from asa_dist.runtime.ownership import TakenOver
from asa_dist.runtime.run_lock import hold_run_folder
from asa_dist.runtime.stopping import EXIT_ENDED_EARLY, EXIT_TAKEN_OVER, SignalCatcher, ask_to_stop, tell

STOP_GRACE_SECONDS = 40.0  # the deepspeed launcher itself waits 30 s before it kills its ranks
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GPU_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under Windows


def process_layout(config: Config) -> str:
    """Who runs where, for people."""
    train, rollout = config.train, config.rollout
    ranks = describe_ranks(config)
    if num_gpus := rollout.workers * rollout.gpus_per_worker:
        first = 0 if rollout.placement == "shared" else train.gpus
        place = f"on {gpu_names(first, first + num_gpus)}"
    else:
        place = f"on the CPU, threads each: {rollout.threads_per_worker}"
    return (
        f"  {ranks}; ZeRO stage {train.zero_stage}\n"
        f"    per step, all ranks: {train.corpus_rows_per_step} corpus rows, {rollout.prompts_per_step} groups of "
        f"{rollout.responses_per_prompt} responses; micro-batches per rank: {train.accumulation_steps}\n"
        f"  rollout workers: {rollout.workers}, {place}{in_turns(rollout)}; engine {describe_engine(rollout)}, "
        f"groups per lease: {config.groups_per_lease}\n"
        f"  coordinator: 1; policy age at most {rollout.max_policy_age}"
    )


def describe_ranks(config: Config) -> str:
    """Trainer ranks and their devices, for people."""
    train = config.train
    if train.gpus:
        return f"trainer ranks: {train.gpus}, on {gpu_names(0, train.gpus)}"
    return f"trainer ranks: {train.ranks}, on the CPU, threads each: {train.threads_per_rank}"


def count_model(config: Config) -> dict[str, int]:
    """Numbers of parameters of ψ, φ, ξ, without loading or allocating any.

    A tokenizer that is still to be trained may end with fewer tokens than counted here.

    Raises:
        ModelError, DataError: a pretrained model or tokenizer that cannot be used.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from asa_dist.runtime.data.tokenizer import load_pretrained_tokenizer
    from asa_dist.runtime.model import around_trunk, count_parameters, trunk_config

    tokenizer = config.data.tokenizer
    vocab_size = tokenizer.train.vocab_size if tokenizer.train else len(load_pretrained_tokenizer(str(tokenizer.path)))
    trunk = trunk_config(config.model, vocab_size, eos_token_id=0, row_tokens=config.data.sequence_length)
    with torch.device("meta"):
        return count_parameters(around_trunk(AutoModelForCausalLM.from_config(trunk, trust_remote_code=False), config))


def describe(config: Config) -> str:
    """Parameter counts of ψ, φ, ξ and the process layout. Raises as :func:`count_model`."""
    counts = count_model(config)
    return (
        "parameters\n"
        f"  ψ generator: {counts['psi']:,}\n"
        f"  φ evaluator heads: {counts['phi']:,}\n"
        f"  ξ meta-optimizer: {counts['xi']:,}\n"
        f"processes\n{process_layout(config)}"
    )


@dataclass(frozen=True)
class GpuAssignment:
    """Device ids out of the visible ones, empty on the CPU; disjoint, unless the two take turns."""

    train: Sequence[str]
    rollout: Sequence[str]


def assign_gpus(config: Config, origin: str) -> GpuAssignment:
    """Which GPUs train, and which generate. ``origin``: the config's name in messages.

    Raises:
        ConfigError: fewer GPUs than asked for.
    """
    num_train, num_rollout = config.train.gpus, config.rollout.workers * config.rollout.gpus_per_worker
    is_shared = config.rollout.placement == "shared"
    first_rollout = 0 if is_shared else num_train
    needed = max(num_train, first_rollout + num_rollout)
    devices = visible_gpus() if needed else []
    if len(devices) < needed:
        raise ConfigError(
            f"{origin}: train.gpus = {num_train} and rollout.workers x rollout.gpus_per_worker = {num_rollout}"
            f"{' of the same' if is_shared else ''} need {needed} GPUs, this machine shows {len(devices)}"
        )
    return GpuAssignment(devices[:num_train], devices[first_rollout : first_rollout + num_rollout])


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    if not any(os.path.exists(file) for file in GPU_DRIVER_FILES):
        return []  # asking torch would take seconds
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def run_training(
    config: Config, run_dir: Path, gpus: GpuAssignment, *, resume: bool = False, started_at: float
) -> int:
    """Trains on this machine, to the end or until asked to stop; ends every process it started; says how to go on.

    Args:
        resume: go on from the newest checkpoint of ``run_dir``, or from the beginning if there is none.
        started_at: Unix time from which `train.max_wall_time_minutes` count.

    Returns:
        the exit code: 0 finished, or stopped as asked; 75 ended early, by `train.max_wall_time_minutes` or a signal
        to a rank; 76 a later start has taken over; 128 + n stopped at once by signal n; else that of the rank that
        failed.

    Raises:
        ConfigError, DataError, ModelError, ClusterError: before any rank starts.
    """
    from asa_dist.rank_ray import object_store_bytes
    from asa_dist.rollout.cluster import start_local_ray
    from asa_dist.run_folder import is_fenced, prepare_run_folder

    num_parameters = count_model(config)["psi"]
    rollout = config.rollout
    with StopOnSignal(run_dir) as stop, hold_run_folder(run_dir, fenced=is_fenced(config, run_dir)) as lock:
        try:
            summary = prepare_run_folder(config, run_dir, resume=resume, started_at=started_at)
        except TakenOver as error:
            print(f"asa: {error}", file=sys.stderr, flush=True)
            return EXIT_TAKEN_OVER
        print(
            f"run folder {run_dir}: {summary.documents:,} documents, {summary.tokens:,} tokens, "
            f"vocabulary {summary.vocab_size:,}\n"
            f"starting Ray, {config.num_ranks} trainer rank(s) and {rollout.workers} rollout worker(s)"
            f"{in_turns(rollout)}",
            flush=True,
        )
        with start_local_ray(
            rollout.workers * rollout.threads_per_worker,
            len(gpus.rollout),
            object_store_bytes(num_parameters, config.model.dtype),
            head_environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus.rollout)},
        ) as ray:
            command = launcher_command(config, gpus, run_dir, resume, started_at, "--ray-address", ray.address)
            code = stop.run(command, ray.environment | rank_environment(config), lock)
    if stop.killed_by is None:
        write_report_or_warn(run_dir)
    return report_end(code, stop.killed_by, run_dir, config.train.steps)


def rank_environment(config: Config) -> dict[str, str]:
    """What the launcher's environment needs beside that of this process."""
    environment = {
        "OMP_NUM_THREADS": str(config.train.threads_per_rank),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # one machine: no rank listens outside it
    }
    if not config.train.gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def write_report_or_warn(run_dir: Path) -> None:
    """The page to look at; without it the run is none the worse."""
    try:
        from asa_dist.report import write_report

        print(f"report: {write_report(run_dir)}", flush=True)
    except Exception as error:  # whatever it is, the exit code and how to go on matter more
        print(f"asa: warning: no report: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def report_end(
    code: int, killed_by: int | None, run_dir: Path, num_steps: int | None, resumed_as: Path | None = None
) -> int:
    """Says how a run ended, and how to go on.

    Args:
        code: the launcher's exit code, as of `subprocess`.
        killed_by: the signal that stopped it at once, if one did.
        num_steps: of the whole run; None: it is not finished, whatever the number of its steps.
        resumed_as: what `asa resume` is given; None: ``run_dir``.

    Returns:
        the exit code of `asa train`.
    """
    newest = newest_whole(run_dir)
    after_step = f" after step {newest.step}" if newest else ""
    go_on = f"{_last_checkpoint(newest, run_dir)}; go on with: asa resume {shlex.quote(str(resumed_as or run_dir))}"
    if code == 0:
        is_finished = newest is not None and num_steps is not None and newest.step >= num_steps
        print(f"finished: {run_dir}" if is_finished else f"stopped{after_step}; {go_on}", flush=True)
        return 0
    if code == EXIT_ENDED_EARLY:
        print(f"ended early{after_step}; {go_on}", flush=True)
        return code
    if code == EXIT_TAKEN_OVER:
        print(f"asa: another start has taken over {run_dir}, see above: the run goes on there, not here",
              file=sys.stderr, flush=True)  # fmt: skip
        return code
    if killed_by is not None:
        print(f"asa: stopped at once; {go_on}", file=sys.stderr, flush=True)
        return 128 + killed_by
    print(f"asa: the run failed ({_reason(code)}{_stacks(run_dir)}); {go_on}", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


def _stacks(run_dir: Path) -> str:
    """Where stacks were written, if any were: a process that is killed leaves its file empty, or with a headline."""
    dumps = [path for path in (run_dir / "stacks").glob("*.txt") if b"hread 0x" in path.read_bytes()]
    return f"; stacks: {', '.join(map(str, dumps))}" if dumps else ""


def _last_checkpoint(newest: CheckpointFolder | None, run_dir: Path) -> str:
    if newest is not None:
        return f"last checkpoint: {newest.path}"
    return "NONE of its checkpoints can be used" if list_checkpoints(run_dir) else "no checkpoint yet"


def _reason(launcher_code: int) -> str:
    if launcher_code < 0:
        return f"the launcher was ended by signal {-launcher_code}"
    if launcher_code > 192:  # the launcher passes on the code of a rank: -9 becomes 247
        return f"a rank was ended by signal {256 - launcher_code}"
    return f"exit code {launcher_code}"


def launcher_command(
    config: Config, gpus: GpuAssignment, run_dir: Path, resume: bool, started_at: float, *options: str
) -> list[str]:
    """DeepSpeed's launcher of one host: a rank per device; they read the resolved config of the run folder.

    Args:
        options: more of asa_dist.train's.

    `deepspeed` itself, the launcher of several hosts, would only start this one, number GPUs from 0 whatever
    CUDA_VISIBLE_DEVICES says, and end with 0 when its child is killed.
    """
    devices = list(gpus.train or range(config.num_ranks))
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level", "critical"]
    launch += ["--world_info", hosts, "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    train = ["--module", "asa_dist.train", str(run_dir / "config.yaml"), "--run-dir", str(run_dir), "--prepared"]
    train += ["--started-at", repr(started_at), *(["--resume"] if resume else [])]
    return [*launch, *train, *options]


class StopOnSignal(SignalCatcher):
    """What signals to `asa train` do.

    Before ranks are started, the first one ends it. Then the first one asks the ranks, through the run folder, to
    finish their step and to write a checkpoint; they never see it, in a session of their own. The second one kills.
    After they have ended there is nothing left to ask; what a killed launcher may have left behind is ended at once.

    Args:
        what_follows: of the first signal, for people.
    """

    def __init__(self, run_dir: Path, what_follows: str = "finishing the step and writing a checkpoint") -> None:
        super().__init__()
        self._what_follows = what_follows
        self.killed_by: int | None = None  # the second signal's number
        self._run_dir = run_dir
        self._num_received = 0
        self._is_launching = self._has_ended = False
        self._group: int | None = None  # the launcher's process group, while any of it may be alive

    @property
    def was_asked(self) -> bool:
        """Whether a signal has come, whatever became of it."""
        return self._num_received > 0

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int], *,
        ends_with_us: bool = False,
    ) -> int:
        """Runs the launcher in a session of its own, until nothing of that is left; returns its exit code.

        Args:
            environment: what it has beside that of this process.
            ends_with_us: it gets SIGTERM if this process is killed; else something else has to tell it.
        """
        self._is_launching = True  # a signal may not raise any more: it would lose a process that has just started
        launcher = subprocess.Popen(
            command, env=os.environ | environment, start_new_session=True, pass_fds=pass_fds,
            preexec_fn=_end_with_parent if ends_with_us else None,
        )
        self._group = launcher.pid
        if self.killed_by is not None:
            self._end(signal.SIGKILL)
        code = launcher.wait()
        self._has_ended = True
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while _is_alive(self._group):  # the launcher leaves after its ranks, unless it was killed
            in_time = self.killed_by is None and time.monotonic() < deadline
            self._end(signal.SIGTERM if in_time else signal.SIGKILL)
            time.sleep(0.2)
        self._group = None
        return code

    def _on_signal(self, number: int, frame: object) -> None:
        self._num_received += 1
        is_first = self._num_received == 1
        if not self._is_launching:
            if is_first:  # the next one would interrupt the cleaning up
                tell("stopping")
                raise SystemExit(128 + number)
        elif self._has_ended:
            self._end(signal.SIGKILL)
        elif is_first:
            self._ask(number)
        else:
            tell("stopping at once")
            self.killed_by = number
            self._end(signal.SIGKILL)

    def _ask(self, number: int) -> None:
        try:
            ask_to_stop(self._run_dir, f"asa train ({signal.Signals(number).name})")
        except OSError as error:
            tell(f"cannot ask the ranks to stop: {error} (once more to stop at once)")
        else:
            tell(f"stopping: {self._what_follows} (once more to stop at once)")

    def _end(self, number: int) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):  # all gone already
                os.killpg(self._group, number)


def _end_with_parent() -> None:
    """In a child, before it runs anything: Linux sends it SIGTERM when its parent has ended, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_alive(group: int) -> bool:
    """Whether a process group has a process that still runs; a zombie only waits for its parent."""
    import psutil

    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                return True
    return False


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

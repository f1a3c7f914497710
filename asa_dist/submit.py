"""`asa submit`: one script that runs a config as a SLURM job.

It is launch/slurm/train.sbatch with its settings filled in; it stays in the run folder, beside the resolved
config and the revision of the code.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asa_dist.config import Config, ConfigError, dump_config, load_config
from asa_dist.job_layout import JobLayout, counted, who_is_where

TEMPLATE = Path(__file__).parent.parent / "launch/slurm/train.sbatch"
SCRIPT, REVISION = "submit.sbatch", "revision.txt"  # in the run folder, beside config.yaml
# before the time limit: what a step and a checkpoint may take, a tenth of the limit within these bounds
MIN_WARNING_SECONDS, MAX_WARNING_SECONDS = 120, 600
SBATCH_TIMEOUT_SECONDS = 60.0
# what sbatch takes for --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<d_hours>\d+)(?::(?P<d_minutes>\d+)(?::\d+)?)?"
                  r"|(?P<hours>\d+):(?P<h_minutes>\d+):\d+|(?P<minutes>\d+)(?::\d+)?)")  # fmt: skip
SLURM_NAME = re.compile(r"[\w.,+-]+")  # of a partition (or several), of an account


class SubmitError(Exception):
    """SLURM did not take the job; the message says why."""


@dataclass(frozen=True)
class JobRequest:
    """What is asked of SLURM beside nodes.

    Attributes:
        time_limit: as `sbatch --time`; None = the partition's own.
        max_restarts: in a row without any progress.
    """

    time_limit: str | None = None
    partition: str | None = None
    account: str | None = None
    max_restarts: int = 3

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError`."""
        for option, value in (("--partition", self.partition), ("--account", self.account)):
            if value is not None and not SLURM_NAME.fullmatch(value):
                raise ConfigError(f"{option} {value!r}: a name has letters, digits and . , + - _ only")
        if self.time_limit is not None and limit_minutes(self.time_limit) < 5:
            raise ConfigError(f"--time {self.time_limit}: a start takes a minute or two, so does an end: ask for 5")

    @property
    def warning_seconds(self) -> int:
        """So long before the time limit the run is told to write a checkpoint."""
        if self.time_limit is None:
            return MAX_WARNING_SECONDS
        return min(max(6 * limit_minutes(self.time_limit), MIN_WARNING_SECONDS), MAX_WARNING_SECONDS)


def limit_minutes(text: str) -> int:
    """Whole minutes of a time limit as `sbatch --time` takes it. Raises :class:`ConfigError`."""
    match = TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time {text!r}: write minutes, hours:minutes:seconds or days-hours")
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = 24 * part["days"] + part["d_hours"] + part["hours"]
    return 60 * hours + part["d_minutes"] + part["h_minutes"] + part["minutes"]


def resolve_config(path: Path, overrides: Sequence[str], layout: JobLayout) -> Config:
    """The config with the number of ranks on all nodes. Raises :class:`ConfigError`."""
    config = load_config(path, overrides)
    if layout.num_ranks == config.num_ranks and bool(config.train.gpus) == bool(layout.gpus_per_node):
        return config
    return load_config(path, [*overrides, f"train.{'gpus' if layout.gpus_per_node else 'ranks'}={layout.num_ranks}"])


def render_script(config: Config, layout: JobLayout, request: JobRequest, name: str, run_dir: Path) -> str:
    """The template with its settings filled in.

    Args:
        name: of the job, for `squeue`.
        run_dir: as an absolute path.

    Raises:
        ConfigError: a run folder that SLURM cannot be told of; this installation has no template.
    """
    if set(str(run_dir)) & set('"\\\n'):
        raise ConfigError(f"run folder {str(run_dir)!r}: sbatch takes no name with quotes, backslashes or line breaks")
    log = str(run_dir).replace("%", "%%") + "/job-%j.log"
    directives = {
        "job-name": re.sub(r"[^\w.-]", "-", name), "nodes": str(layout.num_nodes), "time": request.time_limit,
        "partition": request.partition, "account": request.account,
        "gpus-per-node": str(layout.gpus_per_node) if layout.gpus_per_node else None,
        "signal": f"B:USR1@{request.warning_seconds}", "output": f'"{log}"',
        # one of several nodes that only generate may be lost: SLURM would end the job
        "no-kill": "" if layout.num_rollout_nodes > 1 else None,
    }  # fmt: skip
    settings: dict[str, str | int] = {
        "CONFIG": str(run_dir / "config.yaml"), "RUN_DIR": str(run_dir), "PYTHON": sys.executable,
        "ROLLOUT_NODES": layout.num_rollout_nodes, "RANKS_PER_NODE": layout.ranks_per_node,
        "THREADS_PER_RANK": config.train.threads_per_rank, "GPUS_PER_NODE": layout.gpus_per_node,
        "RAY_CPUS_PER_NODE": layout.ray_cpus_per_node, "RAY_GPUS_PER_NODE": layout.ray_gpus_per_node,
        "PLACEMENT": config.rollout.placement, "MAX_RESTARTS": request.max_restarts,
    }  # fmt: skip
    return _fill(_read_template(), directives, settings)


def _read_template() -> str:
    try:
        return TEMPLATE.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{TEMPLATE}: {error.strerror}: `asa submit` needs the repository: install it with "
                          "`pip install -e .`") from None  # fmt: skip


def settings_of(script: str) -> str:
    """What a rendered script asks of SLURM, and its settings: all that differs from one job to another."""
    asked = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    settings = script.partition("\n# --- settings")[2].partition("\n# --- end of settings")[0].splitlines()[1:]
    return "\n".join(asked + [line.partition(" #")[0].rstrip() for line in settings])


def what_next(job: str, run_dir: Path) -> str:
    """For people who have submitted a job."""
    folder = shlex.quote(str(run_dir))
    return (
        f"submitted job {job}; what it says: {run_dir}/job-{job}.log\n"
        f"  squeue --job {job}           is it waiting, running, requeued?\n"
        f"  scancel --signal=USR1 --batch {job}   a checkpoint now, then requeued\n"
        f"  touch {folder}/stop   a checkpoint, then the end; `asa submit` into the same folder goes on\n"
        f"  scancel {job}   the end, at once\n"
        f"  asa inspect {folder}"
    )


def _fill(template: str, directives: Mapping[str, str | None], settings: Mapping[str, str | int]) -> str:
    """``directives``: by sbatch's option; "" = it has no value, None = as in the template. Settings: its lines."""
    lines = template.splitlines()
    for option, value in directives.items():
        if value is None:
            continue
        line, start = f"#SBATCH --{option}" + (f"={value}" if value else ""), f"#SBATCH --{option}="
        places = [place for place, old in enumerate(lines) if old.startswith(start)]
        if places:
            lines[places[0]] = line
        else:  # one that the template leaves to the site goes in front of the others
            lines.insert(next(place for place, old in enumerate(lines) if old.startswith("#SBATCH ")), line)
    for name, setting in settings.items():
        places = [place for place, old in enumerate(lines) if old.startswith(f"{name}=")]
        if len(places) != 1:
            raise ConfigError(f"{TEMPLATE}: {len(places)} lines set {name}, one must")
        _, hash_sign, comment = lines[places[0]].partition(" #")
        lines[places[0]] = f"{name}={shlex.quote(str(setting))}{'  #' if hash_sign else ''}{comment}"
    return "\n".join(lines) + "\n"


def describe_job(config: Config, layout: JobLayout, request: JobRequest, run_dir: Path) -> str:
    """Who runs where, for people."""
    gpus = f" with {layout.gpus_per_node} GPUs each" if layout.gpus_per_node else ", on CPUs"
    limit = f"time limit {request.time_limit}" if request.time_limit else "the partition's time limit"
    train, rollout = config.train, config.rollout
    lines = [
        f"{counted(layout.num_nodes, 'node')}{gpus}; {limit}, checkpoint {request.warning_seconds} s before it",
        *who_is_where(config, layout),
        f"per step: {train.corpus_rows_per_step} corpus rows, {rollout.prompts_per_step} groups of "
        f"{rollout.responses_per_prompt} responses; policy age at most {rollout.max_policy_age}",
        f"at most {request.max_restarts} restarts in a row without progress; run folder {run_dir}",
    ]
    return "\n".join(lines)


def save_job(config: Config, script: str, run_dir: Path) -> Path:
    """Script, resolved config and revision in the run folder, which is made if need be; returns the script's path.

    Raises:
        ConfigError: another process works on this run folder, it holds another run, or it cannot be written to.
    """
    from asa_dist.resume import refuse_changes
    from asa_dist.runtime.checkpoint_files import write_atomically
    from asa_dist.runtime.run_lock import hold_run_folder

    path = run_dir / "config.yaml"
    with hold_run_folder(run_dir):
        if path.exists():
            refuse_changes(path, config, _changeable(config, run_dir))
        try:
            write_atomically(path, dump_config(config))
            if revision := code_revision():
                write_atomically(run_dir / REVISION, f"{revision}\n")
            write_atomically(run_dir / SCRIPT, script)
        except OSError as error:
            raise ConfigError(f"{error.filename or run_dir}: {error.strerror or error}") from None
    return run_dir / SCRIPT


def _changeable(config: Config, run_dir: Path) -> Sequence[str]:
    if config.method != "udasa":
        return ()
    from asa_dist.udasa_run import changeable

    return changeable(run_dir)


def code_revision() -> str | None:
    """The git commit of this code, and whether it has been changed since; None: it is not in a git repository."""
    git = ["git", "-C", str(TEMPLATE.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changes.stdout else "")


def submit_job(script: Path) -> str:
    """Hands the script to `sbatch`; returns the job's id.

    Raises:
        SubmitError: there is no sbatch, it does not answer, or it refuses the job.
    """
    try:
        answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=True,
                                timeout=SBATCH_TIMEOUT_SECONDS)  # fmt: skip
    except FileNotFoundError:
        raise SubmitError(f"there is no sbatch here: call `sbatch {shlex.quote(str(script))}` on the cluster's login "
                          "node, or train on this machine with `asa train`") from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SubmitError(f"sbatch gave no answer in {SBATCH_TIMEOUT_SECONDS:g} s: is SLURM up? See `sinfo`") from None
    except subprocess.CalledProcessError as error:
        raise SubmitError(f"sbatch refuses {script}: {error.stderr.strip()}") from None
    return answer.stdout.strip().partition(";")[0]  # JOB;CLUSTER

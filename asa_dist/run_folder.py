"""The run folder, or the folder of a round, before anything trains: data, tokenizer, resolved config."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from asa_dist.config import Config, ConfigError, dump_config
from asa_dist.resume import refuse_changes
from asa_dist.runtime.run_lock import hold_run_folder

if TYPE_CHECKING:
    from asa_dist.runtime.data.prepare import DataSummary
    from asa_dist.runtime.ownership import Ownership


def is_fenced(config: Config, run_dir: Path) -> bool:
    """Whether a start on a lost host can do no harm while another one works, as in :func:`hold_run_folder`.

    Training cannot: ownership fences it; and with data there, preparing only writes the config, every start of a job
    the same, and no start once a later one has come. Who is still preparing data can, and a whole run of UDASA.
    """
    return config.method == "asa" and (run_dir / "data").exists()


def prepare_run_folder(config: Config, run_dir: Path, *, resume: bool = False, started_at: float) -> DataSummary:
    """Data, tokenizer and resolved config in the run folder. Idempotent; one process does it.

    The caller holds the run folder (:func:`hold_run_folder`).

    Args:
        resume: the folder may hold a run already, which is to go on.
        started_at: Unix time at which this start began; a request to stop made since stays.

    Raises:
        TakenOver: SLURM has started this job anew since. Nothing has been changed.
        ConfigError: the run is to go on as another one, or cannot be logged as wanted. Nothing has been changed.
        DataError: content or files that cannot be used, or a run folder that belongs to another run.
    """
    from asa_dist.runtime.checkpoint_files import write_atomically
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.data.prepare import prepare
    from asa_dist.runtime.ownership import refuse_late_start
    from asa_dist.runtime.stopping import forget_stop_request
    from asa_dist.runtime.wandb_log import check_wandb

    check_wandb(config.metrics)
    config_path = run_dir / "config.yaml"
    if resume and config_path.exists():
        refuse_changes(config_path, config)
    try:
        refuse_late_start(run_dir)
        if (run_dir / "metrics.jsonl").exists() and not resume:
            raise DataError(
                f"{run_dir} holds a run already: go on with it by `asa resume {run_dir}`, or choose another folder "
                "with --run-dir"
            )
        summary = prepare(config.data, config.rollout, config.seed, run_dir, lambda message: print(message, flush=True))
        write_atomically(config_path, dump_config(config))
        forget_stop_request(run_dir, started_at)
    except OSError as error:
        raise DataError(f"{error.filename or run_dir}: {error.strerror or error}") from None
    return summary


def prepare_round(config: Config, folder: Path, *, resume: bool = False, started_at: float) -> None:
    """What the training of a round of UDASA needs beside its pairs; otherwise as :func:`prepare_run_folder`.

    Raises:
        ConfigError: it is to go on as another one, or cannot be logged as wanted.
        DataError: no pairs; the model's tokenizer, or a file, that cannot be used.
    """
    from asa_dist.runtime.checkpoint_files import write_atomically
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.data.tokenizer import load_pretrained_tokenizer
    from asa_dist.runtime.pair_files import SUMMARY
    from asa_dist.runtime.stopping import forget_stop_request
    from asa_dist.runtime.wandb_log import check_wandb

    check_wandb(config.metrics)
    config_path = folder / "config.yaml"
    if resume and config_path.exists():
        refuse_changes(config_path, config)
    if not (folder / SUMMARY).exists():
        raise DataError(f"{folder}: no pairs to train on; make them with: asa udasa pairs {folder.parent}")
    try:
        work = folder / ".tokenizer"
        shutil.rmtree(work, ignore_errors=True)
        load_pretrained_tokenizer(str(config.model.name_or_path)).save_pretrained(work)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        work.rename(folder / "tokenizer")
        write_atomically(config_path, dump_config(config))
        forget_stop_request(folder, started_at)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}") from None


@contextmanager
def prepared_together(
    config: Config, run_dir: Path, rank: int, *, resume: bool, started_at: float
) -> Iterator[None]:
    """Rank 0 prepares and holds the run folder, the others wait; what it raises is raised on all ranks.

    Raises:
        ConfigError, DataError, TakenOver: as :func:`hold_run_folder` and what prepares it.
    """
    import torch.distributed as dist

    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.ownership import TakenOver

    # reading a large corpus takes longer than any collective may: a group of its own to wait in
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    problem: list[Exception | None] = [None]
    with ExitStack() as held:
        if rank == 0:
            try:
                held.enter_context(hold_run_folder(run_dir, fenced=is_fenced(config, run_dir)))
                prepare = {"asa": prepare_run_folder, "udasa": prepare_round}[config.method]
                prepare(config, run_dir, resume=resume, started_at=started_at)
            except (ConfigError, DataError, TakenOver) as error:
                problem = [error]
        dist.broadcast_object_list(problem, src=0, group=patient)
        dist.destroy_process_group(patient)
        if problem[0] is not None:
            raise problem[0]
        yield


def taken_over_together(run_dir: Path, rank: int) -> Ownership:
    """Rank 0 makes this start the owner of a run folder that is prepared; what it raises is raised on all ranks.

    Raises:
        TakenOver, DataError: as :func:`take_over`; the latter says what the disk does not do.
    """
    import torch.distributed as dist

    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.ownership import TakenOver, take_over

    outcome: list[Ownership | Exception | None] = [None]
    if rank == 0:
        try:
            outcome = [take_over(run_dir)]
        except TakenOver as error:
            outcome = [error]
        except OSError as error:
            outcome = [DataError(f"{error.filename or run_dir}: {error.strerror or error}")]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    assert outcome[0] is not None
    return outcome[0]

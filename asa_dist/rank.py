"""A trainer rank's surroundings, whatever it trains: what it is told, where its results go, what it says at first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asa_dist.asa.stepping import SteppedLoop
from asa_dist.config import Config
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.engine import Placement
from asa_dist.runtime.metrics import ProgressLine, RunRecorder, SilentRecorder
from asa_dist.runtime.ownership import Ownership
from asa_dist.runtime.run_log import truncate_logs
from asa_dist.runtime.stopping import StopRequests
from asa_dist.runtime.watchdog import Watchdog


@dataclass(frozen=True)
class Rank:
    """What one rank is told, and who watches over it."""

    config: Config
    run_dir: Path
    ownership: Ownership  # of the run folder
    placement: Placement
    options: argparse.Namespace
    stopping: StopRequests
    watchdog: Watchdog

    @property
    def is_first(self) -> bool:
        return self.placement.rank == 0


@dataclass(frozen=True)
class OpenRun:
    """A method's loop, ready to run."""

    loop: SteppedLoop
    run: Callable[[], int]  # to the end, or a request to stop; returns the largest stop code of all ranks
    is_finished: Callable[[], bool]
    recorder: RunRecorder | SilentRecorder


@contextmanager
def open_recorder(
    rank: Rank, first_step: int, num_steps: int, decode: Callable[[Sequence[int]], Any]
) -> Iterator[RunRecorder | SilentRecorder]:
    """Rank 0 writes and shows, from after ``first_step`` steps on; the others are silent.

    Raises:
        DataError: the logs cannot be read, cut or opened.
        TakenOver: because a later start of the run has them.
    """
    if not rank.is_first:
        yield SilentRecorder()
        return
    try:
        # what came after will be trained again; from the beginning on, so will the evaluation before it
        truncate_logs(rank.run_dir, first_step or -1, rank.ownership.folder)
        progress = ProgressLine(num_steps, first_step)
        recorder = RunRecorder(rank.run_dir, rank.config.metrics, decode, progress)
    except (OSError, ValueError) as error:
        rank.ownership.require()
        raise DataError(f"the logs in {rank.run_dir} cannot be continued: {error}") from None
    try:
        rank.ownership.require()  # else what was opened may be the later start's logs
        yield recorder
    finally:
        recorder.close()


def announce(
    rank: Rank, recorder: RunRecorder | SilentRecorder, headline: str, warnings: Sequence[str], first_step: int,
    damaged: dict[str, str],
) -> None:
    """What the run begins with, for people and events.jsonl. ``damaged``: checkpoints passed over, and why."""
    for name, reason in damaged.items():
        recorder.say(f"asa: warning: checkpoint {name} is damaged and was not used: {reason}")
        recorder.event("checkpoint_damaged", name=name, reason=reason)
    if damaged:
        recorder.say(f"going on after step {first_step} instead")
    recorder.say(headline)
    for warning in warnings:
        recorder.say(f"asa: warning: {warning}")
    layout = {"ranks": rank.placement.num_ranks, "zero_stage": rank.config.train.zero_stage}
    name = "resumed" if rank.options.resume else "started"
    recorder.event(name, step=first_step, generation=rank.ownership.generation, **layout)


def silence_transformers(*, is_shown: bool) -> None:
    """Its progress bars, of reading a model's weights, are for one person at one terminal."""
    from transformers.utils import logging

    if not (is_shown and sys.stderr.isatty()):
        logging.disable_progress_bar()


def describe_ranks(rank: Rank) -> str:
    """How the model is computed, and by whom."""
    config, placement = rank.config, rank.placement
    attention = config.model.attention_implementation(placement.device.type == "cuda")
    return (
        f"{placement.num_ranks} ranks, ZeRO-{config.train.zero_stage}, {config.model.dtype}, attention {attention}, "
        f"device {placement.device.type}"
    )

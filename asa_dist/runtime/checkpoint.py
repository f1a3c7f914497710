"""Saving and loading, all ranks together. What the files are: ``checkpoint_files``; the shards: ``parameter_state``.

save    rank 0: empty folder │ every rank: its own shard, durable │ rank 0: manifest, rename, ``latest``, retention
load    newest first: each rank verifies its share of the files │ a damaged one is named, the one before it is tried
        every rank: reads the ranges it needs from whichever shards have them, whatever wrote them
        rank 0: damaged ones, newer than that, are renamed: none of them comes back

After each part the ranks exchange how it went: what fails on one has failed on all, and none waits for ever. All of it
is made in this start's own folder, and appears or goes by renames: where a later start has taken over, they fail.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors.torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

import asa_dist
from asa_dist.config import CheckpointConfig
from asa_dist.runtime import checkpoint_files as files
from asa_dist.runtime.checkpoint_files import CheckpointError, FileRecord, Manifest
from asa_dist.runtime.engine import TrainEngine
from asa_dist.runtime.ownership import Ownership, TakenOver
from asa_dist.runtime.parameter_state import (
    ShardReader,
    local_pieces,
    parameter_shapes,
    pieces_to_save,
    refresh_weights,
    refuse_other_parameters,
    write_shard,
)

T = TypeVar("T")


@dataclass(frozen=True)
class SaveResult:
    """How a save went, the same on every rank but for ``seconds``."""

    ok: bool
    reason: str  # why not; if it did: what could not be tidied up, e.g. an old one that cannot be removed; else ""
    seconds: float
    num_bytes: int  # written by all ranks; 0 if it failed
    name: str  # of the folder; "" if it failed


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What the caller has to put back; weights and optimizer are loaded already."""

    step: int  # optimizer steps made
    loop_state: dict[str, Tensor]  # on the CPU, on every rank
    rollouts: bytes | None  # on rank 0, if any were saved; None on the others


class _FailedOnARank(CheckpointError):
    """Raised on every rank alike."""


def _require(before_commit: Callable[[], bool] | None) -> None:
    if before_commit is not None and not before_commit():
        raise OSError("the run's own log files cannot be written")


class Checkpointer:
    """Checkpoints of one start of a run. Every method, and making one, is a collective: all ranks call it.

    The ranks talk over a group of their own, with ``checkpoint.timeout_seconds``: a slow disk is no lost peer. If a
    peer is lost all the same, gloo's RuntimeError says so.

    Args:
        ownership: of the run folder; the same on every rank. Once it is lost, ``save`` and what ``load`` changes raise
            TakenOver, on every rank alike.
        on_damaged: called on rank 0 with (name, what is wrong) of a checkpoint that cannot be used, as soon as it is
            known: verifying the next one may take minutes.
    """

    def __init__(
        self, ownership: Ownership, config: CheckpointConfig, engine: TrainEngine,
        on_damaged: Callable[[str, str], None],
    ):
        self._ownership, self._run_dir, self._work = ownership, ownership.run_dir, ownership.folder
        self._keep, self._engine, self._on_damaged = config.keep, engine, on_damaged
        self._rank, self._num_ranks = engine.placement.rank, engine.placement.num_ranks
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=config.timeout_seconds))

    # --- saving --------------------------------------------------------------------------------------------------
    def save(
        self, step: int, loop_state: dict[str, Tensor], rollouts: bytes | None,
        before_commit: Callable[[], bool] | None = None,
    ) -> SaveResult:
        """Writes the checkpoint after ``step`` steps: complete and durable on return, or the previous one stands.

        Should no more than ``latest`` or a removal fail, the new one stands too: it is what loads.

        Args:
            loop_state: of any dtypes and shapes; rank 0's counts.
            rollouts: rank 0's counts.
            before_commit: makes durable what has to be there before the checkpoint is; called on every rank. False: it
                could not, and there is no checkpoint either.

        Raises:
            TakenOver: a later start owns the run folder; there is no checkpoint.
        """
        start = time.perf_counter()
        try:
            folder, stale = self._on_first_rank(lambda: self._start(step))
            written = self._exchange(self._agree(lambda: self._write_files(folder, loop_state, rollouts)))
            self._agree(lambda: _require(before_commit))
            records = {name: record for share in written for name, record in share.items()}
            name, untidy = self._on_first_rank(lambda: self._complete(folder, step, records))
        except _FailedOnARank as failure:
            if self._rank == 0:
                files.remove_partials(self._work)  # what cannot be removed now is tried again by the next save
            return SaveResult(False, str(failure), time.perf_counter() - start, 0, "")
        num_bytes = sum(record.bytes for record in records.values())
        return SaveResult(True, "; ".join([*stale, *untidy]), time.perf_counter() - start, num_bytes, name)

    def _start(self, step: int) -> tuple[Path, list[str]]:
        """(empty folder to write into, what could not be tidied up)."""
        stale = files.remove_partials(self._work)
        return files.start_partial(self._work, step), stale

    def _write_files(
        self, folder: Path, loop_state: dict[str, Tensor], rollouts: bytes | None
    ) -> dict[str, FileRecord]:
        """What this rank writes, by path within the folder."""
        shard = f"{files.SHARDS}/rank-{self._rank:05d}.safetensors"
        pieces = pieces_to_save(self._engine.engine.module, self._engine.optimizer, self._rank, self._num_ranks)
        written = {shard: write_shard(folder / shard, pieces)}
        if self._rank == 0:
            # copies: safetensors refuses views of one storage
            state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in loop_state.items()}
            written[files.LOOP] = files.write_file(folder / files.LOOP, [safetensors.torch.save(state)])
            if rollouts is not None:
                written[files.ROLLOUTS] = files.write_file(folder / files.ROLLOUTS, [rollouts])
        return written

    def _complete(self, folder: Path, step: int, records: dict[str, FileRecord]) -> tuple[str, list[str]]:
        """(name of the new checkpoint, what could not be tidied up)."""
        manifest = Manifest(
            step=step,
            num_ranks=self._num_ranks,
            zero_stage=self._engine.engine.zero_optimization_stage(),
            versions={"asa_dist": asa_dist.__version__, "torch": version("torch"), "deepspeed": version("deepspeed")},
            parameters=parameter_shapes(self._engine.engine.module),
            files=records,
        )
        name = files.complete(self._run_dir, folder, manifest)
        return name, files.settle(self._run_dir, self._work, name, self._keep)  # it stands already, whatever fails now

    # --- loading -------------------------------------------------------------------------------------------------
    def load(self) -> LoadedCheckpoint | None:
        """Loads the newest sound checkpoint into engine and optimizer; None if there is none at all.

        Weights, Adam's moments and step counts are restored for any number of ranks and ZeRO stage; learning rates stay
        as they are. Newer ones, which are damaged, are set aside: the run goes on without them, so that none of them
        may load later, should its disk be readable again.

        Raises:
            CheckpointError: all are damaged, the newest sound one is of another model, or a damaged one cannot be set
                aside. On every rank alike.
            TakenOver: the same, but because a later start owns the run folder.
        """
        damaged: dict[str, str] = {}  # name → what is wrong
        for name in self._on_first_rank(self._candidates):
            manifest, problems = self._verify(name)
            if manifest is not None and not problems:
                return self._load(name, manifest, passed_over=list(damaged))
            damaged[name] = "; ".join(problems)
            if self._rank == 0:
                self._on_damaged(name, damaged[name])
        if damaged:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in damaged.items())
            raise CheckpointError(f"no checkpoint in {self._run_dir / files.FOLDER} can be used:{listed}")
        return None

    def _candidates(self) -> list[str]:
        """Newest first; one that only ``latest`` knows is missed before the others are tried."""
        names = [entry.name for entry in files.list_checkpoints(self._run_dir)]
        latest = files.read_latest(self._run_dir)
        return names if latest is None or latest in names else [latest, *names]

    def _verify(self, name: str) -> tuple[Manifest | None, list[str]]:
        """(manifest, what is wrong); each rank reads every num_ranks-th file."""
        folder = self._run_dir / files.FOLDER / name

        def manifest_or_problem() -> Manifest | str:
            try:
                return files.read_manifest(folder)
            except CheckpointError as error:
                return str(error)

        manifest = self._on_first_rank(manifest_or_problem)
        if isinstance(manifest, str):
            return None, [manifest]
        share = dict(list(manifest.files.items())[self._rank :: self._num_ranks])
        problems = self._exchange(files.verify_files(folder, share))
        return manifest, sorted(problem for found in problems for problem in found)

    def _load(self, name: str, manifest: Manifest, passed_over: list[str]) -> LoadedCheckpoint:
        folder = self._run_dir / files.FOLDER / name
        model, optimizer = self._engine.engine.module, self._engine.optimizer
        refuse_other_parameters(folder, manifest.parameters, model)
        shards = [folder / path for path in manifest.files if path.startswith(f"{files.SHARDS}/")]
        try:
            self._agree(lambda: ShardReader(shards).fill(local_pieces(model, optimizer)))
            refresh_weights(optimizer)
            loaded = self._agree(lambda: self._loaded(folder, manifest))
            self._on_first_rank(lambda: self._forget(passed_over, name))
            return loaded
        except _FailedOnARank as failure:
            raise CheckpointError(f"{folder}: {failure}") from None

    def _forget(self, passed_over: list[str], loaded: str) -> None:
        for name in passed_over:
            files.set_aside(self._run_dir, self._work, name)
        if passed_over:
            files.name_latest(self._run_dir, self._work, loaded)

    def _loaded(self, folder: Path, manifest: Manifest) -> LoadedCheckpoint:
        has_rollouts = self._rank == 0 and files.ROLLOUTS in manifest.files
        return LoadedCheckpoint(
            manifest.step,
            safetensors.torch.load((folder / files.LOOP).read_bytes()),
            (folder / files.ROLLOUTS).read_bytes() if has_rollouts else None,
        )

    # --- what one decides, all decide ------------------------------------------------------------------------------
    def _exchange(self, value: T) -> list[T]:
        """Everyone's value, in rank order."""
        values: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _agree(self, action: Callable[[], T]) -> T:
        """What ``action`` returns here, once it has succeeded on every rank.

        Raises:
            _FailedOnARank: on every rank, if a file could not be written or read on one.
            TakenOver: on every rank, if that is why.
        """
        outcome: list[T] = []
        failure = ""
        try:
            outcome.append(action())
        except (OSError, SafetensorError, CheckpointError) as error:
            failure = f"rank {self._rank}: {error}"
        if failures := [other for other in self._exchange(failure) if other]:
            if (successor := self._exchange(self._ownership.lost_to())[0]) is not None:  # one answer for all
                raise TakenOver(successor)
            raise _FailedOnARank("; ".join(failures))
        return outcome[0]

    def _on_first_rank(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on rank 0, which alone runs it."""
        outcome = self._exchange(self._agree(lambda: action() if self._rank == 0 else None))[0]
        return cast(T, outcome)

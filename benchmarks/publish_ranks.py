"""What a rank of `publish.py` does: it publishes in every way in turn, and measures how long it could not train.

A rank holds a real `TrainEngine` under ZeRO-3, with optimizer (but Adam's moments). Ways that broadcast do it to one
more process (`receive`), which keeps a whole copy of the weights, as an inference server does.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from publish_case import MEMCPY, ONE_CONTEXT, OURS, PER_PARAMETER, THREE_AT_ONCE, WAYS, Case, given_up_file, served_file
from torch import Tensor

from asa_dist.rollout.client import RolloutClient
from asa_dist.rollout.cluster import connect, disconnect
from asa_dist.rollout.weights import DTYPES, shard_num_bytes, tensor_specs
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PSI, build_model, named_parts

TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 0.001
SWEPT_BYTES = 2**26  # more than the caches hold: between two publications there is a training step
GO, END = 1, 0
STANDING = ("RssAnon", "RssShmem")  # a process's own memory, and what it shares with Ray's store
Publication = Callable[[], float]  # returns the moment it was served, in seconds of time.monotonic


# --- the receiver of broadcasts ---------------------------------------------------------------------------------
def gloo_pair(folder: Path, rank: int) -> Any:
    """A group of rank 0 of the trainers and the receiver, beside DeepSpeed's: that one knows trainers only."""
    store = dist.FileStore(str(folder / "receiver"), 2)  # type: ignore[attr-defined]
    return dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=TIMEOUT_SECONDS))


def broadcast(group: Any, tensor: Tensor, source: int) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = source
    group.broadcast([tensor], options).wait()


def receive(folder: Path, core: int, shapes: list[tuple[str, tuple[int, ...]]], dtype: str) -> None:
    """Takes all tensors into the same memory, over and over, and answers with the moment it has them."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    group = gloo_pair(folder, 1)
    held = [torch.zeros(shape, dtype=DTYPES[dtype]) for _, shape in shapes]
    order = torch.zeros(1, dtype=torch.int64)
    while True:
        broadcast(group, order, 0)
        if order.item() == END:
            return
        for tensor in held:
            broadcast(group, tensor, 0)
        broadcast(group, torch.tensor([time.monotonic_ns()]), 1)


# --- the ways ---------------------------------------------------------------------------------------------------
class Publisher:
    """All ways of one rank. A way returns when the trainer may write its weights again, and says how to wait."""

    def __init__(self, case: Case, placement: Placement, folder: Path, run_name: str) -> None:
        config = case.config
        self._folder, self._placement = folder, placement
        model = build_model(config, case.vocab_size, case.eos_token_id, on_cuda=False)
        self.engine = TrainEngine(model, config.train, config.optimizer, config.model.dtype, placement)
        self.engine.optimizer.optimizer.state.clear()  # moments, which publishing never touches: room for 500 M
        self._parameters = [p for part, _, p in named_parts(self.engine.engine.module) if part == PSI]
        specs = tensor_specs(self.engine.generator_shapes, placement.num_ranks)
        self.shard_bytes = shard_num_bytes(specs, case.dtype)
        ctypes.CDLL(None).malloc_trim(0)  # else the buffers may take freed memory, which is resident still
        before = resident_bytes()["own_bytes"]
        self.client = RolloutClient(run_name, placement.rank, placement.num_ranks, self.engine.generator_shapes,
                                    case.dtype, TIMEOUT_SECONDS)
        self.standing_bytes = resident_bytes()["own_bytes"] - before  # mostly both buffers
        self._source = torch.ones(self.shard_bytes, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)
        self._pair = gloo_pair(folder, 0) if placement.rank == 0 else None
        self._version = 0
        self.ways: Mapping[str, Callable[[], Publication]] = {
            OURS: self._ours, THREE_AT_ONCE: self._three_at_once, MEMCPY: self._memcpy,
            PER_PARAMETER: self._per_parameter, ONE_CONTEXT: self._one_context}

    def close(self) -> None:
        if self._pair is not None:
            broadcast(self._pair, torch.tensor([END]), 0)
        self.client.close()
        self.engine.close()

    def _ours(self) -> Publication:
        self._version += 1
        self.client.publish(self._version, self.engine.generator_shards())
        return self._when_served

    def _three_at_once(self) -> Publication:
        """Without training in between: the third one waits until the buffer of the first is free."""
        self._ours()
        self._ours()
        return self._ours()

    def _when_served(self) -> float:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (served := served_file(self._folder, self._version)).exists():
            if (given_up := given_up_file(self._folder)).exists():
                raise RuntimeError(f"version {self._version} will not be served: {given_up.read_text()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"version {self._version} was not served within {TIMEOUT_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        return float(served.read_text())

    def _memcpy(self) -> Publication:
        self._target.copy_(self._source)
        return time.monotonic

    def _per_parameter(self) -> Publication:
        self._announce()
        for parameter in self._parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                self._send(parameter)
        return self._when_received

    def _one_context(self) -> Publication:
        self._announce()
        with deepspeed.zero.GatheredParameters(self._parameters):
            for parameter in self._parameters:
                self._send(parameter)
        return self._when_received

    def _announce(self) -> None:
        if self._pair is not None:
            broadcast(self._pair, torch.tensor([GO]), 0)

    def _send(self, parameter: Tensor) -> None:
        if self._pair is not None:
            broadcast(self._pair, parameter.detach(), 0)

    def _when_received(self) -> float:
        received_ns = torch.zeros(1, dtype=torch.int64)
        if self._pair is not None:
            broadcast(self._pair, received_ns, 1)
        return received_ns.item() / 1e9


# --- measuring --------------------------------------------------------------------------------------------------
def measure_on_rank(placement: Placement, folder: Path, case: Case, address: str, run_name: str,
                    turns: int) -> dict[str, Any]:
    """This rank's turns of every way, seconds and bytes."""
    connect(address)
    publisher = Publisher(case, placement, folder, run_name)
    swept = torch.ones(SWEPT_BYTES, dtype=torch.uint8)
    found: dict[str, Any] = {way: [] for way in WAYS}
    in_store = peak_bytes(publisher.ways[OURS])["shared_bytes"]  # later versions come to lie where this one lay
    for turn in range(1 + turns):  # the first one warms up
        for way in rotated(turn):
            comm.barrier()
            swept.add_(1)
            seconds = one_turn(publisher.ways[way])
            if turn:
                found[way].append(seconds)
    memory = {way: peak_bytes(publisher.ways[way]) for way in WAYS}
    memory[OURS] = with_shared(memory[OURS], in_store)
    found = {"turns": found, "memory": memory, "shard_bytes": publisher.shard_bytes,
             "standing_bytes": publisher.standing_bytes, "tensors": len(publisher.engine.generator_shapes)}
    comm.barrier()
    publisher.close()
    disconnect()
    return found


def rotated(turn: int) -> list[str]:
    """So that none always follows the same other one."""
    first = turn % len(WAYS)
    return [*WAYS[first:], *WAYS[:first]]


def one_turn(way: Callable[[], Publication]) -> dict[str, float]:
    """Seconds until this rank may train on, until the version was served, and of CPU until then."""
    comm.barrier()
    started, cpu_started = time.monotonic(), time.process_time()
    publication = way()
    stalled = time.monotonic() - started
    served = publication() - started
    comm.barrier()
    return {"stall_seconds": stalled, "served_seconds": served, "cpu_seconds": time.process_time() - cpu_started}


def peak_bytes(way: Callable[[], Publication]) -> dict[str, int]:
    """The most that this process had, above what it had before, while one version was published and served."""
    comm.barrier()
    with sampled_memory() as most:
        before = dict(most)
        way()()
    comm.barrier()
    return {key: most[key] - before[key] for key in most}


def with_shared(peak: dict[str, int], shared_bytes: int) -> dict[str, int]:
    """At most what both take at the same time: their peaks."""
    return {**peak, "shared_bytes": shared_bytes, "all_bytes": peak["own_bytes"] + shared_bytes}


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """The most of every kind, and of both together, since it began; sampled, so not of a timed turn."""
    most, ended = resident_bytes(), threading.Event()

    def sample() -> None:
        while not ended.wait(POLL_SECONDS):
            now = resident_bytes()
            most.update({key: max(most[key], now[key]) for key in now})

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def resident_bytes() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (int(lines[key].split()[0]) * 1024 for key in STANDING)
    return {"own_bytes": own, "shared_bytes": shared, "all_bytes": own + shared}

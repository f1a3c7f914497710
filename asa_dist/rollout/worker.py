"""A rollout worker: keeps one engine full. `supervisor` makes it a Ray actor.

    while the engine has room    asks for an order; waits for it only if nothing is under way
        load a version           at once, under the responses that are under way
        a lease                  begins it beside the others
        rest                     the GPU is the trainer's for now: sleeps
    while leases are under way   the engine advances, what is finished is delivered

    what goes wrong                              what the worker does
    weights that do not fit, groups refused      loads again, begins again what is under way; three times in a row: ends
    a shard that is not what its rank published  tells the coordinator, goes on with the version it has
    an engine call beyond its deadline           writes the stacks of all its threads, ends
    anything else                                ends, with an error that says where and while doing what

Whatever ends a worker, the supervisor replaces it, and its lease goes to another one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from asa_dist.config import ModelConfig
from asa_dist.records import Lease, Response, RolloutGroup
from asa_dist.rollout.calls import RolloutTimeout, wait_for
from asa_dist.rollout.coordinator import LoadOrder, Refusal, Rest, RolloutFailure
from asa_dist.rollout.engine import NO_VERSION, Engine, EngineStartError, SamplingConfig, WeightLoadError
from asa_dist.rollout.engine_choice import INSTALL_VLLM, chosen_engine, describe_engine
from asa_dist.rollout.spans import SpanLog

MAX_RELOADS_IN_A_ROW = 3
ANSWER_SECONDS = 0.01  # a few times what the coordinator needs to answer, if it has something
SHORTEST_DEADLINE_SECONDS = 0.001  # of a timeout that has passed already

EngineBuilder = Callable[[str, ModelConfig, SamplingConfig], Engine]


class WorkerError(Exception):
    """What ended a worker: host, phase and error, as text, so that it can be sent to the supervisor."""


def build_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> Engine:
    """The engine that ``rollout.engine`` means here, without weights, on this process's device.

    Raises:
        EngineStartError: it cannot be built here.
    """
    num_gpus = sampling.rollout.gpus_per_worker
    device = "cuda" if num_gpus else "cpu"
    if chosen_engine(sampling.rollout) == "vllm":
        from asa_dist.rollout.vllm_engine import VllmEngine

        return VllmEngine(config_folder, model, sampling, device, num_parts=max(num_gpus, 1))
    if num_gpus > 1:  # the config could not know what auto means here
        raise EngineStartError(f"rollout.gpus_per_worker = {num_gpus}: engine hf, which rollout.engine = "
                               f"{sampling.rollout.engine} means here, uses one GPU; {INSTALL_VLLM}")
    from asa_dist.rollout.hf_engine import HfEngine

    return HfEngine(config_folder, model, sampling, device)


def stacks_file(stacks_folder: str, worker_id: str) -> Path:
    """Where a worker that passes a deadline writes its stacks."""
    return Path(stacks_folder, f"{worker_id}.txt")


@dataclass(frozen=True)
class _Held:
    """A lease, and until when its groups have to be delivered."""

    lease: Lease
    deadline_seconds: float  # of time.monotonic
    taken_ns: int  # of time.time_ns


class RolloutWorker:
    """Consumes leases and load orders; delivers groups.

    Args:
        worker_id: unique among all workers the coordinator has ever seen.
        coordinator: its Ray handle.
        config_folder: folder with the model's transformers ``config.json``, readable on this worker's host.
        stacks_folder: of :func:`stacks_file`, in the run folder, shared with the supervisor's host.
        build_engine: makes the engine, in this worker's process.
    """

    def __init__(self, worker_id: str, coordinator: Any, config_folder: str, model: ModelConfig,
                 sampling: SamplingConfig, stacks_folder: str, build_engine: EngineBuilder) -> None:
        self._worker_id = worker_id
        self._coordinator = coordinator
        self._build_engine = functools.partial(build_engine, config_folder, model, sampling)
        self._rollout = sampling.rollout
        self._stacks_path = stacks_file(stacks_folder, worker_id)
        self._stacks: BinaryIO | None = None  # open as long as this worker runs
        self._spans = SpanLog(Path(stacks_folder).parent / "profile", worker_id)
        self._phase = "importing torch"
        self._served_version = NO_VERSION  # what the coordinator is told: NO_VERSION asks for the weights again
        self._reloads_in_a_row = 0
        self._asked: Any = None  # reference of the order that was asked for
        self._held: dict[int, _Held] = {}  # under way, by lease id
        self._postponed: list[Lease] = []  # until the weights have come again

    def run(self) -> None:
        """Works until the coordinator says stop.

        Raises:
            WorkerError: anything that ends this worker.
        """
        try:
            import torch  # before the first heartbeat: loading its libraries can stop all threads for a while

            torch.set_num_threads(self._rollout.threads_per_worker)
            self._phase = "building the engine"
            with self._heartbeats(), self._stacks_open():
                self._work()
        except Exception as error:
            message = f"host {socket.gethostname()}, while {self._phase}: {type(error).__name__}: {error}"
            raise WorkerError(message) from error

    def _work(self) -> None:
        # On a GPU of the trainer's, not before it is this worker's turn: that begins with an order to load.
        engine = None if self._rollout.placement == "shared" else self._built_engine()
        while True:
            # Where one lease comes from there may be another: their prompts are better read together.
            if engine is None or not self._held or (engine.has_room and self._order_has_come(ANSWER_SECONDS)):
                order = self._next_order()
                if order is None:
                    return
                engine = engine or self._built_engine()
                self._follow(engine, order)
            else:
                self._advance(engine)

    def _built_engine(self) -> Engine:
        self._phase = "building the engine"
        with self._deadline(self._rollout.timeout_seconds):
            engine = self._build_engine()
        self._wait_for(self._coordinator.ready.remote(self._worker_id, describe_engine(self._rollout)),
                       "the coordinator to note the engine")
        return engine

    def _order_has_come(self, timeout_seconds: float = 0.0) -> bool:
        import ray

        if self._asked is None:
            self._asked = self._coordinator.lease.remote(self._worker_id, self._served_version)
        return bool(ray.wait([self._asked], timeout=timeout_seconds)[0])

    def _next_order(self) -> Lease | LoadOrder | Rest | None:
        """However long it takes, since an idle worker is no fault, as long as the coordinator answers at all."""
        import ray

        if not self._order_has_come():
            self._phase = "waiting for a lease"
            while not ray.wait([self._asked], timeout=self._rollout.timeout_seconds)[0]:
                self._beat()
        asked, self._asked = self._asked, None
        return self._wait_for(asked, "a lease")

    def _follow(self, engine: Engine, order: Lease | LoadOrder | Rest) -> None:
        if isinstance(order, LoadOrder):
            self._load(engine, order)
        elif isinstance(order, Rest):
            self._phase = "going to sleep"
            self._served_version = NO_VERSION
            with self._deadline(self._rollout.timeout_seconds):
                engine.sleep()
        else:
            self._postponed.append(order)
        if self._served_version != NO_VERSION:
            for lease in self._postponed:
                deadline_seconds = time.monotonic() + self._rollout.lease_timeout_seconds
                self._held[lease.lease_id] = _Held(lease, deadline_seconds, time.time_ns())
                engine.begin(lease.lease_id, lease.prompts)
            self._postponed.clear()

    def _load(self, engine: Engine, order: LoadOrder) -> None:
        from asa_dist.rollout.weights import CorruptShardError, assemble

        version = order.manifest.version
        self._phase = f"loading version {version}"
        shards = self._wait_for(list(order.shard_refs), f"the shards of version {version}")
        try:
            with self._spans.span(self._phase), self._deadline(self._rollout.lease_timeout_seconds):
                engine.load(version, assemble(order.manifest, shards))
            self._served_version = version
        except CorruptShardError as error:
            message = f"{self._worker_id}, host {socket.gethostname()}: {error}"
            self._wait_for(self._coordinator.reject_version.remote(self._worker_id, version, message),
                           f"the coordinator to withdraw version {version}")
        except WeightLoadError as error:
            self._load_again(error)

    def _advance(self, engine: Engine) -> None:
        first = next(iter(self._held.values()))  # the one that is due first
        others = f" and {len(self._held) - 1} more" * (len(self._held) > 1)
        self._phase = f"generating {_place(first.lease)}{others} with version {engine.version}"
        left_seconds = first.deadline_seconds - time.monotonic()
        with self._spans.span(self._phase), self._deadline(self._rollout.lease_timeout_seconds, left_seconds):
            while not (finished := engine.advance()) and not (engine.has_room and self._order_has_come()):
                pass
        refusals = [self._deliver(self._held.pop(lease_id), responses) for lease_id, responses in finished]
        if suspect := [refusal for refusal in refusals if refusal is not None and not refusal.late]:
            engine.drop()  # what the same weights have begun
            self._postponed += [held.lease for held in self._held.values()]
            self._held.clear()
            self._load_again(RuntimeError(f"delivery refused: {suspect[0].reason}"))

    def _deliver(self, held: _Held, responses: Sequence[tuple[Response, ...]]) -> Refusal | None:
        lease = held.lease
        groups = [RolloutGroup(lease.step, lease.first_index + offset, prompt, siblings)
                  for offset, (prompt, siblings) in enumerate(zip(lease.prompts, responses, strict=True))]
        self._phase = f"delivering {_place(lease)}"
        refusal: Refusal | None = self._wait_for(
            self._coordinator.deliver.remote(self._worker_id, lease.lease_id, groups),
            "the coordinator to take the groups")
        self._spans.add(f"lease of {_place(lease)}", held.taken_ns, lease.lease_id)
        if refusal is None:
            self._reloads_in_a_row = 0
        return refusal

    def _load_again(self, problem: Exception) -> None:
        """The weights of this engine are not to be trusted: they come once more, unless that did not help before."""
        self._served_version = NO_VERSION
        self._reloads_in_a_row += 1
        if self._reloads_in_a_row == MAX_RELOADS_IN_A_ROW:
            raise problem

    # --- deadlines ----------------------------------------------------------------------------------------------
    def _wait_for(self, reference: Any, what: str) -> Any:
        return wait_for(reference, self._rollout.timeout_seconds, self._worker_id, what)

    def _beat(self) -> None:
        self._wait_for(self._coordinator.heartbeat.remote(self._worker_id, self._phase),
                       "the coordinator to answer a heartbeat")

    @contextlib.contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Tells the coordinator, from a thread, that this process runs and what it does."""
        ended = threading.Event()
        interval_seconds = min(1.0, self._rollout.heartbeat_timeout_seconds / 10)

        def beat() -> None:
            with contextlib.suppress(RolloutFailure, RolloutTimeout):  # the main thread will find out by itself
                self._beat()
                while not ended.wait(interval_seconds):
                    self._beat()

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    @contextlib.contextmanager
    def _deadline(self, timeout_seconds: float, left_seconds: float | None = None) -> Iterator[None]:
        """If what it encloses takes longer: the stacks of all threads go to a file, and this process ends.

        Args:
            left_seconds: of the timeout; None = all of it.

        Python's watchdog does not need the interpreter, so that it works while an extension holds on to it.
        """
        where = f"host {socket.gethostname()}, {self._worker_id}, while {self._phase}"
        if self._stacks is not None:
            with contextlib.suppress(OSError):  # a full disk costs the headline, not the worker
                self._stacks.seek(0)
                self._stacks.truncate()
                self._stacks.write(f"{where}, deadline {timeout_seconds:g} s:\n".encode())  # the stacks follow, or none
        left_seconds = max(timeout_seconds if left_seconds is None else left_seconds, SHORTEST_DEADLINE_SECONDS)
        faulthandler.dump_traceback_later(left_seconds, exit=True, file=self._stacks or sys.stderr)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def _stacks_open(self) -> Iterator[None]:
        """Opens the file of the stacks; whoever leaves here has dumped none, and leaves no file."""
        with contextlib.suppress(OSError):  # then they go to Ray's log of this process
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_path.open("wb", buffering=0)
        try:
            yield
        finally:
            if self._stacks is not None:
                self._stacks.close()
                with contextlib.suppress(OSError):
                    self._stacks_path.unlink()


def _place(lease: Lease) -> str:
    return f"step {lease.step} from group {lease.first_index}"

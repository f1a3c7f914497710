"""A trainer rank's side of the rollouts: hand in prompts, take groups, publish weights beside training."""

from __future__ import annotations

import contextlib
import copy
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from asa_dist.records import LedgerSnapshot, Prompt, RolloutGroup, WeightManifest
from asa_dist.rollout.calls import RolloutTimeout, timed_out, wait_for
from asa_dist.rollout.coordinator import Republish, RolloutFailure
from asa_dist.rollout.system import COORDINATOR_NAME

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

STATUS_TIMEOUT_SECONDS = 5.0
CLOSE_TIMEOUT_SECONDS = 5.0  # enough to hash and put a shard; nothing is lost if it is not: the run ends anyway
RAY_GRACE_SECONDS = 1.0  # beyond a deadline that Ray itself keeps, where it does


class _DaemonThread:
    """A thread that runs what it is given, in order; whoever waits for a result keeps a deadline of its own.

    For what goes through Ray's store, which has none: a put, a large argument or a large answer never returns from a
    Ray that stands still. A daemon, unlike the threads of an executor, which the interpreter joins when it ends.
    """

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        result: Future[Any] = Future()
        self._waiting.put((task, result))
        return result

    def close(self, timeout_seconds: float) -> None:
        """Forgets what has not begun, and waits for what has."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            task, result = work
            try:
                result.set_result(task())
            except Exception as error:
                result.set_exception(error)


class RolloutClient:
    """One per trainer rank, after :func:`asa_dist.rollout.cluster.connect`; used from one thread.

    Args:
        run_name: of the :class:`RolloutSystem`, which may still be starting.
        names_and_shapes: what is published, in publishing order: ``model.named_parameters()`` of the whole trunk.
        dtype: compute dtype, "float32" or "bfloat16".
        timeout_seconds: deadline of every single wait.
        on_event: called with ("version_corrupt", {version, reason}), from :meth:`take`.

    Every wait raises :class:`RolloutTimeout` after its deadline and :class:`RolloutFailure` if rollouts cannot come.
    """

    def __init__(self, run_name: str, rank: int, num_ranks: int, names_and_shapes: Iterable[tuple[str, Sequence[int]]],
                 dtype: str, timeout_seconds: float, *,
                 on_event: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        from asa_dist.rollout.weights import ShardBuffer, tensor_specs

        self._rank, self._num_ranks = rank, num_ranks
        self._who = f"rank {rank} of {num_ranks}"
        self._timeout_seconds = timeout_seconds
        self._on_event = on_event
        self._tensors, self._dtype = tensor_specs(names_and_shapes, num_ranks), dtype
        self._buffer = ShardBuffer(self._tensors, dtype, rank)
        self._shards: deque[tuple[int, np.ndarray]] = deque(maxlen=2)  # (version, its shard) still in the buffer
        self._coordinator = self._find_coordinator(run_name)
        self._caller, self._publisher = _DaemonThread("call"), _DaemonThread("publish")
        self._publishing: deque[tuple[int, Future[None]]] = deque()  # (version, its offer), oldest first

    # --- rollouts -----------------------------------------------------------------------------------------------
    def submit_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Rank 0: all P prompts of a step, in order."""
        self._wait_for(lambda: self._coordinator.submit_prompts.remote(step, list(prompts)),
                       f"the coordinator to accept the prompts of step {step}")

    def take(self, step: int) -> list[RolloutGroup]:
        """This rank's contiguous share of a step's groups, in order. Raises what publishing raised meanwhile, too."""
        while True:
            self._settle(max_unfinished=len(self._publishing))
            try:
                groups = self._wait_for(lambda: self._coordinator.take.remote(step, self._rank, self._num_ranks),
                                        f"the rollouts of step {step}")
            except RolloutTimeout as error:
                raise RolloutTimeout(f"{error}. Coordinator: {self._status()}") from None
            if not isinstance(groups, Republish):
                return groups
            self._publish_again(groups)

    def snapshot(self) -> LedgerSnapshot:
        """Prompts and finished groups of the steps not yet taken, for a checkpoint."""
        return self._wait_for(lambda: self._coordinator.snapshot.remote(), "the coordinator's snapshot")

    def restore(self, snapshot: LedgerSnapshot, next_step: int) -> None:
        """Puts a snapshot into a fresh coordinator; steps before ``next_step`` count as taken."""
        self._wait_for(lambda: self._coordinator.restore.remote(snapshot, next_step),
                       "the coordinator to restore a snapshot")

    # --- weights ------------------------------------------------------------------------------------------------
    def publish(self, version: int, pieces: Iterable[Tensor]) -> None:
        """Copies this rank's pieces (see :meth:`ShardBuffer.copy_in`) and returns; the rest happens in a thread.

        Waits only if the version before the last is still being published: its buffer is needed. Raises what
        publishing an earlier version raised.
        """
        self._settle(max_unfinished=1)
        shard = self._buffer.copy_in(version, pieces)
        self._shards.append((version, shard))
        self._submit_offer(version, shard)

    def close(self) -> None:
        """Ends the threads, after what they are doing, unless Ray keeps them from that; never raises.

        Published weights last as long as this process.
        """
        self._publisher.close(CLOSE_TIMEOUT_SECONDS)
        self._caller.close(timeout_seconds=0.0)  # nobody waits for an answer any more

    def _publish_again(self, corrupt: Republish) -> None:
        """Hashes and offers a version's shard once more, unless the buffer holds newer ones only.

        Waits for it: no later copy may overwrite the shard meanwhile.
        """
        if self._on_event is not None:
            self._on_event("version_corrupt", {"version": corrupt.version, "reason": corrupt.reason})
        for version, shard in self._shards:
            if version == corrupt.version:
                self._submit_offer(version, shard)
                self._settle(max_unfinished=0)

    def _submit_offer(self, version: int, shard: np.ndarray) -> None:
        self._publishing.append((version, self._publisher.submit(lambda: self._offer(version, shard))))

    def _settle(self, max_unfinished: int) -> None:
        """Waits until at most so many offers are unfinished; raises what a finished one raised."""
        while self._publishing and (len(self._publishing) > max_unfinished or self._publishing[0][1].done()):
            version, offer = self._publishing.popleft()
            self._result(offer, f"its shard of version {version} to be published")

    def _offer(self, version: int, shard: np.ndarray) -> None:
        """Publisher thread: hash, put, offer. A failure also ends the waits of all ranks."""
        import ray

        from asa_dist.rollout.weights import shard_record

        try:
            part = WeightManifest(version, self._dtype, self._tensors, (shard_record(self._rank, shard),))
            wait_for(self._coordinator.offer_shard.remote(part, self._num_ranks, [ray.put(shard)]),
                     self._timeout_seconds, self._who, f"the coordinator to accept its shard of version {version}")
        except Exception as error:
            message = f"version {version} was not published: {type(error).__name__}: {error}"
            self._coordinator.fail.remote(f"{self._who}, host {socket.gethostname()}", message)
            if isinstance(error, RolloutFailure | RolloutTimeout):
                raise
            raise RolloutFailure(f"{self._who}, host {socket.gethostname()}: {message}") from error

    # --- waits --------------------------------------------------------------------------------------------------
    def _wait_for(self, call: Callable[[], Any], what: str) -> Any:
        """The answer to a call of the coordinator."""
        return self._result(self._caller.submit(lambda: self._copy_of_answer(call, what)), what)

    def _copy_of_answer(self, call: Callable[[], Any], what: str) -> Any:
        """No arrays in Ray's store: freeing them while a put hangs would block, with the interpreter's lock held."""
        return copy.deepcopy(wait_for(call(), self._timeout_seconds, self._who, what))

    def _result(self, future: Future[Any], what: str) -> Any:
        try:
            return future.result(self._timeout_seconds + RAY_GRACE_SECONDS)
        except RolloutTimeout:
            raise
        except TimeoutError:
            raise RolloutTimeout(timed_out(self._timeout_seconds, self._who, what)) from None

    def _status(self) -> str:
        try:
            return wait_for(self._coordinator.status.remote(), STATUS_TIMEOUT_SECONDS, self._who, "its status")
        except (RolloutFailure, RolloutTimeout):
            return "does not answer"

    def _find_coordinator(self, run_name: str) -> Any:
        import ray

        deadline_seconds = time.monotonic() + self._timeout_seconds
        while True:
            try:
                return ray.get_actor(COORDINATOR_NAME, namespace=run_name)
            except ValueError:  # not there (yet)
                if time.monotonic() > deadline_seconds:
                    what = f"the coordinator of run {run_name!r}; is its RolloutSystem started?"
                    raise RolloutTimeout(timed_out(self._timeout_seconds, self._who, what)) from None
                time.sleep(0.1)

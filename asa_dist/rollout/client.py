"""A trainer rank's side of the rollouts: hand in prompts, take groups, publish weights beside training."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from asa_dist.records import Prompt, RolloutGroup, WeightManifest
from asa_dist.rollout.calls import RolloutTimeout, wait_for
from asa_dist.rollout.cluster import COORDINATOR_NAME

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class RolloutClient:
    """One per trainer rank, after :func:`asa_dist.rollout.cluster.connect`; used from one thread.

    Args:
        run_name: of the :class:`RolloutSystem`, which may still be starting.
        names_and_shapes: what is published, in publishing order: ``model.named_parameters()`` of the whole trunk.
        dtype: compute dtype, "float32" or "bfloat16".
        timeout_seconds: deadline of every single wait.

    Every wait raises :class:`RolloutTimeout` after its deadline and :class:`RolloutFailure` if rollouts cannot come.
    """

    def __init__(self, run_name: str, rank: int, num_ranks: int, names_and_shapes: Iterable[tuple[str, Sequence[int]]],
                 dtype: str, timeout_seconds: float) -> None:
        from asa_dist.rollout.weights import ShardBuffer, tensor_specs

        self._rank, self._num_ranks = rank, num_ranks
        self._timeout_seconds = timeout_seconds
        self._tensors, self._dtype = tensor_specs(names_and_shapes, num_ranks), dtype
        self._buffer = ShardBuffer(self._tensors, dtype, rank)
        self._coordinator = _find_coordinator(run_name, timeout_seconds)
        self._publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._publishing: deque[tuple[int, Future[None]]] = deque()  # (version, its offer), oldest first

    def submit_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Rank 0: all P prompts of a step, in order."""
        wait_for(self._coordinator.submit_prompts.remote(step, list(prompts)), self._timeout_seconds,
                 f"the coordinator to accept the prompts of step {step}")

    def take(self, step: int) -> list[RolloutGroup]:
        """This rank's contiguous share of a step's groups, in order; their arrays are read-only."""
        groups = self._coordinator.take.remote(step, self._rank, self._num_ranks)
        try:
            return wait_for(groups, self._timeout_seconds,
                            f"the rollouts of step {step} for rank {self._rank} of {self._num_ranks}")
        except RolloutTimeout as error:
            state = wait_for(self._coordinator.status.remote(), self._timeout_seconds, "the coordinator's status")
            raise RolloutTimeout(f"{error}. Coordinator: {state}") from None

    def publish(self, version: int, pieces: Iterable[Tensor]) -> None:
        """Copies this rank's pieces (see :meth:`ShardBuffer.copy_in`) and returns; the rest happens in a thread.

        Waits only if the version before the last is still being published: its buffer is needed.
        """
        self._settle(max_unfinished=1)
        shard = self._buffer.copy_in(version, pieces)
        self._publishing.append((version, self._publisher.submit(self._offer, version, shard)))

    def wait_published(self) -> None:
        """Returns when everything published so far has reached the coordinator; raises what publishing raised."""
        self._settle(max_unfinished=0)

    def close(self) -> None:
        """Ends the publishing thread, after what it is doing; published weights last as long as this process."""
        self._publisher.shutdown()

    def _settle(self, max_unfinished: int) -> None:
        while len(self._publishing) > max_unfinished:
            version, offer = self._publishing.popleft()
            try:
                offer.result(self._timeout_seconds)
            except TimeoutError as error:
                if isinstance(error, RolloutTimeout):
                    raise
                raise RolloutTimeout(f"host {socket.gethostname()}: waited {self._timeout_seconds:g} s for rank "
                                     f"{self._rank}'s shard of version {version} to be published") from None

    def _offer(self, version: int, shard: np.ndarray) -> None:
        """Publisher thread: hash, put, offer. A failure also ends the waits of all ranks."""
        import ray

        from asa_dist.rollout.weights import shard_record

        try:
            part = WeightManifest(version, self._dtype, self._tensors, (shard_record(self._rank, shard),))
            wait_for(self._coordinator.offer_shard.remote(part, self._num_ranks, [ray.put(shard)]),
                     self._timeout_seconds, f"the coordinator to accept rank {self._rank}'s shard of version {version}")
        except Exception as error:
            self._coordinator.fail.remote(f"rank {self._rank}'s publisher", f"version {version}: {error}")
            raise


def _find_coordinator(run_name: str, timeout_seconds: float) -> Any:
    import ray

    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return ray.get_actor(COORDINATOR_NAME, namespace=run_name)
        except ValueError:  # not there (yet)
            if time.monotonic() > deadline:
                raise RolloutTimeout(f"host {socket.gethostname()}: waited {timeout_seconds:g} s for the coordinator "
                                     f"of run {run_name!r}; is its RolloutSystem started?") from None
            time.sleep(0.1)

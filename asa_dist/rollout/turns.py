"""Whose turn it is on GPUs that trainer and workers share (`rollout.placement: shared`).

    ranks     train │ all wait in take ···································· │ train
    workers   sleep │ wake, load the new version, generate, deliver, sleep  │ sleep
                    └ their turn begins with the last rank's take           └ theirs when the last worker sleeps

Plain bookkeeping without waiting; the coordinator is its only caller.
"""

from __future__ import annotations


class Turns:
    """Which ranks wait and which workers are awake. A worker begins asleep: with nothing on the GPU."""

    def __init__(self) -> None:
        self._waiting_ranks: set[int] = set()
        self._num_ranks = 0  # unknown until a rank waits
        self._awake: set[str] = set()  # worker ids
        self._told_to_rest: set[str] = set()

    @property
    def is_workers_turn(self) -> bool:
        return 0 < self._num_ranks == len(self._waiting_ranks)

    @property
    def is_trainers_turn(self) -> bool:
        return not self._awake

    def rank_waits(self, rank: int, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._waiting_ranks.add(rank)

    def rank_goes_on(self, rank: int) -> None:
        self._waiting_ranks.discard(rank)

    def is_awake(self, worker_id: str) -> bool:
        return worker_id in self._awake

    def wakes(self, worker_id: str) -> None:
        self._awake.add(worker_id)

    def told_to_rest(self, worker_id: str) -> None:
        self._told_to_rest.add(worker_id)

    def asks(self, worker_id: str) -> None:
        """A worker asks for an order: one that was told to rest has done so."""
        if worker_id in self._told_to_rest:
            self.lost(worker_id)

    def lost(self, worker_id: str) -> None:
        """It sleeps, or its process has been killed: what it held on the GPU is free."""
        self._awake.discard(worker_id)
        self._told_to_rest.discard(worker_id)

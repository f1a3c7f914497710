"""The coordinator: brings together weights, prompts, the workers that answer them and the ranks that train on them.

A plain asyncio class; `system` makes it a Ray actor. Here is who waits for what; `ledger` knows where every prompt is,
`versions` which weights can be served.

    trainer rank                      Coordinator                              RolloutWorker
    submit_prompts(step) ──────────► waiting bundles ── lease(served version) ──────► generate
    offer_shard(part, ref) ────────► newest complete version ── LoadOrder ──────────► load
    take(step, rank) ◄────────────── finished groups ◄──────────── deliver(lease, groups)
         │ Republish(version) ◄───── a corrupt version is forgotten ◄── reject_version(version)
    supervisor
    overdue() ◄───────────────────── deadlines of leases and heartbeats ◄── heartbeat(phase)

    method            waits for                                        unblocked by
    lease             a newer complete version, or work this worker    offer_shard, submit_prompts, restore, stop,
                      may do (served version ≥ min_version)            release, overdue, deliver, take
    take              all groups of the step, or a version to          deliver, restore, reject_version, fail,
                      publish again                                    stop; on shared GPUs lease, release, overdue
    all others        nothing

Version v = the weights after v steps. A group for step s may be sampled by versions ≥ s − max_policy_age: *admission*,
so that no finished group is ever thrown away for being stale. Who shares GPUs with the ranks works while all of these
wait in `take`: see `turns`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, LedgerSnapshot, Prompt, RolloutGroup, WeightManifest
from asa_dist.rollout.ledger import Ledger
from asa_dist.rollout.ledger import Refusal as Refusal
from asa_dist.rollout.turns import Turns
from asa_dist.rollout.versions import LoadOrder as LoadOrder
from asa_dist.rollout.versions import Republish as Republish
from asa_dist.rollout.versions import Versions

MAX_REJECTIONS = 3  # of one version: whatever corrupts it, publishing it again does not help
LONGEST_UNWATCHED_SECONDS = 1.0  # counted between two calls of overdue()


class RolloutFailure(Exception):
    """Rollouts will not come: a worker failed, or the coordinator was stopped. The message is for the user."""


@dataclass(frozen=True)
class Rest:
    """To a worker that shares its GPU, and has nothing to do: sleep, then ask again."""


@dataclass
class _Heartbeat:
    phase: str
    time: float  # seconds, on the watched clock
    timeout_seconds: float  # until the next one


class _WatchedClock:
    """Seconds that pass only while deadlines are watched: at most one between two calls of :meth:`watch`.

    A process that was stopped (SIGSTOP, a suspended machine) wakes up with every deadline passed, though nobody had a
    chance to be heard. On this clock its pause did not take place.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._watched_at = clock()
        self._seconds = 0.0  # at that time

    def __call__(self) -> float:
        return self._seconds + min(self._clock() - self._watched_at, LONGEST_UNWATCHED_SECONDS)

    def watch(self) -> None:
        self._seconds, self._watched_at = self(), self._clock()


class Coordinator:
    """See the module. Every method is a coroutine of one event loop; nothing here blocks or computes for long.

    Args:
        rollout: what :class:`Ledger` uses, ``placement``, ``heartbeat_timeout_seconds`` and ``timeout_seconds``.
        groups_per_lease: consecutive groups of one step in one lease.
        clock: seconds, monotonic.
    """

    def __init__(self, rollout: RolloutConfig, groups_per_lease: int,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._rollout = rollout
        self._clock = _WatchedClock(clock)
        self._ledger = Ledger(rollout, groups_per_lease, self._clock)
        self._versions = Versions()
        self._turns = Turns() if rollout.placement == "shared" else None
        self._working: set[str] = set()  # workers that have asked for orders, and have not been dismissed
        self._asking: set[str] = set()  # those of them that are waiting for one
        self._changed = asyncio.Condition()
        self._heartbeats: dict[str, _Heartbeat] = {}  # the last one, by worker id
        self._dismissed: dict[str, str] = {}  # why, by worker id
        self._delivered: Counter[str] = Counter()  # leases, by worker id
        self._ready: dict[str, str] = {}  # engine by worker id, until the supervisor has heard of it
        self._failure: str | None = None
        self._stopped = False

    # --- weights ------------------------------------------------------------------------------------------------
    async def offer_shard(self, part: WeightManifest, num_ranks: int, shard_refs: Sequence[Any]) -> None:
        """One rank's shard of a version, which is complete once all ranks' are here; offering again changes nothing.

        Args:
            part: the manifest with this rank's record only.
            shard_refs: its one object reference (in a list: Ray would replace a bare one by its value).

        Raises:
            ValueError: the ranks disagree about what the version contains.
        """
        if self._versions.offer(part, num_ranks, shard_refs):
            await self._notify()

    async def reject_version(self, worker_id: str, version: int, reason: str) -> None:
        """A worker found a corrupt shard: the version is served to nobody until every rank has offered it again.

        Nothing happens if a newer version is complete. Rejected :data:`MAX_REJECTIONS` times, it is a failure.
        """
        times = self._versions.reject(worker_id, version, reason)
        if times >= MAX_REJECTIONS:
            await self.fail(worker_id, f"version {version} arrived corrupt {times} times, at last: {reason}")
        await self._notify()

    # --- work ---------------------------------------------------------------------------------------------------
    async def submit_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """The P prompts of a step, in order; submitting a step again changes nothing.

        Raises:
            ValueError: the step was submitted before with other prompts.
        """
        self._ledger.submit(step, prompts)
        await self._notify()

    async def lease(self, worker_id: str, served_version: int) -> Lease | LoadOrder | Rest | None:
        """The next thing for a worker to do: newer weights before work, work in order, or None = stop.

        :class:`Rest` is for workers that share their GPU with a rank. A worker may ask while it holds leases; it has
        one such call at a time. A lease not delivered within ``lease_timeout_seconds`` goes to another worker; see
        :meth:`overdue`.
        """
        async with self._changed:
            if self._turns is not None:
                self._turns.asks(worker_id)
                self._changed.notify_all()  # it may be the last one to sleep
            while not (self._stopped or worker_id in self._dismissed):
                self._working.add(worker_id)
                self._asking.add(worker_id)
                if (order := self._order_for(worker_id, served_version)) is not None:
                    self._asking.discard(worker_id)
                    return order
                await self._changed.wait()
        return None

    async def deliver(self, worker_id: str, lease_id: int, groups: Sequence[RolloutGroup]) -> Refusal | None:
        """A lease's finished groups, in order. Once refused, they are no longer this worker's."""
        refusal = self._ledger.deliver(worker_id, lease_id, groups)
        if refusal is None:
            self._delivered[worker_id] += 1
        await self._notify()
        return refusal

    async def take(self, step: int, rank: int, num_ranks: int) -> list[RolloutGroup] | Republish:
        """Rank's contiguous slice [rank·P/num_ranks, (rank+1)·P/num_ranks) of a step, in order, once it is complete.

        No rank gets its slice before the last group of the step is finished: until then each of them may be needed to
        publish again. Once all ranks have theirs, the step is forgotten. After a rejected version the answer is, once
        for every rank, a :class:`Republish`; ask again after doing so.

        Raises:
            RolloutFailure: a worker failed or the coordinator was stopped, before or during the wait.
            ValueError: the step was already taken by all ranks.
        """
        async with self._changed:
            if self._turns is None:
                return await self._groups(step, rank, num_ranks)
            self._turns.rank_waits(rank, num_ranks)
            self._changed.notify_all()
            try:
                return await self._groups(step, rank, num_ranks)
            finally:
                self._turns.rank_goes_on(rank)

    async def snapshot(self) -> LedgerSnapshot:
        """The steps not yet taken by all ranks, with their prompts and finished groups: O(open groups)."""
        return self._ledger.snapshot()

    async def restore(self, snapshot: LedgerSnapshot, next_step: int) -> None:
        """Continues from a snapshot; see :meth:`Ledger.restore`.

        Raises:
            ValueError: this coordinator is already in use.
        """
        self._ledger.restore(snapshot, next_step)
        await self._notify()

    # --- workers ------------------------------------------------------------------------------------------------
    async def register(self, worker_id: str) -> None:
        """A worker process is being started: its first heartbeat is due within ``timeout_seconds``.

        Raises:
            ValueError: a worker of this id was dismissed; every process needs an id of its own.
        """
        if worker_id in self._dismissed:
            raise ValueError(f"{worker_id} was dismissed ({self._dismissed[worker_id]}): a new worker needs a new id")
        self._heartbeats[worker_id] = _Heartbeat("starting", self._clock(), self._rollout.timeout_seconds)

    async def heartbeat(self, worker_id: str, phase: str) -> None:
        """A worker is alive; the next heartbeat is due within ``heartbeat_timeout_seconds``."""
        if worker_id not in self._dismissed:
            self._heartbeats[worker_id] = _Heartbeat(phase, self._clock(), self._rollout.heartbeat_timeout_seconds)

    async def ready(self, worker_id: str, engine: str) -> None:
        """A worker has built its engine, and says which."""
        self._ready[worker_id] = engine

    async def newly_ready(self) -> dict[str, str]:
        """The engines, by worker id, of those that were not named here before."""
        found, self._ready = self._ready, {}
        return found

    async def overdue(self) -> dict[str, str]:
        """Workers whose heartbeat or lease is overdue, and why; they are dismissed, as by :meth:`release`.

        To be called about twice a second: deadlines stand still while it is not, because then this process or its
        caller was stopped, and silence proves nothing.
        """
        self._clock.watch()
        now = self._clock()
        reasons = {
            worker_id: f"no heartbeat for {now - last.time:.1f} s, allowed are {last.timeout_seconds:g} s"
            for worker_id, last in self._heartbeats.items() if now - last.time >= last.timeout_seconds}
        for worker_id, lease in self._ledger.expire():
            reasons[worker_id] = (f"step {lease.step} from group {lease.first_index} was not delivered within "
                                  f"rollout.lease_timeout_seconds = {self._rollout.lease_timeout_seconds:g} s")
        for worker_id, reason in reasons.items():
            phase = self._heartbeats[worker_id].phase if worker_id in self._heartbeats else "unknown"
            reasons[worker_id] = f"{reason}; its last phase: {phase}"
            self._dismiss(worker_id, reasons[worker_id])
        if reasons:
            await self._notify()
        return reasons

    async def release(self, worker_id: str, reason: str) -> None:
        """A worker is dead: its leases wait again, in order, and what it still delivers will be refused; a GPU that it
        shared with a rank is free.

        Its id gets no further lease, since a call it made before it died may still be waiting: a new worker, a new id.
        """
        self._dismiss(worker_id, reason)
        if self._turns is not None:
            self._turns.lost(worker_id)
        await self._notify()

    async def delivered_by(self, worker_id: str) -> int:
        """How many leases a worker has delivered, also after its death."""
        return self._delivered[worker_id]

    async def fail(self, who: str, message: str) -> None:
        """A fatal error of a worker, or of a rank that publishes: raised in every present and future :meth:`take`.

        The first one is kept.
        """
        self._failure = self._failure or f"{who} failed: {message}"
        await self._notify()

    async def stop(self) -> None:
        """Every worker's next :meth:`lease` answers None; every :meth:`take` raises."""
        self._stopped = True
        await self._notify()

    async def status(self) -> str:
        """One line for error messages: versions, what every open step waits for, what the workers do."""
        now = self._clock()
        workers = ", ".join(f"{worker_id}: {last.phase} ({now - last.time:.1f} s ago)"
                            for worker_id, last in self._heartbeats.items())
        dismissed = ", ".join(f"{worker_id} ({reason})" for worker_id, reason in list(self._dismissed.items())[-3:])
        return (f"{self._versions.describe()}; {self._ledger.describe()}; heartbeats: {workers or 'none'}; "
                f"dismissed: {len(self._dismissed)}{', at last ' * bool(dismissed)}{dismissed}")

    # --- inside -------------------------------------------------------------------------------------------------
    def _order_for(self, worker_id: str, served_version: int) -> Lease | LoadOrder | Rest | None:
        if self._turns is None:
            return self._weights_or_work(worker_id, served_version)
        if not self._turns.is_awake(worker_id):  # then it serves nothing: only weights can wake it
            if not (self._turns.is_workers_turn and self._ledger.has_work_for(self._versions.newest)):
                return None
            self._turns.wakes(worker_id)
        order = self._weights_or_work(worker_id, served_version)
        if order is None and not self._ledger.holds_lease(worker_id):
            self._turns.told_to_rest(worker_id)
            return Rest()
        return order

    def _weights_or_work(self, worker_id: str, served_version: int) -> Lease | LoadOrder | None:
        # Who holds nothing will ask as soon as it has loaded or delivered.
        takers = self._asking | {worker for worker in self._working if not self._ledger.holds_lease(worker)}
        return (self._versions.order_for(worker_id, served_version)
                or self._ledger.lease(worker_id, served_version, takers))

    async def _groups(self, step: int, rank: int, num_ranks: int) -> list[RolloutGroup] | Republish:
        while True:
            if self._failure or self._stopped:
                raise RolloutFailure(self._failure or f"the coordinator was stopped before step {step} was taken")
            if (republish := self._versions.republish_for(rank)) is not None:
                return republish
            may_go_on = self._turns is None or self._turns.is_trainers_turn
            if may_go_on and (groups := self._ledger.take(step, rank, num_ranks)) is not None:
                self._changed.notify_all()  # the queue may have room again
                return groups
            await self._changed.wait()

    def _dismiss(self, worker_id: str, reason: str) -> None:
        self._dismissed.setdefault(worker_id, reason)
        self._heartbeats.pop(worker_id, None)
        self._ready.pop(worker_id, None)
        self._asking.discard(worker_id)
        self._working.discard(worker_id)
        self._ledger.release(worker_id)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

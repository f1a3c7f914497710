"""The coordinator: which weights are complete, which groups wait for whom.

A plain asyncio class; `cluster` makes it a Ray actor.

    trainer rank                      Coordinator                              RolloutWorker
    submit_prompts(step) ──────────► waiting bundles ── lease(served version) ──────► generate
    offer_shard(part, ref) ────────► newest complete version ── LoadOrder ──────────► load
    take(step, rank) ◄────────────── finished groups ◄──────────── deliver(lease, groups)

    method            waits for                                        unblocked by
    lease             a newer complete version, or work this worker    offer_shard, submit_prompts, release, stop
                      may do (served version ≥ min_version)
    take              this rank's slice of the step                    deliver, fail, stop
    all others        nothing

Version v = the weights after v steps. A group for step s may be sampled by versions ≥ s − max_policy_age: *admission*,
so that no finished group is ever thrown away for being stale.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, Prompt, RolloutGroup, ShardRecord, WeightManifest
from asa_dist.rollout.engine import NO_VERSION


class RolloutFailure(Exception):
    """Rollouts will not come: a worker failed, or the coordinator was stopped. The message is for the user."""


@dataclass(frozen=True)
class LoadOrder:
    """Answer to :meth:`Coordinator.lease`: load this version, then ask again."""

    manifest: WeightManifest
    shard_refs: tuple[Any, ...]  # object references of the shards, in rank order


@dataclass(frozen=True)
class Refusal:
    """Answer to :meth:`Coordinator.deliver`: the groups were not taken."""

    reason: str
    late: bool  # the lease is no longer this worker's: it may forget the groups and go on


@dataclass
class _Step:
    prompts: tuple[Prompt, ...]
    groups: dict[int, RolloutGroup] = field(default_factory=dict)  # by index
    ranks_served: set[int] = field(default_factory=set)


@dataclass
class _PartialVersion:
    """A version of which some ranks' shards have arrived."""

    contents: WeightManifest  # without shards: what all ranks must agree on
    num_ranks: int
    shards: dict[int, tuple[ShardRecord, Any]] = field(default_factory=dict)  # by rank


class Coordinator:
    """See the module. Every method is a coroutine of one event loop; nothing here blocks or computes for long.

    Args:
        rollout: ``max_policy_age`` and ``responses_per_prompt`` are used.
        groups_per_lease: consecutive groups of one step in one engine call.
    """

    def __init__(self, rollout: RolloutConfig, groups_per_lease: int) -> None:
        self._rollout = rollout
        self._groups_per_lease = groups_per_lease
        self._changed = asyncio.Condition()
        self._newest = NO_VERSION
        self._load_order: LoadOrder | None = None  # of the newest complete version
        self._partial: dict[int, _PartialVersion] = {}  # by version
        self._steps: dict[int, _Step] = {}  # submitted, not yet taken by all ranks
        self._last_taken_step = -1
        self._waiting: list[tuple[int, int]] = []  # heap of bundles to lease: (step, first index)
        self._leases: dict[int, tuple[str, Lease]] = {}  # by lease id: (worker id, lease)
        self._next_lease_id = 0
        self._released: set[str] = set()  # ids of dead workers
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
        (record,), (ref,) = part.shards, shard_refs
        if part.version <= self._newest:
            return
        contents = replace(part, shards=())
        partial = self._partial.setdefault(part.version, _PartialVersion(contents, num_ranks))
        if (contents, num_ranks) != (partial.contents, partial.num_ranks):
            raise ValueError(f"version {part.version}: rank {record.rank} of {num_ranks} published other tensors, "
                             f"shapes or dtype than ranks {sorted(partial.shards)} of {partial.num_ranks}")
        partial.shards[record.rank] = (record, ref)
        if len(partial.shards) == num_ranks:
            records, refs = zip(*(partial.shards[rank] for rank in range(num_ranks)), strict=True)
            self._load_order = LoadOrder(replace(contents, shards=records), refs)
            self._newest = part.version
            self._partial = {version: p for version, p in self._partial.items() if version > part.version}
            await self._notify()

    # --- work ---------------------------------------------------------------------------------------------------
    async def submit_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """The P prompts of a step, in order; submitting a step again changes nothing.

        Raises:
            ValueError: the step was submitted before with other prompts.
        """
        if step <= self._last_taken_step:
            return
        if known := self._steps.get(step):
            if [_identity(p) for p in known.prompts] != [_identity(p) for p in prompts]:
                raise ValueError(f"step {step} was submitted twice, with different prompts")
            return
        self._steps[step] = _Step(tuple(prompts))
        for first_index in range(0, len(prompts), self._groups_per_lease):
            heapq.heappush(self._waiting, (step, first_index))
        await self._notify()

    async def lease(self, worker_id: str, served_version: int) -> Lease | LoadOrder | None:
        """The next thing for a worker to do: newer weights before work, work in order, or None = stop."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._dismissed(worker_id) or served_version < self._newest or self._may_lease(served_version))
            if self._dismissed(worker_id):
                return None
            if served_version < self._newest:
                return self._load_order
            step, first_index = heapq.heappop(self._waiting)
            prompts = self._steps[step].prompts[first_index:first_index + self._groups_per_lease]
            lease = Lease(self._next_lease_id, step, first_index, prompts, self._min_version(step))
            self._leases[lease.lease_id] = (worker_id, lease)
            self._next_lease_id += 1
            return lease

    async def deliver(self, worker_id: str, lease_id: int, groups: Sequence[RolloutGroup]) -> Refusal | None:
        """A lease's finished groups, in order. A refusal for what they contain leaves the lease with the worker."""
        holder, lease = self._leases.get(lease_id, (None, None))
        if lease is None or holder != worker_id:
            return Refusal(f"lease {lease_id} is not held by {worker_id}: unknown, or reissued", late=True)
        if (problem := self._problem(lease, groups)) is not None:
            return Refusal(f"lease {lease_id} (step {lease.step}) of {worker_id}: {problem}", late=False)
        del self._leases[lease_id]
        self._steps[lease.step].groups.update({group.index: group for group in groups})
        await self._notify()
        return None

    async def take(self, step: int, rank: int, num_ranks: int) -> list[RolloutGroup]:
        """Rank's contiguous slice [rank·P/num_ranks, (rank+1)·P/num_ranks) of a step, in order.

        Once all ranks have theirs, the step is forgotten.

        Raises:
            RolloutFailure: a worker failed or the coordinator was stopped, before or during the wait.
            ValueError: the step was already taken by all ranks.
        """
        def indices() -> range:
            total = len(self._steps[step].prompts)
            return range(rank * total // num_ranks, (rank + 1) * total // num_ranks)

        def decided() -> bool:
            if self._failure or self._stopped or step <= self._last_taken_step:
                return True
            return step in self._steps and all(index in self._steps[step].groups for index in indices())

        async with self._changed:
            await self._changed.wait_for(decided)
            if self._failure or self._stopped:
                raise RolloutFailure(self._failure or f"the coordinator was stopped before step {step} was taken")
            if step <= self._last_taken_step:
                raise ValueError(f"step {step} was already taken by all {num_ranks} ranks")
            groups = [self._steps[step].groups[index] for index in indices()]
            self._steps[step].ranks_served.add(rank)
            if len(self._steps[step].ranks_served) == num_ranks:
                del self._steps[step]
                self._last_taken_step = step
            return groups

    # --- workers ------------------------------------------------------------------------------------------------
    async def release(self, worker_id: str) -> None:
        """A worker is dead: its leases wait again, in order, and what it still delivers will be refused.

        Its id gets no further lease, since a call it made before it died may still be waiting: a new worker, a new id.
        """
        self._released.add(worker_id)
        for lease_id in [i for i, (holder, _) in self._leases.items() if holder == worker_id]:
            _, lease = self._leases.pop(lease_id)
            heapq.heappush(self._waiting, (lease.step, lease.first_index))
        await self._notify()

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
        """One line for error messages: versions, and what every open step waits for."""
        partial = ", ".join(f"{version} has shards of ranks {sorted(p.shards)} of {p.num_ranks}"
                            for version, p in self._partial.items())
        steps = ", ".join(f"step {number}: {len(step.groups)} of {len(step.prompts)} groups"
                          for number, step in sorted(self._steps.items()))
        leases = ", ".join(f"{worker}: step {lease.step} from group {lease.first_index}"
                           for worker, lease in self._leases.values())
        return (f"newest complete version {self._newest if self._newest != NO_VERSION else 'none'}; "
                f"incomplete versions: {partial or 'none'}; open steps: {steps or 'none'}; leases: {leases or 'none'}")

    # --- inside -------------------------------------------------------------------------------------------------
    def _min_version(self, step: int) -> int:
        return max(step - self._rollout.max_policy_age, 0)

    def _dismissed(self, worker_id: str) -> bool:
        return self._stopped or worker_id in self._released

    def _may_lease(self, served_version: int) -> bool:
        return bool(self._waiting) and served_version >= self._min_version(self._waiting[0][0])

    def _problem(self, lease: Lease, groups: Sequence[RolloutGroup]) -> str | None:
        """Why groups do not answer a lease; None if they do."""
        expected = [(lease.step, lease.first_index + i, *_identity(p)) for i, p in enumerate(lease.prompts)]
        found = [(group.step, group.index, *_identity(group.prompt)) for group in groups]
        if found != expected:
            return f"(step, index, epoch, prompt id) are {found}, leased were {expected}"
        for group in groups:
            where = f"group {group.index} (prompt {group.prompt.prompt_id})"
            if len(group.responses) != self._rollout.responses_per_prompt:
                return f"{where} has {len(group.responses)} responses instead of {self._rollout.responses_per_prompt}"
            if group.oldest_version < lease.min_version:
                return f"{where} was sampled by version {group.oldest_version}, at least {lease.min_version} is needed"
            for sibling, response in enumerate(group.responses):
                for logprob_T in (response.logprob_T, response.behaviour_logprob_T):
                    if len(logprob_T) != len(response.token_ids) or not math.isfinite(np.sum(logprob_T)):
                        return f"{where}, response {sibling}: log-probs that are not finite, or not one per token"
        return None

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _identity(prompt: Prompt) -> tuple[int, int]:
    return prompt.epoch, prompt.prompt_id

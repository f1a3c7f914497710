"""The ledger: every prompt of every open step, and where it is. Nothing is lost, nothing is answered twice.

    submit ──► waiting ──lease──► leased ──deliver──► finished ──step complete: take, by every rank──► forgotten
                  ▲                 │
                  └─────────────────┘ expire · release · a delivery refused for what it contains

Plain bookkeeping without waiting, on a given clock; the coordinator is its only caller.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, LedgerSnapshot, OpenStep, Prompt, RolloutGroup


@dataclass(frozen=True)
class Refusal:
    """To a worker: its groups were not taken, and their prompts are no longer this worker's."""

    reason: str
    late: bool  # the lease was no longer this worker's; False: refused for their content, so the weights are suspect


@dataclass
class _Step:
    prompts: tuple[Prompt, ...]
    groups: dict[int, RolloutGroup] = field(default_factory=dict)  # finished, by index
    ranks_served: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Held:
    """A lease and its holder."""

    worker_id: str
    lease: Lease
    deadline: float  # seconds, on the ledger's clock


class Ledger:
    """Admission, leases, the bounded queue, and who takes what.

    A group for step s is leased only to a worker that serves a version ≥ s − ``max_policy_age``: stale groups are never
    made, so none is thrown away. Bundles are leased in the order of their steps. While finished groups fill
    ``max_queue_bytes``, only the oldest open step is leased: it must be finished for anything to be taken at all. So
    the queue exceeds its bound by at most that step and the leases that were out.

    Args:
        rollout: ``max_policy_age``, ``responses_per_prompt``, ``max_queue_bytes``, ``lease_timeout_seconds`` are used.
        groups_per_lease: consecutive groups of one step in one lease.
        clock: seconds, monotonic.
    """

    def __init__(self, rollout: RolloutConfig, groups_per_lease: int, clock: Callable[[], float]) -> None:
        self._rollout = rollout
        self._groups_per_lease = groups_per_lease
        self._clock = clock
        self._next_step = 0  # all before it were taken by all ranks
        self._steps: dict[int, _Step] = {}  # open: submitted, not yet taken by all ranks
        self._waiting: list[tuple[int, int, int]] = []  # heap of bundles: (step, first index, end index)
        self._leases: dict[int, _Held] = {}  # by lease id
        self._next_lease_id = 0
        self._queue_bytes = 0  # of finished groups in open steps
        self._num_reissued = 0

    def submit(self, step: int, prompts: Sequence[Prompt]) -> None:
        """The P prompts of a step, in order; submitting a step again changes nothing.

        Raises:
            ValueError: the step was submitted before with other prompts.
        """
        if step < self._next_step:
            return
        if known := self._steps.get(step):
            if [_identity(p) for p in known.prompts] != [_identity(p) for p in prompts]:
                raise ValueError(f"step {step} was submitted twice, with different prompts")
            return
        self._open(step, prompts, groups=())

    def lease(self, worker_id: str, served_version: int, workers: Collection[str] = ()) -> Lease | None:
        """The first waiting bundle, if a worker that serves this version may have it; else None.

        Args:
            workers: those that would take one now, or soon. A busier worker leaves a bundle for each of them.
        """
        num_held = Counter(held.worker_id for held in self._leases.values())
        num_idler = sum(num_held[other] < num_held[worker_id] for other in workers)
        num_allowed = sum(served_version >= self._min_version(step) for step, _, _ in self._waiting)
        if num_allowed <= num_idler:
            return None
        step, first_index, end_index = self._waiting[0]
        full = self._queue_bytes >= self._rollout.max_queue_bytes
        if full and step > min(self._steps):
            return None
        heapq.heappop(self._waiting)
        prompts = self._steps[step].prompts[first_index:end_index]
        lease = Lease(self._next_lease_id, step, first_index, prompts, self._min_version(step))
        self._leases[lease.lease_id] = _Held(worker_id, lease, self._clock() + self._rollout.lease_timeout_seconds)
        self._next_lease_id += 1
        return lease

    def has_work_for(self, version: int) -> bool:
        """Whether a bundle waits that this version may answer."""
        return bool(self._waiting) and version >= self._min_version(self._waiting[0][0])

    def holds_lease(self, worker_id: str) -> bool:
        return any(held.worker_id == worker_id for held in self._leases.values())

    def deliver(self, worker_id: str, lease_id: int, groups: Sequence[RolloutGroup]) -> Refusal | None:
        """A lease's finished groups, in order. Refused for what they contain, their prompts wait again."""
        held = self._leases.get(lease_id)
        if held is None or held.worker_id != worker_id:
            return Refusal(f"lease {lease_id} is not held by {worker_id}: unknown, or reissued", late=True)
        if (problem := self._problem_of_answer(held.lease, groups)) is not None:
            self._put_back([lease_id])
            return Refusal(f"lease {lease_id} (step {held.lease.step}) of {worker_id}: {problem}", late=False)
        del self._leases[lease_id]
        self._finish(self._steps[held.lease.step], groups)
        return None

    def expire(self) -> list[tuple[str, Lease]]:
        """Leases whose deadline has passed, with their holders; from now on their prompts wait again."""
        now = self._clock()
        expired = {lease_id: held for lease_id, held in self._leases.items() if held.deadline <= now}
        self._put_back(expired)
        return [(held.worker_id, held.lease) for held in expired.values()]

    def release(self, worker_id: str) -> None:
        """The prompts of all of a worker's leases wait again."""
        self._put_back([lease_id for lease_id, held in self._leases.items() if held.worker_id == worker_id])

    def take(self, step: int, rank: int, num_ranks: int) -> list[RolloutGroup] | None:
        """Rank's contiguous slice [rank·P/num_ranks, (rank+1)·P/num_ranks) of a step, in order.

        None until all P groups are finished: ranks train on a step together, and one that went ahead would wait in a
        collective, where it cannot be asked to publish weights again that the unfinished groups need.
        Once all ranks have theirs, the step is forgotten.

        Raises:
            ValueError: the step was already taken by all ranks.
        """
        if step < self._next_step:
            raise ValueError(f"step {step} was already taken by all {num_ranks} ranks")
        if (open_step := self._steps.get(step)) is None:
            return None
        total = len(open_step.prompts)
        if len(open_step.groups) < total:
            return None
        open_step.ranks_served.add(rank)
        if len(open_step.ranks_served) == num_ranks:
            del self._steps[step]
            self._next_step = step + 1
            self._queue_bytes -= sum(group.nbytes for group in open_step.groups.values())
        return [open_step.groups[index] for index in range(rank * total // num_ranks, (rank + 1) * total // num_ranks)]

    def snapshot(self) -> LedgerSnapshot:
        """The open steps, as a checkpoint keeps them: what is leased counts as waiting."""
        return LedgerSnapshot(self._next_step, tuple(
            OpenStep(number, step.prompts, tuple(group for _, group in sorted(step.groups.items())))
            for number, step in sorted(self._steps.items())))

    def restore(self, snapshot: LedgerSnapshot, next_step: int) -> None:
        """Continues from a snapshot: its finished groups are finished, all other prompts wait; see :meth:`submit`.

        Finished groups that this run would refuse (older than its ``max_policy_age`` allows, another number of
        responses) are made again.

        Args:
            next_step: all steps before it count as taken, whatever the snapshot says.

        Raises:
            ValueError: this ledger is already in use.
        """
        if self._steps or self._next_step:
            raise ValueError("rollouts can only be restored into a new coordinator, before prompts are submitted")
        self._next_step = next_step
        for saved in snapshot.steps:
            if saved.step >= next_step:
                self._open(saved.step, saved.prompts, [g for g in saved.groups if self._problem_of_group(g) is None])

    def describe(self) -> str:
        """For one line of text: what every open step waits for."""
        steps = ", ".join(f"step {number}: {len(step.groups)} of {len(step.prompts)} groups"
                          for number, step in sorted(self._steps.items()))
        leases = ", ".join(f"{held.worker_id}: step {held.lease.step} from group {held.lease.first_index}"
                           for held in self._leases.values())
        return (f"open steps: {steps or 'none'}; leases: {leases or 'none'}; reissued so far: {self._num_reissued}; "
                f"queued: {self._queue_bytes} of {self._rollout.max_queue_bytes} bytes")

    # --- inside -------------------------------------------------------------------------------------------------
    def _open(self, number: int, prompts: Sequence[Prompt], groups: Sequence[RolloutGroup]) -> None:
        step = self._steps[number] = _Step(tuple(prompts))
        self._finish(step, groups)
        missing = [index for index in range(len(prompts)) if index not in step.groups]
        for bundle in _bundles(missing, self._groups_per_lease):
            heapq.heappush(self._waiting, (number, bundle.start, bundle.stop))

    def _finish(self, step: _Step, groups: Sequence[RolloutGroup]) -> None:
        step.groups.update({group.index: group for group in groups})
        self._queue_bytes += sum(group.nbytes for group in groups)

    def _put_back(self, lease_ids: Iterable[int]) -> None:
        for lease_id in lease_ids:
            lease = self._leases.pop(lease_id).lease
            heapq.heappush(self._waiting, (lease.step, lease.first_index, lease.first_index + len(lease.prompts)))
            self._num_reissued += 1

    def _min_version(self, step: int) -> int:
        return max(step - self._rollout.max_policy_age, 0)

    def _problem_of_answer(self, lease: Lease, groups: Sequence[RolloutGroup]) -> str | None:
        """Why groups do not answer a lease; None if they do."""
        expected = [(lease.step, lease.first_index + i, *_identity(p)) for i, p in enumerate(lease.prompts)]
        found = [(group.step, group.index, *_identity(group.prompt)) for group in groups]
        if found != expected:
            return f"(step, index, epoch, prompt id, phrasings) are {found}, leased were {expected}"
        return next((problem for group in groups if (problem := self._problem_of_group(group)) is not None), None)

    def _problem_of_group(self, group: RolloutGroup) -> str | None:
        """Why a group must not be trained on; None if it may."""
        where = f"group {group.index} (prompt {group.prompt.prompt_id})"
        if len(group.responses) != self._rollout.responses_per_prompt:
            return f"{where} has {len(group.responses)} responses instead of {self._rollout.responses_per_prompt}"
        if group.oldest_version < (needed := self._min_version(group.step)):
            return f"{where} was sampled by version {group.oldest_version}, at least {needed} is needed"
        for sibling, response in enumerate(group.responses):
            for logprob_T in (response.logprob_T, response.behaviour_logprob_T):
                if len(logprob_T) != len(response.token_ids) or not math.isfinite(np.sum(logprob_T)):
                    return f"{where}, response {sibling}: log-probs that are not finite, or not one per token"
        return None


def _bundles(indices: Sequence[int], groups_per_lease: int) -> list[range]:
    """Runs of consecutive indices, cut at every multiple of ``groups_per_lease``."""
    bundles: list[range] = []
    for index in indices:
        if bundles and bundles[-1].stop == index and index % groups_per_lease:
            bundles[-1] = range(bundles[-1].start, index + 1)
        else:
            bundles.append(range(index, index + 1))
    return bundles


def _identity(prompt: Prompt) -> tuple[int, int, int]:
    """What makes two prompts the same: their tokens follow from these, the run's data and its seed."""
    return prompt.epoch, prompt.prompt_id, len(prompt.phrasings)

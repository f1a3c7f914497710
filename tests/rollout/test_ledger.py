"""The ledger: leases that expire, the bounded queue, snapshots; and a machine that tries to lose a prompt."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, Prompt, RolloutGroup
from asa_dist.rollout.ledger import Ledger
from asa_dist.rollout.snapshot import dump_snapshot, load_snapshot
from tests.rollout.groups import G, answer, identities, make_prompts

LEASE_SECONDS = 10.0


class FakeClock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def make_ledger(clock: FakeClock | None = None, groups_per_lease: int = 2, max_policy_age: int = 0,
                max_queue_bytes: int = 10**6) -> Ledger:
    rollout = RolloutConfig(max_policy_age=max_policy_age, responses_per_prompt=G, max_queue_bytes=max_queue_bytes,
                            lease_timeout_seconds=LEASE_SECONDS)
    return Ledger(rollout, groups_per_lease, clock or FakeClock())


def finish(ledger: Ledger, version: int, worker_id: str = "w") -> list[tuple[int, int]]:
    """Answers everything that may be leased: [(step, first index)]."""
    done = []
    while (lease := ledger.lease(worker_id, version)) is not None:
        assert ledger.deliver(worker_id, lease.lease_id, answer(lease, version)) is None
        done.append((lease.step, lease.first_index))
    return done


def test_an_expired_lease_waits_again_and_its_late_answer_is_refused() -> None:
    clock = FakeClock()
    ledger = make_ledger(clock)
    ledger.submit(0, make_prompts(0))
    slow = ledger.lease("slow", 0)
    clock.seconds = 1.0
    other = ledger.lease("other", 0)
    assert other.first_index == 2 and ledger.deliver("other", other.lease_id, answer(other, 0)) is None
    clock.seconds = LEASE_SECONDS - 0.1
    assert ledger.expire() == []
    clock.seconds = LEASE_SECONDS
    assert ledger.expire() == [("slow", slow)]
    assert ledger.expire() == []
    refusal = ledger.deliver("slow", slow.lease_id, answer(slow, 0))
    assert refusal.late and "unknown, or reissued" in refusal.reason
    again = ledger.lease("slow", 0)  # a lease like any other: who may have one is not the ledger's business
    assert (again.first_index, again.prompts) == (slow.first_index, slow.prompts) and again.lease_id != slow.lease_id
    assert ledger.deliver("slow", slow.lease_id, answer(slow, 0)).late
    assert ledger.take(0, 1, 2) is None  # though its slice is there
    assert ledger.deliver("slow", again.lease_id, answer(again, 0)) is None
    assert identities(ledger.take(0, 0, 2)) == [(0, 0, 0), (0, 1, 1)]


def test_an_answer_after_its_deadline_counts_if_nobody_else_had_the_work_yet() -> None:
    clock = FakeClock()
    ledger = make_ledger(clock)
    ledger.submit(0, make_prompts(0, 2))
    lease = ledger.lease("w", 0)
    clock.seconds = 2 * LEASE_SECONDS
    assert ledger.deliver("w", lease.lease_id, answer(lease, 0)) is None
    assert ledger.expire() == []


def test_a_full_queue_lets_only_the_oldest_open_step_be_made() -> None:
    ledger = make_ledger(groups_per_lease=2, max_policy_age=4, max_queue_bytes=1)
    for step in range(3):
        ledger.submit(step, make_prompts(step))
    early = ledger.lease("w", 0), ledger.lease("w", 0)  # nothing is queued yet
    ahead = ledger.lease("w", 0)
    assert [(lease.step, lease.first_index) for lease in (*early, ahead)] == [(0, 0), (0, 2), (1, 0)]
    assert ledger.deliver("w", ahead.lease_id, answer(ahead, 0)) is None
    assert sum(group.nbytes for group in answer(ahead, 0)) > 1
    assert ledger.lease("w", 0) is None  # full; the oldest step is out
    ledger.release("w")
    assert finish(ledger, 0) == [(0, 0), (0, 2)]  # but that one may always be made
    assert len(ledger.take(0, 0, 1)) == 4
    assert finish(ledger, 0) == [(1, 2)]
    assert len(ledger.take(1, 0, 1)) == 4
    assert "queued: 0 of 1 bytes" in ledger.describe()
    assert finish(ledger, 0) == [(2, 0), (2, 2)]


def test_a_snapshot_continues_elsewhere_with_other_bundles() -> None:
    ledger = make_ledger(groups_per_lease=1, max_policy_age=2)
    for step in range(3):
        ledger.submit(step, make_prompts(step, 8))
    finish(ledger, 0)
    ledger.take(0, 0, 1)
    ledger.take(1, 0, 2)  # by one of two ranks: still open
    ledger.submit(3, make_prompts(3, 8))
    leases = [ledger.lease("w", 1) for _ in range(8)]
    for index in (1, 4, 5, 6, 7):
        ledger.deliver("w", leases[index].lease_id, answer(leases[index], 1))
    snapshot = ledger.snapshot()
    assert (snapshot.next_step, [step.step for step in snapshot.steps]) == (1, [1, 2, 3])

    restored = make_ledger(groups_per_lease=4, max_policy_age=2)
    restored.restore(snapshot, next_step=2)
    restored.submit(1, make_prompts(1, 8))  # taken
    restored.submit(3, make_prompts(3, 8))  # known
    with pytest.raises(ValueError, match="step 3 was submitted twice, with different prompts"):
        restored.submit(3, make_prompts(4, 8))
    with pytest.raises(ValueError, match="step 1 was already taken"):
        restored.take(1, 1, 2)
    assert identities(restored.take(2, 0, 1)) == [(2, i, 200 + i) for i in range(8)]
    waiting = [restored.lease("w", 1) for _ in range(2)]
    assert [(lease.first_index, len(lease.prompts)) for lease in waiting] == [(0, 1), (2, 2)]
    assert restored.lease("w", 1) is None
    for lease in waiting:
        assert restored.deliver("w", lease.lease_id, answer(lease, 1)) is None
    assert [group.oldest_version for group in restored.take(3, 0, 1)] == [1] * 8
    assert "queued: 0 of " in restored.describe()


def test_restoring_makes_again_what_this_run_would_refuse() -> None:
    ledger = make_ledger(max_policy_age=2)
    for step in range(3):
        ledger.submit(step, make_prompts(step))
    finish(ledger, 0)
    strict = make_ledger(max_policy_age=1)
    strict.restore(ledger.snapshot(), 0)
    assert len(strict.take(0, 0, 1)) == len(strict.take(1, 0, 1)) == 4
    assert strict.take(2, 0, 1) is None  # its groups are two steps old
    assert finish(strict, 1) == [(2, 0), (2, 2)]


def test_phrasings_belong_to_a_prompt() -> None:
    prompts = [replace(prompt, variants=(np.array([7, 8, 9], np.int32),)) for prompt in make_prompts(0)]
    ledger = make_ledger()
    ledger.submit(0, prompts)
    with pytest.raises(ValueError, match="step 0 was submitted twice, with different prompts"):
        ledger.submit(0, make_prompts(0))
    ledger.deliver("w", (lease := ledger.lease("w", 0)).lease_id, answer(lease, 0))
    restored = make_ledger()
    restored.restore(load_snapshot(dump_snapshot(ledger.snapshot())), 0)
    restored.submit(0, prompts)  # known
    assert finish(restored, 0) == [(0, 2)]
    groups = restored.take(0, 0, 1)
    assert [[tokens.tolist() for tokens in group.prompt.phrasings] for group in groups] == [[[1, 2], [7, 8, 9]]] * 4
    assert groups[1].nbytes == 4 * (2 + 3) + G * 12  # one token per response: its id and two log-probs


def test_only_a_new_ledger_can_be_restored() -> None:
    snapshot = make_ledger().snapshot()
    for used in (make_ledger(), make_ledger()):
        used.submit(0, make_prompts(0))
        with pytest.raises(ValueError, match="only be restored into a new coordinator"):
            used.restore(snapshot, 0)
    finish(used, 0)
    used.take(0, 0, 1)
    with pytest.raises(ValueError, match="only be restored into a new coordinator"):
        used.restore(snapshot, 0)


def test_its_size_does_not_depend_on_the_length_of_the_run() -> None:
    clock = FakeClock()
    ledger = make_ledger(clock, max_policy_age=1)
    sizes = []
    for step in range(1000):
        ledger.submit(step, make_prompts(step))
        lost, refused = ledger.lease("w", step), ledger.lease("w", step)
        assert not ledger.deliver("w", refused.lease_id, answer(refused, step, logprob=float("nan"))).late
        clock.seconds += LEASE_SECONDS
        assert ledger.expire() == [("w", lost)]
        finish(ledger, step)
        assert len(ledger.take(step, 0, 1)) == 4
        sizes.append(len(pickle.dumps(vars(ledger))))
    assert sizes[-1] < sizes[0] + 32  # numbers get longer


class Conspiracy:
    """Random calls of several workers and ranks, against a ledger described by a few plain sets and dictionaries."""

    calls: ClassVar = {"submit": 3, "lease": 10, "deliver": 8, "deliver_bad": 1, "deliver_late": 1, "pass_time": 2,
                       "release": 1, "take": 4, "restart": 0.3}  # how often, relative to each other

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.age = self.random.choice([0, 1, 3])
        self.groups_per_lease = self.random.choice([1, 2, 4])
        self.num_ranks = self.random.choice([1, 2])
        self.max_queue_bytes = self.random.choice([1, 400, 10**6])
        self.clock = FakeClock()
        self.ledger = self.new_ledger()
        self.next_step = self.num_submitted = 0
        self.waiting: set[tuple[int, int]] = set()  # (step, first index)
        self.leased: dict[int, tuple[str, int, float, Lease]] = {}  # id: (worker, its version, deadline, lease)
        self.finished: dict[int, dict[int, RolloutGroup]] = {}  # by step, by index
        self.ended: list[tuple[str, Lease]] = []  # leases that are nobody's any more
        self.taken: dict[int, list[RolloutGroup]] = {}  # of next_step, by rank

    def run(self, num_calls: int) -> None:
        for name in self.random.choices(list(self.calls), list(self.calls.values()), k=num_calls):
            getattr(self, name)()
            assert f"queued: {self.queue_bytes} of {self.max_queue_bytes} bytes" in self.ledger.describe()

    # --- the calls ----------------------------------------------------------------------------------------------
    def submit(self) -> None:
        if self.num_submitted > self.next_step + self.age + 1:
            return
        for _ in range(2):  # the second time changes nothing
            self.ledger.submit(self.num_submitted, self.prompts(self.num_submitted))
        self.waiting |= {(self.num_submitted, i)
                         for i in range(0, len(self.prompts(self.num_submitted)), self.groups_per_lease)}
        self.finished[self.num_submitted] = {}
        self.num_submitted += 1

    def lease(self, behind: int | None = None) -> None:
        worker_id = self.any_worker()
        behind = self.random.choice([0, 0, 1, 2, 4]) if behind is None else behind
        version = max(self.next_step - behind, 0)  # version v exists once v steps were taken
        lease = self.ledger.lease(worker_id, version)
        step, first_index = min(self.waiting, default=(10**6, 0))
        has_room = self.queue_bytes < self.max_queue_bytes or step == self.next_step
        if version < step - self.age or not has_room:
            assert lease is None
            return
        assert (lease.step, lease.first_index) == (step, first_index)
        expected = self.prompts(step)[first_index:first_index + self.groups_per_lease]
        assert [p.prompt_id for p in lease.prompts] == [p.prompt_id for p in expected]
        self.waiting.remove((step, first_index))
        self.leased[lease.lease_id] = worker_id, version, self.clock() + LEASE_SECONDS, lease

    def deliver(self) -> None:
        if self.leased:
            worker_id, version, _, lease = self.leased.pop(self.random.choice(list(self.leased)))
            groups = answer(lease, version)
            assert self.ledger.deliver(worker_id, lease.lease_id, groups) is None
            self.finished[lease.step].update({group.index: group for group in groups})
            self.ended.append((worker_id, lease))

    def deliver_bad(self) -> None:
        if self.leased:
            lease_id = self.random.choice(list(self.leased))
            worker_id, version, _, lease = self.leased[lease_id]
            assert not self.ledger.deliver(worker_id, lease_id, answer(lease, version)[1:]).late
            self.wait_again(lease_id)

    def deliver_late(self) -> None:
        if self.ended:
            worker_id, lease = self.random.choice(self.ended)
            assert self.ledger.deliver(worker_id, lease.lease_id, answer(lease, self.next_step)).late

    def pass_time(self) -> None:
        self.clock.seconds += self.random.choice([1.0, 4.0, LEASE_SECONDS])
        expired = [i for i, (_, _, deadline, _) in self.leased.items() if deadline <= self.clock()]
        assert [lease.lease_id for _, lease in self.ledger.expire()] == expired
        for lease_id in expired:
            self.wait_again(lease_id)

    def release(self) -> None:
        worker_id = self.any_worker()
        self.ledger.release(worker_id)
        for lease_id in [i for i, (holder, *_) in self.leased.items() if holder == worker_id]:
            self.wait_again(lease_id)

    def take(self, rank: int | None = None) -> None:
        rank = self.random.randrange(self.num_ranks) if rank is None else rank
        groups = self.ledger.take(self.next_step, rank, self.num_ranks)
        if len(self.finished.get(self.next_step, {})) < len(self.prompts(self.next_step)):
            assert groups is None
            return
        self.taken[rank] = groups
        if len(self.taken) == self.num_ranks:
            whole = [group for _, part in sorted(self.taken.items()) for group in part]
            assert identities(whole) == [
                (self.next_step, i, p.prompt_id) for i, p in enumerate(self.prompts(self.next_step))]
            assert all(self.next_step - group.oldest_version <= self.age for group in whole)
            del self.finished[self.next_step]
            self.taken = {}
            self.next_step += 1

    def restart(self) -> None:
        snapshot = load_snapshot(dump_snapshot(self.ledger.snapshot()))
        assert snapshot.next_step == self.next_step
        self.ledger = self.new_ledger()
        self.ledger.restore(snapshot, self.next_step)
        for lease_id in list(self.leased):
            self.wait_again(lease_id)
        self.ended, self.taken = [], {}  # workers and ranks are new ones, and lease ids count from 0 again

    # --- its state ----------------------------------------------------------------------------------------------
    def new_ledger(self) -> Ledger:
        return make_ledger(self.clock, self.groups_per_lease, self.age, self.max_queue_bytes)

    def prompts(self, step: int) -> list[Prompt]:
        return make_prompts(step, 4 * (1 + step % 2))

    def any_worker(self) -> str:
        return self.random.choice("abc")

    @property
    def queue_bytes(self) -> int:
        return sum(group.nbytes for groups in self.finished.values() for group in groups.values())

    def wait_again(self, lease_id: int) -> None:
        worker_id, _, _, lease = self.leased.pop(lease_id)
        self.waiting.add((lease.step, lease.first_index))
        self.ended.append((worker_id, lease))

    def drain(self) -> None:
        """Whatever happened before: if workers only work, on the newest weights, every submitted step comes."""
        while self.next_step < self.num_submitted:
            step = self.next_step
            while any(waiting_step == step for waiting_step, _ in self.waiting):
                self.lease(behind=0)
            while any(lease.step == step for *_, lease in self.leased.values()):
                self.deliver()
            for rank in range(self.num_ranks):
                self.take(rank)
            assert self.next_step == step + 1


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_repeated_stale_or_out_of_order(seed: int) -> None:
    world = Conspiracy(seed)
    world.run(num_calls=1500)
    assert world.next_step >= 10  # it did get somewhere: the checks stand in `take`
    world.drain()
    assert "queued: 0 of " in world.ledger.describe() and world.ledger.snapshot().steps == ()

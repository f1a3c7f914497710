"""The coordinator as a plain asyncio object: admission, refusals, two ranks, corrupt versions, silent workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, Prompt, Response, RolloutGroup, ShardRecord, WeightManifest
from asa_dist.rollout.coordinator import Coordinator, LoadOrder, Republish, RolloutFailure
from asa_dist.rollout.weights import tensor_specs
from tests.rollout.groups import G, answer, identities, make_prompts, make_response


class FakeClock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def make_coordinator(max_policy_age: int = 0, groups_per_lease: int = 2, clock: FakeClock | None = None,
                     max_queue_bytes: int = 10**6, placement: str = "separate") -> Coordinator:
    rollout = RolloutConfig(placement=placement, max_policy_age=max_policy_age, responses_per_prompt=G,
                            max_queue_bytes=max_queue_bytes, lease_timeout_seconds=50.0, heartbeat_timeout_seconds=30.0,
                            timeout_seconds=100.0)
    return Coordinator(rollout, groups_per_lease, clock or FakeClock())


async def offer(coordinator: Coordinator, version: int, rank: int, num_ranks: int, ref: str) -> None:
    specs = tensor_specs([("w", (3,))], num_ranks)
    part = WeightManifest(version, "float32", specs, (ShardRecord(rank, 12, f"sum {rank}"),))
    await coordinator.offer_shard(part, num_ranks, [ref])


async def publish(coordinator: Coordinator, version: int, num_ranks: int = 1, attempt: str = "ref") -> None:
    for rank in range(num_ranks):
        await offer(coordinator, version, rank, num_ranks, f"{attempt} {version}.{rank}")


async def pending(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Starts a call and checks that it waits."""
    task = asyncio.create_task(call)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


@pytest.mark.parametrize("age", [0, 1, 4])
def test_admission(age: int) -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(age, groups_per_lease=4)
        for step in range(8):
            await coordinator.submit_prompts(step, make_prompts(step))
        served = -1
        for version in range(3):
            task = await pending(coordinator.lease("w", served))  # neither weights nor work for this version
            await publish(coordinator, version)
            assert (await task).manifest.version == version
            served = version
            steps = range(version + age, version + age + 1) if version else range(age + 1)
            for step in steps:  # whatever version ≥ step − age may do, in order, and nothing else
                lease = await coordinator.lease("w", served)
                assert (lease.step, lease.min_version) == (step, max(step - age, 0))
                assert await coordinator.deliver("w", lease.lease_id, answer(lease, served)) is None
    run(scenario())


def test_newest_weights_come_before_work() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(max_policy_age=4)
        await coordinator.submit_prompts(0, make_prompts(0))
        for version in (0, 1):
            await publish(coordinator, version)
        order = await coordinator.lease("w", 0)
        assert isinstance(order, LoadOrder) and order.manifest.version == 1 and order.shard_refs == ("ref 1.0",)
        assert isinstance(await coordinator.lease("w", 1), Lease)
    run(scenario())


def test_a_busy_worker_gets_more_but_leaves_a_bundle_for_each_that_is_less_busy() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(groups_per_lease=1)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0, 4))
        for worker in ("a", "b"):
            assert isinstance(await coordinator.lease(worker, -1), LoadOrder)  # b loads for a while
        leases = [await coordinator.lease("a", 0) for _ in range(3)]
        assert [lease.first_index for lease in leases] == [0, 1, 2]
        more = await pending(coordinator.lease("a", 0))
        assert (await coordinator.lease("b", 0)).first_index == 3
        await coordinator.submit_prompts(1, make_prompts(1, 2))
        await coordinator.deliver("a", 0, answer(leases[0], 0))
        assert not more.done()  # these need another version
        await coordinator.stop()
        assert await more is None
    run(scenario())


def test_nothing_is_left_for_a_worker_that_is_gone_or_has_never_asked() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(groups_per_lease=2)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0, 4))
        for worker in ("a", "b"):
            assert isinstance(await coordinator.lease(worker, -1), LoadOrder)
        await coordinator.register("c")  # takes its time to start
        await coordinator.lease("a", 0)
        more = await pending(coordinator.lease("a", 0))
        await coordinator.release("b", "kill -9")
        assert (await more).first_index == 2
    run(scenario())


def test_a_version_is_complete_when_all_ranks_agree() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        waiting = await pending(coordinator.lease("w", -1))
        specs = tensor_specs([("w", (3,))], 2)
        part = WeightManifest(0, "float32", specs, (ShardRecord(1, 8, "sum 1"),))
        for _ in range(2):  # offering twice is no second rank
            await coordinator.offer_shard(part, 2, ["ref 0.1"])
        assert "0 has shards of ranks [1] of 2" in await coordinator.status()
        for other in (WeightManifest(0, "bfloat16", specs, (ShardRecord(0, 8, "x"),)),
                      WeightManifest(0, "float32", tensor_specs([("v", (3,))], 2), (ShardRecord(0, 8, "x"),))):
            with pytest.raises(ValueError, match="version 0: rank 0 of 2 published other tensors"):
                await coordinator.offer_shard(other, 2, ["bad"])
        assert not waiting.done()
        await publish(coordinator, 0, num_ranks=2)
        order = await waiting
        assert [record.rank for record in order.manifest.shards] == [0, 1]
        assert order.shard_refs == ("ref 0.0", "ref 0.1")
        await publish(coordinator, 0, num_ranks=2)  # late repetition
        assert (await coordinator.status()).startswith("newest complete version 0; incomplete versions: none")
    run(scenario())


def test_two_ranks_take_their_slices_and_the_step_is_forgotten() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(groups_per_lease=1)
        await publish(coordinator, 0)
        second = await pending(coordinator.take(0, 1, 2))  # before the prompts are even there
        for _ in range(2):
            await coordinator.submit_prompts(0, make_prompts(0, 6))
        with pytest.raises(ValueError, match="step 0 was submitted twice, with different prompts"):
            await coordinator.submit_prompts(0, make_prompts(1, 6))
        leases = [await coordinator.lease("w", 0) for _ in range(6)]
        assert [lease.first_index for lease in leases] == list(range(6))
        for lease in reversed(leases):
            assert not second.done()
            await coordinator.deliver("w", lease.lease_id, answer(lease, 0))
        assert [group.index for group in await second] == [3, 4, 5]
        first = await coordinator.take(0, 0, 2)
        assert [(group.index, group.prompt.prompt_id) for group in first] == [(0, 0), (1, 1), (2, 2)]
        assert "open steps: none; leases: none" in await coordinator.status()
        await coordinator.submit_prompts(0, make_prompts(0, 6))  # too late to matter
        assert "open steps: none" in await coordinator.status()
        with pytest.raises(ValueError, match="already taken"):
            await coordinator.take(0, 0, 2)
    run(scenario())


def test_a_dead_workers_leases_are_reissued_in_order() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(max_policy_age=1)
        await publish(coordinator, 0)
        for step in (0, 1, 2):  # step 2 needs version 1
            await coordinator.submit_prompts(step, make_prompts(step))
        lost = [await coordinator.lease("dead", 0) for _ in range(3)]
        last = await coordinator.lease("alive", 0)
        waiting = await pending(coordinator.lease("dead", 0))
        await coordinator.release("dead", "its process ended")
        assert await waiting is None  # a call that a dead worker left behind takes no work
        again = [await coordinator.lease("alive", 0) for _ in range(3)]
        assert [(x.step, x.first_index, x.prompts) for x in again] == [(x.step, x.first_index, x.prompts) for x in lost]
        assert len({lease.lease_id for lease in [*lost, *again, last]}) == 7
        refusal = await coordinator.deliver("dead", lost[0].lease_id, answer(lost[0], 0))
        assert refusal.late and "unknown, or reissued" in refusal.reason
        assert await coordinator.deliver("alive", again[0].lease_id, answer(again[0], 0)) is None
    run(scenario())


def test_refusals() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        for version in (0, 1):
            await publish(coordinator, version)
        await coordinator.submit_prompts(1, make_prompts(1))
        lease = await coordinator.lease("w", 1)
        good = answer(lease, 1)
        for worker, lease_id in (("other", lease.lease_id), ("w", 99)):
            refusal = await coordinator.deliver(worker, lease_id, good)
            assert refusal.late
            assert refusal.reason == f"lease {lease_id} is not held by {worker}: unknown, or reissued"

        def with_response(response: Response) -> list[RolloutGroup]:
            return [good[0], RolloutGroup(1, 1, good[1].prompt, (good[1].responses[0], response))]

        for bad, reason in [
            (with_response(make_response(0)), "group 1 (prompt 101) was sampled by version 0, at least 1 is needed"),
            (with_response(make_response(1, math.nan)), "response 1: log-probs that are not finite"),
            (with_response(make_response(1, -math.inf)), "response 1: log-probs that are not finite"),
            (good[:1], "leased were"), (good[::-1], "leased were"),
            ([good[0], replace(good[1], prompt=replace(good[1].prompt, variants=(np.array([3], np.int32),)))],
             "phrasings) are [(1, 0, 0, 100, 1), (1, 1, 0, 101, 2)], leased were"),
            ([good[0], RolloutGroup(1, 1, Prompt(101, 1, good[1].prompt.token_ids), good[1].responses)], "leased were"),
            ([good[0], RolloutGroup(1, 1, good[1].prompt, good[1].responses[:1])], "1 responses instead of 2"),
        ]:
            refusal = await coordinator.deliver("w", lease.lease_id, bad)
            assert reason in refusal.reason and not refusal.late
            assert (await coordinator.deliver("w", lease.lease_id, good)).late  # it was put back
            again = await coordinator.lease("w", 1)
            assert (again.step, again.first_index, again.prompts) == (1, 0, lease.prompts)
            lease = again
        assert await coordinator.deliver("w", lease.lease_id, good) is None
        assert await coordinator.delivered_by("w") == 1
    run(scenario())


def test_refused_work_goes_to_whoever_waits() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(groups_per_lease=4)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        lease = await coordinator.lease("sick", 0)
        waiting = await pending(coordinator.lease("well", 0))
        assert not (await coordinator.deliver("sick", lease.lease_id, answer(lease, 0, math.nan))).late
        assert (await waiting).prompts == lease.prompts
    run(scenario())


def test_room_in_the_queue_goes_to_whoever_waits() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(max_policy_age=1, groups_per_lease=4, max_queue_bytes=1)
        await publish(coordinator, 0)
        for step in (0, 1):
            await coordinator.submit_prompts(step, make_prompts(step))
        lease = await coordinator.lease("w", 0)
        await coordinator.deliver("w", lease.lease_id, answer(lease, 0))
        waiting = await pending(coordinator.lease("w", 0))
        await coordinator.take(0, 0, 2)
        assert not waiting.done()
        await coordinator.take(0, 1, 2)
        assert (await waiting).step == 1
    run(scenario())


def test_a_corrupt_version_is_published_again_by_every_rank() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        await publish(coordinator, 0, num_ranks=2)
        await coordinator.submit_prompts(0, make_prompts(0))
        assert (await coordinator.lease("w", -1)).shard_refs == ("ref 0.0", "ref 0.1")
        assert isinstance(await coordinator.lease("slow", -1), LoadOrder)
        take = await pending(coordinator.take(0, 0, 2))
        await coordinator.reject_version("w", 0, "checksum of rank 1's shard")
        assert await take == Republish(0, "checksum of rank 1's shard")  # a rank that was waiting
        takes = [await pending(coordinator.take(0, 0, 2))]  # told once
        assert await coordinator.take(0, 1, 2) == Republish(0, "checksum of rank 1's shard")  # one that calls later
        takes.append(await pending(coordinator.take(0, 1, 2)))
        waiting = await pending(coordinator.lease("w", -1))
        assert "newest complete version none" in await coordinator.status()
        assert "version 0 arrived corrupt" in await coordinator.status()

        await offer(coordinator, 0, 1, 2, "new 0.1")
        assert not waiting.done()
        await offer(coordinator, 0, 0, 2, "new 0.0")
        assert (await waiting).shard_refs == ("new 0.0", "new 0.1")
        await coordinator.reject_version("slow", 0, "it speaks of the old shards")
        for _ in range(2):
            lease = await coordinator.lease("w", 0)
            await coordinator.deliver("w", lease.lease_id, answer(lease, 0))
        assert [len(await take) for take in takes] == [2, 2]
    run(scenario())


def test_no_rank_is_ahead_of_a_version_that_must_be_published_again() -> None:
    """The only worker that serves it dies after half of the step, and its successor gets corrupt shards.

    A rank that had its slice by then would wait for the other one in a collective, and never publish again.
    """
    async def scenario() -> None:
        coordinator = make_coordinator()
        await publish(coordinator, 0, num_ranks=2)
        await coordinator.submit_prompts(0, make_prompts(0))
        assert isinstance(await coordinator.lease("old", -1), LoadOrder)
        half = await coordinator.lease("old", 0)
        await coordinator.deliver("old", half.lease_id, answer(half, 0))
        takes = [await pending(coordinator.take(0, rank, 2)) for rank in range(2)]  # the slice of rank 0 is there
        await coordinator.release("old", "its process ended")
        assert isinstance(await coordinator.lease("new", -1), LoadOrder)
        await coordinator.reject_version("new", 0, "torn")
        assert [await take for take in takes] == [Republish(0, "torn")] * 2
        takes = [await pending(coordinator.take(0, rank, 2)) for rank in range(2)]
        await publish(coordinator, 0, num_ranks=2, attempt="again")
        assert (await coordinator.lease("new", -1)).shard_refs == ("again 0.0", "again 0.1")
        rest = await coordinator.lease("new", 0)
        await coordinator.deliver("new", rest.lease_id, answer(rest, 0))
        assert identities([group for take in takes for group in await take]) == [(0, i, i) for i in range(4)]
    run(scenario())


def test_weights_that_are_served_stay_served_while_the_newest_are_corrupt() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator(max_policy_age=1)
        for version in (0, 1):
            await publish(coordinator, version)
            assert (await coordinator.lease("w", version - 1)).manifest.version == version
        await coordinator.submit_prompts(1, make_prompts(1))
        await coordinator.reject_version("w", 1, "torn")
        assert isinstance(await coordinator.lease("w", 0), Lease)  # version 0 may still sample for step 1
        await publish(coordinator, 1, attempt="again")
        assert (await coordinator.lease("w", 0)).shard_refs == ("again 1.0",)
    run(scenario())


def test_a_newer_version_makes_publishing_again_unnecessary() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        await publish(coordinator, 0)
        await coordinator.lease("w", -1)
        await coordinator.reject_version("w", 0, "torn")
        await publish(coordinator, 1)
        take = await pending(coordinator.take(1, 0, 1))
        assert (await coordinator.lease("w", -1)).manifest.version == 1
        await coordinator.reject_version("w", 0, "late news")
        for _ in range(10):
            await asyncio.sleep(0)
        assert not take.done()
        await publish(coordinator, 0, attempt="too late")
        assert (await coordinator.lease("w", -1)).manifest.version == 1
        take.cancel()
    run(scenario())


def test_a_version_that_is_corrupt_three_times_is_a_failure() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        for attempt in range(1, 4):
            await publish(coordinator, 0)
            await coordinator.lease("w", -1)
            await coordinator.reject_version("w", 0, f"checksum {attempt}")
            if attempt < 3:
                assert await coordinator.take(0, 0, 1) == Republish(0, f"checksum {attempt}")
        with pytest.raises(RolloutFailure, match="w failed: version 0 arrived corrupt 3 times, at last: checksum 3"):
            await coordinator.take(0, 0, 1)
    run(scenario())


async def watch(coordinator: Coordinator, clock: FakeClock, seconds: float) -> dict[str, str]:
    """What a supervisor hears in that time."""
    heard: dict[str, str] = {}
    for _ in range(round(2 * seconds)):
        clock.seconds += 0.5
        heard |= await coordinator.overdue()
    return heard


def test_a_worker_that_falls_silent_is_dismissed() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        coordinator = make_coordinator(groups_per_lease=4, clock=clock)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        for worker in ("silent", "alive"):
            await coordinator.register(worker)
        assert await watch(coordinator, clock, 40) == {}  # starting may take longer than a heartbeat
        lease = await coordinator.lease("silent", 0)
        await coordinator.heartbeat("silent", "generating step 0")
        assert "silent: generating step 0 (0.0 s ago)" in await coordinator.status()
        await coordinator.heartbeat("alive", "waiting for a lease")
        idle, stuck = [await pending(coordinator.lease(worker, 0)) for worker in ("alive", "silent")]
        assert await watch(coordinator, clock, 29.5) == {}
        await coordinator.heartbeat("alive", "waiting for a lease")
        reason = "no heartbeat for 30.0 s, allowed are 30 s; its last phase: generating step 0"
        assert await watch(coordinator, clock, 0.5) == {"silent": reason}
        assert await watch(coordinator, clock, 20) == {}  # told once
        assert (await idle).prompts == lease.prompts
        assert await stuck is None and await coordinator.lease("silent", -1) is None
        assert (await coordinator.deliver("silent", lease.lease_id, answer(lease, 0))).late
        assert await coordinator.delivered_by("silent") == 0
        await coordinator.heartbeat("silent", "back")
        status = await coordinator.status()
        assert "back" not in status and f"dismissed: 1, at last silent ({reason})" in status
        with pytest.raises(ValueError, match=r"silent was dismissed .* a new worker needs a new id"):
            await coordinator.register("silent")
    run(scenario())


def test_a_worker_that_never_starts_or_never_delivers_is_dismissed() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        coordinator = make_coordinator(groups_per_lease=2, clock=clock)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        await coordinator.register("unborn")
        assert await watch(coordinator, clock, 99.5) == {}
        assert await watch(coordinator, clock, 0.5) == {
            "unborn": "no heartbeat for 100.0 s, allowed are 100 s; its last phase: starting"}

        lease = await coordinator.lease("hung", 0)
        await coordinator.deliver("hung", lease.lease_id, answer(lease, 0))
        lease = await coordinator.lease("hung", 0)
        for _ in range(5):  # its heartbeat thread goes on
            await coordinator.heartbeat("hung", "generating")
            assert await watch(coordinator, clock, 9.5) == {}
        waiting = await pending(coordinator.lease("new", 0))
        assert await watch(coordinator, clock, 2.5) == {
            "hung": "step 0 from group 2 was not delivered within rollout.lease_timeout_seconds = 50 s; "
                    "its last phase: generating"}
        assert (await waiting).first_index == 2
        assert (await coordinator.deliver("hung", lease.lease_id, answer(lease, 0))).late
        assert await coordinator.lease("hung", 0) is None
        assert await coordinator.delivered_by("hung") == 1
    run(scenario())


def test_nobody_is_overdue_because_the_coordinator_was_stopped() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        coordinator = make_coordinator(clock=clock)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        await coordinator.heartbeat("w", "generating")
        await coordinator.lease("w", 0)
        await watch(coordinator, clock, 10)
        for _ in range(3):  # stopped for an hour, awake for a moment
            clock.seconds += 3600
            assert await coordinator.overdue() == {}
        assert await watch(coordinator, clock, 15) == {}  # 28 s that count
        assert list(await watch(coordinator, clock, 3)) == ["w"]
    run(scenario())


def test_what_is_finished_survives_a_restart() -> None:
    async def scenario() -> None:
        old, new = (make_coordinator(max_policy_age=2) for _ in range(2))
        await publish(old, 0)
        for step in (0, 1, 2):
            await old.submit_prompts(step, make_prompts(step))
        for _ in range(3):  # all of step 0, half of step 1
            lease = await old.lease("w", 0)
            await old.deliver("w", lease.lease_id, answer(lease, 0))
        await old.lease("w", 0)
        await old.take(0, 0, 1)
        snapshot = await old.snapshot()
        assert [(step.step, len(step.groups)) for step in snapshot.steps] == [(1, 2), (2, 0)]

        waiting, take = await pending(new.lease("v", 1)), await pending(new.take(1, 0, 1))
        await new.restore(snapshot, 1)
        leases = [await waiting, *[await new.lease("v", 1) for _ in range(2)]]
        assert [(lease.step, lease.first_index) for lease in leases] == [(1, 2), (2, 0), (2, 2)]
        await new.deliver("v", leases[0].lease_id, answer(leases[0], 1))
        groups = await take
        assert identities(groups) == [(1, i, 100 + i) for i in range(4)]
        assert [group.oldest_version for group in groups] == [0, 0, 1, 1]
        with pytest.raises(ValueError, match="only be restored into a new coordinator"):
            await new.restore(snapshot, 1)
    run(scenario())


def test_failure_and_stop_end_every_wait() -> None:
    async def scenario() -> None:
        coordinator = make_coordinator()
        takes = [await pending(coordinator.take(0, rank, 2)) for rank in range(2)]
        await coordinator.fail("worker-1", "host h, while loading version 3: disk on fire")
        await coordinator.fail("worker-0", "a consequence")
        for call in [*takes, coordinator.take(5, 0, 2)]:
            with pytest.raises(RolloutFailure, match="worker-1 failed: host h, while loading version 3: disk on fire"):
                await call
        coordinator = make_coordinator()
        lease, take = await pending(coordinator.lease("w", -1)), await pending(coordinator.take(0, 0, 1))
        await coordinator.stop()
        assert await lease is None
        with pytest.raises(RolloutFailure, match="stopped before step 0"):
            await take
    run(scenario())

"""Trainer and workers on the same GPUs: never at the same time, whatever happens in between."""

from __future__ import annotations

import asyncio

from asa_dist.records import Lease
from asa_dist.rollout.coordinator import Coordinator, LoadOrder, Rest
from tests.rollout.groups import answer, identities, make_prompts
from tests.rollout.test_coordinator import FakeClock, make_coordinator, pending, publish, run


def make_shared(clock: FakeClock | None = None) -> Coordinator:
    return make_coordinator(groups_per_lease=2, clock=clock, placement="shared")


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_workers_wake_while_all_ranks_wait_and_ranks_go_on_when_all_sleep() -> None:
    async def scenario() -> None:
        coordinator = make_shared()
        await publish(coordinator, 0, num_ranks=2)
        await coordinator.submit_prompts(0, make_prompts(0))
        orders = [await pending(coordinator.lease(worker, -1)) for worker in ("a", "b")]
        first_rank = await pending(coordinator.take(0, 0, 2))
        assert not any(order.done() for order in orders)  # rank 1 still trains
        second_rank = await pending(coordinator.take(0, 1, 2))
        for worker, order in zip(("a", "b"), orders, strict=True):
            assert isinstance(await order, LoadOrder)
            lease = await coordinator.lease(worker, 0)
            assert isinstance(lease, Lease)
            assert await coordinator.deliver(worker, lease.lease_id, answer(lease, 0)) is None
        assert isinstance(await coordinator.lease("a", 0), Rest)
        asleep = await pending(coordinator.lease("a", -1))  # it sleeps
        await settle()
        assert not first_rank.done() and not second_rank.done()  # b is awake
        assert isinstance(await coordinator.lease("b", 0), Rest)
        assert not first_rank.done()  # told to sleep is not yet asleep
        also_asleep = await pending(coordinator.lease("b", -1))
        assert len(identities(await first_rank) + identities(await second_rank)) == 4
        await coordinator.submit_prompts(1, make_prompts(1))
        await publish(coordinator, 1, num_ranks=2)  # ranks may still be busy
        await settle()
        assert not asleep.done() and not also_asleep.done()
        await coordinator.stop()
        assert await asleep is None and await also_asleep is None
    run(scenario())


def test_a_worker_that_has_leases_under_way_is_not_sent_to_sleep() -> None:
    async def scenario() -> None:
        coordinator = make_shared()
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0, 2))
        step = await pending(coordinator.take(0, 0, 1))
        assert isinstance(await coordinator.lease("a", -1), LoadOrder)
        lease = await coordinator.lease("a", 0)
        more = await pending(coordinator.lease("a", 0))
        await coordinator.deliver("a", lease.lease_id, answer(lease, 0))
        assert isinstance(await more, Rest)
        assert not step.done()
    run(scenario())


def test_what_a_dead_worker_held_is_generated_in_the_same_turn() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        coordinator = make_shared(clock)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        step = await pending(coordinator.take(0, 0, 1))
        for worker in ("a", "b"):
            assert isinstance(await coordinator.lease(worker, -1), LoadOrder)
        await coordinator.lease("a", 0)
        second = await coordinator.lease("b", 0)
        await coordinator.deliver("b", second.lease_id, answer(second, 0))
        assert isinstance(await coordinator.lease("b", 0), Rest)
        woken = await pending(coordinator.lease("b", -1))
        await coordinator.release("a", "kill -9")
        assert isinstance(await woken, LoadOrder)  # the very version that it has slept on
        again = await coordinator.lease("b", 0)
        await coordinator.deliver("b", again.lease_id, answer(again, 0))
        assert not step.done()
        await coordinator.release("b", "kill -9")  # asleep for good
        assert len(await step) == 4
    run(scenario())


def test_a_worker_that_hangs_has_its_gpu_until_it_is_killed() -> None:
    async def scenario() -> None:
        clock = FakeClock()
        coordinator = make_shared(clock)
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0, 2))
        step = await pending(coordinator.take(0, 0, 1))
        assert isinstance(await coordinator.lease("a", -1), LoadOrder)
        await coordinator.heartbeat("a", "generating")
        lease = await coordinator.lease("a", 0)
        await coordinator.deliver("a", lease.lease_id, answer(lease, 0))
        while not await coordinator.overdue():  # it is dismissed, and hangs
            clock.seconds += 1.0
        await settle()
        assert not step.done()
        await coordinator.release("a", "kill -9")
        assert len(await step) == 2
    run(scenario())


def test_a_corrupt_version_is_published_again_whoever_is_awake() -> None:
    async def scenario() -> None:
        coordinator = make_shared()
        await publish(coordinator, 0)
        await coordinator.submit_prompts(0, make_prompts(0))
        step = await pending(coordinator.take(0, 0, 1))
        assert isinstance(await coordinator.lease("a", -1), LoadOrder)
        await coordinator.reject_version("a", 0, "a bit fell over")
        assert (await step).version == 0
        assert isinstance(await coordinator.lease("a", -1), Rest)
        woken = await pending(coordinator.lease("a", -1))
        await publish(coordinator, 0, attempt="again")
        await settle()
        assert not woken.done()  # the rank is not back
        await pending(coordinator.take(0, 0, 1))
        assert (await woken).shard_refs == ("again 0.0",)
    run(scenario())

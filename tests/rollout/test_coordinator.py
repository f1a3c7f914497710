"""The coordinator as a plain asyncio object: admission, bundles, refusals, reissue, two ranks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from asa_dist.config import RolloutConfig
from asa_dist.records import Lease, Prompt, Response, RolloutGroup, ShardRecord, WeightManifest
from asa_dist.rollout.coordinator import Coordinator, LoadOrder, RolloutFailure
from asa_dist.rollout.weights import tensor_specs

G = 2


def make_coordinator(max_policy_age: int = 0, groups_per_lease: int = 2) -> Coordinator:
    return Coordinator(RolloutConfig(max_policy_age=max_policy_age, responses_per_prompt=G), groups_per_lease)


def make_prompts(step: int, count: int = 4) -> list[Prompt]:
    return [Prompt(100 * step + i, 0, np.array([1, 2], np.int32)) for i in range(count)]


def make_response(version: int, logprob: float = -1.0) -> Response:
    logprob_T = np.array([logprob], np.float32)
    return Response(np.array([5], np.int32), logprob_T, logprob_T, False, ((0, version),))


def answer(lease: Lease, version: int) -> list[RolloutGroup]:
    return [RolloutGroup(lease.step, lease.first_index + i, prompt, (make_response(version),) * G)
            for i, prompt in enumerate(lease.prompts)]


async def publish(coordinator: Coordinator, version: int, num_ranks: int = 1) -> None:
    for rank in range(num_ranks):
        part = WeightManifest(version, "float32", tensor_specs([("w", (3,))], num_ranks),
                              (ShardRecord(rank, 12, f"sum {rank}"),))
        await coordinator.offer_shard(part, num_ranks, [f"ref {version}.{rank}"])


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
        for lease in reversed(leases[3:]):
            assert not second.done()
            await coordinator.deliver("w", lease.lease_id, answer(lease, 0))
        assert [group.index for group in await second] == [3, 4, 5]
        first = await pending(coordinator.take(0, 0, 2))
        for lease in leases[:3]:
            await coordinator.deliver("w", lease.lease_id, answer(lease, 0))
        assert [(group.index, group.prompt.prompt_id) for group in await first] == [(0, 0), (1, 1), (2, 2)]
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
        await coordinator.release("dead")
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

        async def refused(groups: list[RolloutGroup], worker: str = "w", lease_id: int = lease.lease_id,
                          ) -> tuple[str, bool]:
            refusal = await coordinator.deliver(worker, lease_id, groups)
            return refusal.reason, refusal.late

        def with_response(response: Response) -> list[RolloutGroup]:
            return [good[0], RolloutGroup(1, 1, good[1].prompt, (good[1].responses[0], response))]

        assert await refused(good, worker="other") == ("lease 0 is not held by other: unknown, or reissued", True)
        assert await refused(good, lease_id=99) == ("lease 99 is not held by w: unknown, or reissued", True)
        for bad, reason in [
            (with_response(make_response(0)), "group 1 (prompt 101) was sampled by version 0, at least 1 is needed"),
            (with_response(make_response(1, math.nan)), "response 1: log-probs that are not finite"),
            (with_response(make_response(1, -math.inf)), "response 1: log-probs that are not finite"),
            (good[:1], "leased were"), (good[::-1], "leased were"),
            ([good[0], RolloutGroup(1, 1, Prompt(101, 1, good[1].prompt.token_ids), good[1].responses)], "leased were"),
            ([good[0], RolloutGroup(1, 1, good[1].prompt, good[1].responses[:1])], "1 responses instead of 2"),
        ]:
            found, late = await refused(bad)
            assert reason in found and not late
        assert await coordinator.deliver("w", lease.lease_id, good) is None  # the lease was still the worker's
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

"""Whether a Ray is enough for a run: room for the rollout workers, and bytes from this process to every host and back.

In the Ray that this process is connected to.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from asa_dist.config import RolloutConfig
from asa_dist.rollout.cluster import ClusterError
from asa_dist.rollout.ray_hosts import address_of

NUM_BYTES = 4_000_000  # each way: large enough for the object store


@dataclass(frozen=True)
class RoundTrip:
    """What was found on the hosts that answered."""

    seen: dict[str, Any]  # by host: what ``look`` returned there
    problems: list[str]  # each names the host
    seconds: float  # of the slowest host


def import_ray() -> None:
    """It takes long from a slow disk: for those who have a deadline later."""
    import ray  # noqa: F401


def shortages(rollout: RolloutConfig) -> list[str]:
    """What the rollout workers need and no host, or not enough of them, has for each."""
    import ray

    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    problems = []
    for resource, per_worker in (("CPU", rollout.threads_per_worker), ("GPU", rollout.gpus_per_worker)):
        if per_worker and sum(host.get(resource, 0) // per_worker for host in hosts) < rollout.workers:
            found = [host.get(resource, 0) for host in hosts]
            problems.append(f"{rollout.workers} rollout workers x {per_worker} {resource} need more than the "
                            f"{sum(found):g} {resource} that Ray has, at most {max(found):g} on a host: lower "
                            "rollout.workers")
    return problems


def round_trip(hosts: Iterable[str], look: Callable[[], Any], timeout_seconds: float) -> RoundTrip:
    """To all hosts at the same time.

    Args:
        hosts: names that lead to the addresses at which Ray knows them.
        look: called on every host; what it returns comes back with the bytes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    started = time.monotonic()
    node_ids = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    problems, node_of = [], {}
    for host in hosts:
        try:
            address = address_of(host)
        except ClusterError as error:
            problems.append(str(error))
            continue
        if address in node_ids:
            node_of[host] = node_ids[address]
        else:
            is_there = f"Ray is on {', '.join(sorted(node_ids))}"
            problems.append(f"{host}: no Ray runs there ({is_there}; the name means {address} here)")
    sent = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
    reference = ray.put(sent)
    calls = {
        host: ray.remote(_answer)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
        .remote(reference, look)
        for host, node_id in node_of.items()
    }
    seen: dict[str, Any] = {}
    seconds = 0.0
    for host, call in calls.items():
        left_seconds = max(0.0, started + timeout_seconds - time.monotonic())
        try:
            seen[host], returned = ray.get(call, timeout=left_seconds)
        except ray.exceptions.GetTimeoutError:
            problems.append(
                f"{host}: {NUM_BYTES / 1e6:g} MB did not get there from {socket.gethostname()} and back within "
                f"{timeout_seconds:.0f} s: are all ports open between the two, in both directions?"
            )
        except ray.exceptions.RayError as error:
            problems.append(f"{host}: Ray cannot work there: {str(error).strip().splitlines()[-1]}")
        else:
            seconds = time.monotonic() - started
            if not np.array_equal(sent, returned):
                problems.append(f"{host}: other bytes came back than were sent")
    return RoundTrip(seen, problems, seconds)


def _answer(sent: np.ndarray, look: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    return look(), sent.copy()

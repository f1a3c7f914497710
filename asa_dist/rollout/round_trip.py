"""Whether bytes get from this process to every host of a Ray and back: for the preflight."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BYTES = 4_000_000  # each way: large enough for the object store


@dataclass(frozen=True)
class RoundTrip:
    """What was found on the hosts that answered."""

    seen: dict[str, Any]  # by host: what ``look`` returned there
    problems: list[str]  # each names the host
    seconds: float  # of the slowest host


def round_trip(hosts: Iterable[str], look: Callable[[], Any], timeout_seconds: float) -> RoundTrip:
    """In the Ray that this process is connected to: to all hosts at the same time.

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
        address = _address(host)
        if address in node_ids:
            node_of[host] = node_ids[address]
        else:
            is_there = f"Ray is on {', '.join(sorted(node_ids))}"
            problems.append(f"{host}: no Ray runs there ({is_there}; the name means {address or 'nothing'} here)")
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


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _answer(sent: np.ndarray, look: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    return look(), sent.copy()

"""Whether bytes get from this process to every host of a Ray and back: for the preflight."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asa_dist.runtime.host_facts import HostFacts, look

NUM_BYTES = 4_000_000  # each way: large enough for the object store


@dataclass(frozen=True)
class RoundTrip:
    """What was found on the hosts that answered."""

    facts: list[HostFacts]
    problems: list[str]  # each names the host
    seconds: float  # of the slowest host


def round_trip(addresses: dict[str, str], run_dir: Path, probe: str, timeout_seconds: float) -> RoundTrip:
    """In the Ray that this process is connected to: to all hosts at the same time.

    Args:
        addresses: by host, as Ray knows them.
        probe: see :func:`asa_dist.runtime.host_facts.look`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    started = time.monotonic()
    node_ids = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    problems = [
        f"{host}: no Ray runs there ({address} is not among {', '.join(sorted(node_ids))})"
        for host, address in addresses.items() if address not in node_ids
    ]  # fmt: skip
    sent = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
    reference = ray.put(sent)
    calls = {
        host: ray.remote(_answer)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_ids[address], soft=False))
        .remote(reference, str(run_dir), probe)
        for host, address in addresses.items() if address in node_ids
    }  # fmt: skip
    facts, seconds = [], 0.0
    for host, call in calls.items():
        left_seconds = max(0.0, started + timeout_seconds - time.monotonic())
        try:
            fact, returned = ray.get(call, timeout=left_seconds)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{host}: {NUM_BYTES / 1e6:g} MB did not get there and back within {timeout_seconds:g} s: "
                            "are all ports open between the hosts?")  # fmt: skip
        except ray.exceptions.RayError as error:
            problems.append(f"{host}: Ray cannot work there: {str(error).strip().splitlines()[-1]}")
        else:
            facts.append(fact)
            seconds = time.monotonic() - started
            if not np.array_equal(sent, returned):
                problems.append(f"{host}: other bytes came back than were sent")
    return RoundTrip(facts, problems, seconds)


def _answer(sent: np.ndarray, run_dir: str, probe: str) -> tuple[HostFacts, np.ndarray]:
    return look(Path(run_dir), probe), sent.copy()

"""Before the ranks of a run over several hosts start: does what they need hold everywhere? It takes a minute at most.

    srun python -m asa_dist.preflight --run-dir RUN --ray-address HOST:PORT --rollout-hosts node2

Started as the ranks will be, with the same environment. Every rank tells rank 0 what it finds; rank 0 prints it.

    look      versions, own name, run folder, free disk     every host; those that only generate through Ray
    meet      every rank reaches MASTER_ADDR:MASTER_PORT    a missing rank, a blocked port
    reduce    a sum over all ranks, and their clocks after  gloo, and NCCL if ranks have GPUs
    Ray       4 MB to every other host and back             the token, and ports
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.runtime.host_facts import HostFacts, look, odd_clocks, odd_versions, too_full, unseen
from asa_dist.runtime.stopping import EXIT_BAD_CONFIG, EXIT_FAILED

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its __all__

SHARING_SECONDS = 10.0  # a network file system may be slow to show a new file


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asa_dist.preflight", description="Checks the hosts of a run, before its ranks start."
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder, shared by all hosts")
    parser.add_argument("--ray-address", help="host:port of the run's Ray; without it Ray is not looked at")
    parser.add_argument("--rollout-hosts", nargs="*", default=[], metavar="HOST", help="that only generate")
    parser.add_argument("--gpus", action="store_true", help="ranks have GPUs: NCCL is tried, too")
    parser.add_argument("--needed-bytes", type=int, default=10**9, help="of a checkpoint (default: 1 GB)")
    parser.add_argument("--timeout-seconds", type=float, default=50.0, help="for all of it (default: 50)")
    return parser.parse_args(arguments)


class NotReady(Exception):
    """What this rank cannot go on after; the message names the host."""


@dataclass
class Verdict:
    """What rank 0 prints: a line for each thing looked at."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, is_fine: str, problems: Iterable[str]) -> None:
        found = list(dict.fromkeys(problems))
        self.problems += found
        self.lines.append(f"  {what}: {is_fine if not found else 'NOT as it should be'}")

    def text(self, headline: str, seconds: float) -> str:
        if not self.problems:
            return "\n".join([headline, *self.lines, f"preflight: ready, after {seconds:.1f} s"])
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        listed = [f"  - {problem}" for problem in self.problems]
        return "\n".join([headline, *self.lines, f"preflight: NOT ready, {count}, after {seconds:.1f} s:", *listed])


class Preflight:
    """One rank's part."""

    def __init__(self, options: argparse.Namespace, rank: int, num_ranks: int) -> None:
        self._options, self._rank, self._num_ranks = options, rank, num_ranks
        self._host = socket.gethostname()
        self._started = time.monotonic()
        self._verdict = Verdict()

    def run(self) -> int:
        """Exit code: 0 ready; 1 not, on every rank."""
        try:
            store = self._meet()
            probe = self._shared_probe(store)
            found = self._look(store, probe)
            self._reduce(store)
            self._try_ray(store, probe, found)
            return self._end(store, probe, found)
        except NotReady as error:
            print(f"asa: preflight: rank {self._rank}: {error}", file=sys.stderr, flush=True)
            return EXIT_FAILED

    # --- the parts -----------------------------------------------------------------------------------------------
    def _meet(self) -> PrefixStore:
        """All ranks at rank 0's store."""
        from asa_dist.runtime.rendezvous import open_store

        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store = open_store("preflight", self._rank, self._num_ranks, self._timeout())
        except Exception as error:  # torch has no class of its own for it
            raise NotReady(
                f"{self._host} does not reach rank 0 at {where}: {str(error).splitlines()[0]}. Is the port open "
                "between the hosts, and does the name lead to the right address?"
            ) from None
        store.set(f"host/{self._rank}", self._host)
        if self._rank == 0:
            self._wait_for_all(store, "host", "did not come")
        return store

    def _shared_probe(self, store: PrefixStore) -> str:
        if self._rank == 0:
            store.set("probe", f".preflight-{secrets.token_hex(4)}")
        return store.get("probe").decode()

    def _look(self, store: PrefixStore, probe: str) -> list[HostFacts]:
        """Of every rank's host, on rank 0; empty on the others."""
        self._tell(store, "facts", asdict(look(self._options.run_dir, probe)))
        return [HostFacts(**facts) for facts in self._hear(store, "facts")]

    def _reduce(self, store: PrefixStore) -> None:
        problem, unix_seconds, seconds = self._summed(store)
        self._tell(store, "reduce", {"host": self._host, "problem": problem, "unix_seconds": unix_seconds})
        told = self._hear(store, "reduce")
        if self._rank == 0:
            problems = [reported["problem"] for reported in told if reported["problem"]]
            backends = "gloo and NCCL" if self._options.gpus else "gloo"
            self._verdict.add("all-reduce", f"{backends}, {self._num_ranks} ranks, {seconds:.2f} s", problems)
            if not problems:
                clocks = {reported["host"]: reported["unix_seconds"] for reported in told}
                spread = max(clocks.values()) - min(clocks.values())
                self._verdict.add("clocks", f"within {max(spread, 0.01):.2f} s", odd_clocks(clocks))

    def _summed(self, store: PrefixStore) -> tuple[str, float, float]:
        """(what went wrong, the clock right after, seconds)."""
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        started = time.monotonic()
        for backend in ("gloo", "nccl")[: 1 + self._options.gpus]:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
            try:
                dist.init_process_group(
                    backend, store=PrefixStore(backend, store), rank=self._rank, world_size=self._num_ranks,
                    timeout=datetime.timedelta(seconds=self._timeout()))  # fmt: skip
                total = torch.tensor([float(self._rank + 1)], device=device)
                dist.all_reduce(total)
                is_right = total.item() == self._num_ranks * (self._num_ranks + 1) / 2
                unix_seconds = time.time()
                dist.destroy_process_group()
            except RuntimeError as error:
                said = str(error).strip().splitlines()[0]
                return (
                    f"{self._host}: no all-reduce with {backend}: {said}. Are all ports open between the hosts, and is "
                    "the network interface the right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
                ), 0.0, 0.0
            if not is_right:
                return f"{self._host}: all-reduce with {backend} gives a wrong sum", 0.0, 0.0
        return "", unix_seconds, time.monotonic() - started

    def _try_ray(self, store: PrefixStore, probe: str, found: list[HostFacts]) -> None:
        """Rank 0 to every other host; every rank to the Ray of its own host. Adds facts of hosts that only generate."""
        if not self._options.ray_address:
            return
        from asa_dist.rollout.cluster import ClusterError, connect, disconnect
        from asa_dist.rollout.round_trip import NUM_BYTES, round_trip

        problem = ""
        try:
            connect(self._options.ray_address)
        except ClusterError as error:
            problem = f"{self._host}: {error}"
        self._tell(store, "ray", problem)
        problems = [told for told in self._hear(store, "ray") if told]
        if self._rank == 0:
            trip = None
            if not problem:
                addresses = {fact.host: fact.address for fact in found if fact.host != self._host}
                addresses |= {host: socket.gethostbyname(host) for host in self._options.rollout_hosts}
                trip = round_trip(addresses, self._options.run_dir, probe, self._timeout())
                problems += trip.problems
                known = {fact.host for fact in found}
                found += [fact for fact in trip.facts if fact.host not in known]
            seconds = f", {trip.seconds:.2f} s" if trip else ""
            self._verdict.add("Ray", f"{NUM_BYTES / 1e6:g} MB to every host and back{seconds}", problems)
        disconnect()

    def _end(self, store: PrefixStore, probe: str, found: list[HostFacts]) -> int:
        """Rank 0 prints the verdict; all ranks end with it."""
        if self._rank == 0:
            run_dir, verdict = self._options.run_dir, self._verdict
            hosts = list(dict.fromkeys(fact.host for fact in found))
            verdict.add("hosts", ", ".join(hosts), (problem for fact in found for problem in fact.problems))
            versions = ", ".join(f"{name} {number}" for name, number in found[0].versions.items() if number)
            verdict.add("versions", versions, odd_versions(found))
            writers = [fact.host for fact in found if fact.free_bytes >= 0]
            verdict.add("run folder", f"{run_dir}, shared by all", _once_seen(
                lambda: unseen(run_dir, probe, writers)))  # fmt: skip
            least = min((fact.free_bytes for fact in found if fact.free_bytes >= 0), default=0)
            verdict.add("free disk", f"{least / 1e9:.1f} GB", too_full(found, self._options.needed_bytes))
            for path in run_dir.glob(f"{probe}.*") if run_dir.is_dir() else ():
                path.unlink(missing_ok=True)
            headline = f"preflight of {self._num_ranks} ranks on {len(hosts)} hosts"
            print(verdict.text(headline, time.monotonic() - self._started), flush=True)
            store.set("verdict", json.dumps(bool(verdict.problems)))
        is_bad = json.loads(store.get("verdict"))
        self._tell(store, "end", True)
        self._hear(store, "end")  # rank 0 serves the store: it is the last to leave
        return EXIT_FAILED if is_bad else 0

    # --- telling each other --------------------------------------------------------------------------------------
    def _timeout(self) -> float:
        """Seconds that are left."""
        return max(1.0, self._started + self._options.timeout_seconds - time.monotonic())

    def _tell(self, store: PrefixStore, what: str, value: Any) -> None:
        store.set(f"{what}/{self._rank}", json.dumps(value))

    def _hear(self, store: PrefixStore, what: str) -> list[Any]:
        """Rank 0: what every rank told; nothing on the others."""
        if self._rank != 0:
            return []
        self._wait_for_all(store, what, f"came, but then was silent ({what})")
        return [json.loads(store.get(f"{what}/{rank}")) for rank in range(self._num_ranks)]

    def _wait_for_all(self, store: PrefixStore, what: str, complaint: str) -> None:
        while missing := [rank for rank in range(self._num_ranks) if not store.check([f"{what}/{rank}"])]:
            if time.monotonic() > self._started + self._options.timeout_seconds:
                raise NotReady(
                    f"{', '.join(self._name(store, rank) for rank in missing)} {complaint} within "
                    f"{self._options.timeout_seconds:g} s; there are: "
                    f"{', '.join(self._name(store, rank) for rank in range(self._num_ranks) if rank not in missing)}. "
                    "Is that host up, and MASTER_PORT open between the hosts?"
                )
            time.sleep(0.1)

    def _name(self, store: PrefixStore, rank: int) -> str:
        """For people: the host, too, as far as it is known."""
        host = store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else _slurm_host(rank)
        return f"rank {rank}" + (f" ({host})" if host else "")


def _slurm_host(rank: int) -> str:
    """Of a rank that has not come: its host by SLURM's numbering, if that is to be had."""
    hosts = os.environ.get("ASA_TRAINER_HOSTS", "").split()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return hosts[rank // per_host] if rank // per_host < len(hosts) else ""


def _once_seen(look_again: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + SHARING_SECONDS
    while (problems := look_again()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 ready, 1 not, 2 not started as ranks are."""
    options = parse_arguments(arguments)
    from asa_dist.runtime.rendezvous import follow_slurm

    try:
        follow_slurm()
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except KeyError as error:
        print(f"asa: preflight: {error} is not set: start it as the ranks are", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return Preflight(options, rank, num_ranks).run()


if __name__ == "__main__":
    sys.exit(main())

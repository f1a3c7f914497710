"""Before the ranks of a run over several hosts start: does what they need hold everywhere?

    srun python -m asa_dist.preflight CONFIG --run-dir RUN --ray-address HOST:PORT --rollout-hosts node2

Started as the ranks will be, with the same environment. Every rank tells rank 0 what it finds; rank 0 prints it, a
minute after all of them have met at the latest.

    meet      every rank reaches MASTER_ADDR:MASTER_PORT    a missing rank, a blocked port
    look      versions, own name, run folder, free disk     every host; those that only generate through Ray
    reduce    a sum over all ranks, and their clocks after  gloo, and NCCL if ranks have GPUs
    Ray       4 MB to every other host and back             the token, ports, and room for the rollout workers

What one part finds wrong with a host's name, its GPUs or the network, the next ones would only blame on others: then
they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.runtime.host_facts import HostFacts, Verdict, look, odd_clocks
from asa_dist.runtime.stopping import EXIT_BAD_CONFIG, EXIT_ENDED_EARLY, EXIT_FAILED

if TYPE_CHECKING:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its __all__

BYTES_PER_PARAMETER = 12  # of a checkpoint: weight and Adam's two moments, float32 (``parameter_state.KINDS``)
END_SECONDS = 5.0  # for the others to hear the end of it


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asa_dist.preflight", description="Checks the hosts of a run, before its ranks start."
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder, shared by all hosts")
    parser.add_argument("--ray-address", help="host:port of the run's Ray; without it Ray is not looked at")
    parser.add_argument("--rollout-hosts", nargs="*", default=[], metavar="HOST", help="that only generate")
    parser.add_argument("--start-timeout-seconds", type=float, default=120.0,
                        help="for all ranks to meet: some import for longer than others (default: 120)")  # fmt: skip
    parser.add_argument("--timeout-seconds", type=float, default=50.0, help="for all the rest (default: 50)")
    return parser.parse_intermixed_args(arguments)


class NotReady(Exception):
    """What this rank cannot go on after; the message names the host. Empty: rank 0 says it."""


class Preflight:
    """One rank's part."""

    def __init__(self, options: argparse.Namespace, config: Config, rank: int, num_ranks: int) -> None:
        self._options, self._config, self._rank, self._num_ranks = options, config, rank, num_ranks
        self._host = socket.gethostname()
        self._started = time.monotonic()
        self._timeout_seconds = self._deadline = 0.0  # see _start_clock
        self._needed_bytes = 0  # by a checkpoint; rank 0 counts them
        self._verdict = Verdict()

    def run(self) -> int:
        """Exit code, on every rank: 0 ready; 1 not, by the verdict; 75 somebody did not come, or went."""
        self._load()
        from torch.distributed import DistError

        try:
            store = self._meet()
            probe = self._from_first(store, "probe", f".preflight-{secrets.token_hex(4)}")
            self._start_clock(self._options.timeout_seconds)
            try:
                return self._judge(store, probe)
            finally:
                self._remove(probe)
        except NotReady as error:
            problem = str(error)
        except DistError as error:
            problem = f"{self._host}: rank 0 is gone ({_first_line(error)}): what does it say?"
        if problem:
            print(f"asa: preflight: rank {self._rank}: {problem}", file=sys.stderr, flush=True)
        return EXIT_ENDED_EARLY  # a host that did not come may come the next time

    def _judge(self, store: PrefixStore, probe: str) -> int:
        found = self._look(store, probe)
        is_fine = self._from_first(store, "hosts", not any(fact.problems for fact in found))
        if is_fine and self._reduce(store):
            found += self._try_ray(store, probe, found)
        return self._end(store, probe, found)

    # --- the parts -----------------------------------------------------------------------------------------------
    def _load(self) -> None:
        """What takes long from a slow disk, for which no host is to blame: before any clock starts."""
        import torch.distributed  # noqa: F401

        from asa_dist.rollout.round_trip import import_ray

        if self._options.ray_address:
            import_ray()
        if self._rank == 0:
            self._needed_bytes = self._checkpoint_bytes()

    def _meet(self) -> PrefixStore:
        """All ranks at rank 0's store."""
        from asa_dist.runtime.rendezvous import open_store

        self._start_clock(self._options.start_timeout_seconds)
        name, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            if self._rank != 0:
                self._wait_for_port(name, int(port))
            store = open_store("preflight", self._rank, self._num_ranks, self._seconds_left())
        except Exception as error:  # torch has no class of its own for it
            failed = "cannot listen at" if self._rank == 0 else "does not reach rank 0 at"
            raise NotReady(
                f"{self._host} {failed} {name}:{port}: {_first_line(error)}. Has rank 0 started there, is that port "
                f"open to {self._host}, and does the name lead to the right address?"
            ) from None
        store.set(f"host/{self._rank}", self._host)
        if self._rank == 0:
            address = socket.gethostbyname(name)
            where = f"{name}:{port}" if address == name else f"{name}:{port}, here {address}"
            self._wait_for_all(store, "host", f"did not come to {where},")
        else:  # anew: rank 0's clock is the first to run out, for it knows who is missing
            self._start_clock(self._options.start_timeout_seconds)
        return store

    def _wait_for_port(self, host: str, port: int) -> None:
        """Raises OSError; torch would, too, but with pages of C++."""
        while True:
            try:
                return socket.create_connection((host, port), timeout=min(5.0, self._seconds_left())).close()
            except OSError:
                if self._seconds_left() <= 1.0:
                    raise
                time.sleep(0.2)

    def _look(self, store: PrefixStore, probe: str) -> list[HostFacts]:
        """Of every rank's host, on rank 0; empty on the others."""
        facts = self._look_here(probe)()
        if self._config.train.gpus:
            facts.problems.extend(self._missing_gpu())
        return [HostFacts(**told) for told in self._tell(store, "a look at its host", asdict(facts))]

    def _look_here(self, probe: str) -> Callable[[], HostFacts]:
        from asa_dist.rollout.ray_hosts import TEMP_FOLDER

        return partial(look, self._options.run_dir, probe, TEMP_FOLDER)

    def _missing_gpu(self) -> Iterable[str]:
        import torch

        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            yield (
                f"{self._host}: local rank {local_rank} finds {num_gpus} GPUs: start as many ranks as there are GPUs "
                "for them, or set train.gpus to 0"
            )

    def _reduce(self, store: PrefixStore) -> bool:
        """Whether the network is fine, on every rank."""
        problem, unix_seconds, seconds = self._summed(store)
        told = self._tell(store, "the all-reduce", [self._host, problem, unix_seconds])
        failed = {host: problem for host, problem, _ in told if problem}
        if self._rank == 0:
            problems = [f"{', '.join(failed)}: {next(iter(failed.values()))}"] if failed else []
            backends = "gloo and NCCL" if self._config.train.gpus else "gloo"
            self._verdict.add("all-reduce", f"{backends}, {self._num_ranks} ranks, {seconds:.2f} s", problems)
            if not failed:
                clocks = {host: unix_seconds for host, _, unix_seconds in told}
                spread = max(clocks.values()) - min(clocks.values())
                self._verdict.add("clocks", f"within {max(spread, 0.01):.2f} s", odd_clocks(clocks))
        return bool(self._from_first(store, "network", not failed))

    def _summed(self, store: PrefixStore) -> tuple[str, float, float]:
        """(what went wrong, the clock right after, seconds)."""
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        started, with_gpus = time.monotonic(), self._config.train.gpus > 0
        # half of the time that is left; gloo tries to connect five times, and waits so long each time
        seconds_of = {"gloo": self._seconds_left() / 10} | ({"nccl": self._seconds_left() / 2} if with_gpus else {})
        for backend, timeout_seconds in seconds_of.items():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
            try:
                dist.init_process_group(
                    backend, store=PrefixStore(backend, store), rank=self._rank, world_size=self._num_ranks,
                    timeout=datetime.timedelta(seconds=timeout_seconds))  # fmt: skip
                total = torch.tensor([float(self._rank + 1)], device=device)
                dist.all_reduce(total)
                is_right = total.item() == self._num_ranks * (self._num_ranks + 1) / 2
                unix_seconds = time.time()
                dist.destroy_process_group()
            except RuntimeError as error:
                return (
                    f"no all-reduce with {backend}: {_first_line(error)}. Are all ports open between the "
                    "hosts, and is the network interface the right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
                ), 0.0, 0.0
            if not is_right:
                return f"all-reduce with {backend} gives a wrong sum", 0.0, 0.0
        return "", unix_seconds, time.monotonic() - started

    def _try_ray(self, store: PrefixStore, probe: str, found: Sequence[HostFacts]) -> list[HostFacts]:
        """Rank 0 to every other host; every rank to the Ray of its own. Facts of the hosts that only generate."""
        if not self._options.ray_address:
            return []
        from asa_dist.rollout.cluster import ClusterError, connect, disconnect
        from asa_dist.rollout.round_trip import NUM_BYTES, RoundTrip, round_trip, shortages

        problem, trip = "", RoundTrip({}, [], 0.0)
        try:
            connect(self._options.ray_address)
        except ClusterError as error:
            problem = f"{self._host}: {error}"
        problems = self._tell(store, "Ray", problem)
        if self._rank == 0:
            others = dict.fromkeys([*(fact.host for fact in found), *self._options.rollout_hosts])
            del others[self._host]
            if not problem:
                trip = round_trip(others, self._look_here(probe), self._seconds_left() / 2)
                problems += shortages(self._config.rollout)
            size = f"{NUM_BYTES / 1e6:g} MB to every host and back, {trip.seconds:.2f} s"
            self._verdict.add("Ray", size, [*problems, *trip.problems])
        disconnect()
        known = {fact.host for fact in found}
        return [fact for host, fact in trip.seen.items() if host not in known]

    def _end(self, store: PrefixStore, probe: str, found: Sequence[HostFacts]) -> int:
        """Rank 0 prints the verdict; all ranks end with it."""
        from asa_dist.rollout.ray_hosts import TEMP_FOLDER

        if self._rank == 0:
            self._verdict.add_hosts(found, self._options.run_dir, probe, TEMP_FOLDER, self._needed_bytes)
            headline = f"preflight of {self._num_ranks} ranks on {len({fact.host for fact in found})} hosts"
            print(self._verdict.text(headline, time.monotonic() - self._started), flush=True)
        is_ready = self._from_first(store, "verdict", not self._verdict.problems)
        self._leave(store)
        return 0 if is_ready else EXIT_FAILED

    def _remove(self, probe: str) -> None:
        """On every rank: hosts may not share the run folder."""
        run_dir = self._options.run_dir
        for path in run_dir.glob(f"{probe}.*") if run_dir.is_dir() else ():
            with contextlib.suppress(OSError):  # gone, or not to be changed from this host
                path.unlink()

    def _checkpoint_bytes(self) -> int:
        """Of weights and Adam's states; 0, and a problem, if that cannot be known."""
        from asa_dist.launcher import count_model
        from asa_dist.runtime.data.errors import DataError
        from asa_dist.runtime.model import ModelError

        try:
            return BYTES_PER_PARAMETER * sum(count_model(self._config).values())
        except (DataError, ModelError) as error:
            self._verdict.problems.append(f"{self._host}: {error}")
            return 0

    # --- telling each other --------------------------------------------------------------------------------------
    def _start_clock(self, timeout_seconds: float) -> None:
        self._timeout_seconds, self._deadline = timeout_seconds, time.monotonic() + timeout_seconds

    def _seconds_left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def _tell(self, store: PrefixStore, what: str, value: Any) -> list[Any]:
        """On rank 0 what every rank told; nothing on the others."""
        store.set(f"{what}/{self._rank}", json.dumps(value))
        if self._rank != 0:
            return []
        self._wait_for_all(store, what, f"came, but did not get through with {what}")
        return [json.loads(store.get(f"{what}/{rank}")) for rank in range(self._num_ranks)]

    def _from_first(self, store: PrefixStore, what: str, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._rank == 0:
            store.set(what, json.dumps(value))
        while not store.check([what]):
            if store.check(["given up"]):
                self._leave(store)
                raise NotReady("")
            if time.monotonic() > self._deadline + END_SECONDS:
                raise NotReady(f"{self._host}: {self._name(store, 0)} was silent: what does it say?")
            time.sleep(0.1)
        return json.loads(store.get(what))

    def _wait_for_all(self, store: PrefixStore, what: str, complaint: str) -> None:
        while missing := [rank for rank in range(self._num_ranks) if not store.check([f"{what}/{rank}"])]:
            if time.monotonic() > self._deadline:
                names = [self._name(store, rank) for rank in range(self._num_ranks)]
                store.set("given up", "")
                self._leave(store)
                raise NotReady(
                    f"{', '.join(names[rank] for rank in missing)} {complaint} within "
                    f"{self._timeout_seconds:g} s, unlike "
                    f"{', '.join(name for rank, name in enumerate(names) if rank not in missing)}. "
                    "What does that host say? Is it up, and every port open to it and from it?"
                )
            time.sleep(0.1)

    def _leave(self, store: PrefixStore) -> None:
        """Rank 0 serves the store: it is the last to leave, of those that came."""
        store.set(f"gone/{self._rank}", "")
        if self._rank != 0:  # not a word more: the store may be gone
            return
        came = [rank for rank in range(self._num_ranks) if store.check([f"host/{rank}"])]
        deadline = time.monotonic() + END_SECONDS
        while not store.check([f"gone/{rank}" for rank in came]) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _name(self, store: PrefixStore, rank: int) -> str:
        """For people: the host, too, as far as it is known."""
        host = store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else ""
        host = host or host_by_launcher(rank, self._num_ranks)
        return f"rank {rank}" + (f" ({host})" if host else "")


def host_by_launcher(rank: int, num_ranks: int) -> str:
    """Of a rank that has not come: if the launch script names the hosts, and each has as many ranks as this one."""
    hosts = os.environ.get("ASA_TRAINER_HOSTS", "").replace(",", " ").split()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # the latter: deepspeed's
    return hosts[rank // per_host] if len(hosts) * per_host == num_ranks else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: as :meth:`Preflight.run`; 2 a config that cannot be used, or not started as ranks are."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    from asa_dist.runtime.rendezvous import follow_slurm
    from asa_dist.train import adapt_to_launcher

    follow_slurm()
    try:
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    except KeyError as error:
        print(f"asa: preflight: {error} is not set: start it as the ranks are", file=sys.stderr)
        return EXIT_BAD_CONFIG
    try:
        config = adapt_to_launcher(load_config(options.config, options.overrides), num_ranks)
    except ConfigError as error:
        if rank == 0:
            print(f"asa: preflight: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return Preflight(options, config, rank, num_ranks).run()


if __name__ == "__main__":
    sys.exit(main())

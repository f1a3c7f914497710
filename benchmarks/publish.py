"""How long does publishing weights keep the trainer from training, and when are they served?

    python benchmarks/publish.py --out benchmarks/results/publish.json     5 M to 500 M parameters on 1, 2 and 4 ranks
    python benchmarks/publish.py --short                                   5 M and 50 M on 1 and 2 ranks
    python benchmarks/publish.py --only "50 M parameters, 2 ranks"

bfloat16 weights of a real `TrainEngine` under ZeRO-3, ranks of one thread each, gloo. Ways take turns within one set of
processes (`publish_ranks.py`); before each, 64 MB are swept through the caches, as a training step would:

    ours                              `RolloutClient.publish`: every rank copies its own shard; a thread checksums and
                                      puts it into Ray's store; the worker checks, joins and loads them (engine hf)
    ours, three in a row              the third waits until the first has left the buffer
    memcpy                            as many bytes, one piece, warm source, warm target. The limit
    per-parameter gather + broadcast  every parameter: `GatheredParameters`, then rank 0 broadcasts it to the worker
    one-context gather + broadcast    `GatheredParameters` of all, then rank 0 broadcasts all

Stall: until the slowest rank may write its weights again. Broadcasts go to one process that takes them into warm
tensors and does nothing else. Four ranks on two cores share them; 500 M are on one rank only: with optimizer more do
not fit into 24 GiB. On the slow link trainer and worker have a Ray each, and everything between processes goes over a
loopback of 1 Gbit/s in a network namespace of its own (needs root). Extra memory is what a rank has above what it had
before: its own in the last publication, and in Ray's store in the first one, later ones taking the same place. Before
means with both buffers, a shard each, which it has from its start to its end; a figure of its own has all of it.

One JSON line on stdout. Promises: stall ≤ 1.5 of memcpy and ≤ 1/5 of per-parameter's; extra memory beside both buffers
≤ one shard, and 1 % for pages.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from live_run import Hang, Progress
from publish_case import (
    CASES,
    MEMCPY,
    ONE_CONTEXT,
    OURS,
    PER_PARAMETER,
    SEED,
    SLOW_LINK,
    SLOW_LINK_CASES,
    SMOKE_CASES,
    THREE_AT_ONCE,
    WAYS,
    ranks_file,
)
from results import Ratio, add_sizes, make_result, write_result

ALL_CASES = CASES | SLOW_LINK_CASES | SMOKE_CASES
TARGET_OF_MEMCPY, TARGET_OF_PER_PARAMETER = 1.5, 1 / 5
TARGET_OF_SHARD = 1.01  # one shard, and pages of the sampler and of the store
TURNS = {"full": 11, "short": 7, "smoke": 2}
CASE_SECONDS = 1200.0
RANKS_SECONDS = 1100.0  # of it; then their case says so itself
GRACE_SECONDS = 30.0
TRIED = (
    "Looking where every tensor lies, and waking the thread that publishes, cost a fixed part of a millisecond more "
    "than one memcpy, which counts where that takes less than one; ranks beyond the cores wait for each other, too. "
    "Tried: neighbours in memory as one copy, which is kept; torch._foreach_copy_, torch.cat(out=), cheaper checks, "
    "without gain")
NETWORK = """ip link set lo up
tc qdisc add dev lo root tbf rate {rate}bit burst 256kb latency 500ms
exec "$@"
"""


# --- measuring --------------------------------------------------------------------------------------------------
def why_no_slow_link() -> str:
    """What is missing for a network of our own, or ""."""
    try:
        made = subprocess.run(["unshare", "--net", "sh", "-ec", NETWORK.format(rate=10**9), "sh", "true"],
                              capture_output=True, text=True, check=False, timeout=GRACE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return made.stderr.strip() if made.returncode else ""


def measure(name: str, turns: int) -> dict[str, Any]:
    """A case in processes of its own: of every rank what `measure_on_rank` found.

    Raises:
        Hang: they did not end.
        subprocess.CalledProcessError: they failed; what they said is on stderr.
    """
    case = ALL_CASES[name]
    with tempfile.TemporaryDirectory(prefix="asa-publish-") as folder:
        command = [sys.executable, str(Path(__file__).with_name("publish_run.py")), name, folder, str(turns)]
        if case.link_bits_per_second is not None:
            network = NETWORK.format(rate=case.link_bits_per_second)
            command = ["unshare", "--net", "sh", "-ec", network, "sh", *command]
        process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
        try:
            code = process.wait(CASE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Hang(f"publish: {name}: not done within {CASE_SECONDS:g} s") from None
        finally:
            end_group(process)
        if code:
            raise subprocess.CalledProcessError(code, command[-4:])
        ranks = json.loads(ranks_file(Path(folder)).read_text(encoding="utf-8"))
    return {"case": asdict(case), "tensors": ranks[0]["tensors"], "shard_bytes": ranks[0]["shard_bytes"],
            "standing_bytes": max(rank["standing_bytes"] for rank in ranks),
            "turns": of_slowest_rank([rank["turns"] for rank in ranks]),
            "memory": {way: most(rank["memory"][way] for rank in ranks) for way in WAYS}}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would, so that it ends its Ray; then by force."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def most(of_ranks: Any) -> dict[str, float]:
    found = list(of_ranks)
    return {key: max(one[key] for one in found) for key in found[0]}


def of_slowest_rank(of_ranks: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, list[Any]]:
    return {way: [most(turns) for turns in zip(*(rank[way] for rank in of_ranks), strict=True)] for way in WAYS}


# --- figures ----------------------------------------------------------------------------------------------------
def median_of(measured: Mapping[str, Any], way: str, key: str = "stall_seconds") -> float:
    return statistics.median(turn[key] for turn in measured["turns"][way])


def ratio_of(measured: Mapping[str, Any], name: str, way: str, baseline: str, key: str = "stall_seconds",
             times: int = 1, **keywords: Any) -> Ratio:
    """``way`` of ``times`` × ``baseline``: median, lowest and highest of pairs of one turn."""
    turns = measured["turns"]
    pairs = [ours[key] / theirs[key] / times for ours, theirs in zip(turns[way], turns[baseline], strict=True)]
    return Ratio(name, round(statistics.median(pairs), 3), f"{times} × {baseline}" if times > 1 else baseline,
                 lowest=round(min(pairs), 3), highest=round(max(pairs), 3), **keywords)


def ratios_of_case(name: str, measured: Mapping[str, Any]) -> list[Ratio]:
    shard, standing = measured["shard_bytes"], measured["standing_bytes"]
    extra = measured["memory"][OURS]["all_bytes"] / shard
    found = [
        ratio_of(measured, f"stall, of memcpy: {name}", OURS, MEMCPY, target=TARGET_OF_MEMCPY, limit=1.0),
        ratio_of(measured, f"stall, of per-parameter: {name}", OURS, PER_PARAMETER, target=TARGET_OF_PER_PARAMETER),
        ratio_of(measured, f"stall, of one context: {name}", OURS, ONE_CONTEXT),
        ratio_of(measured, f"stall, three in a row, of memcpy: {name}", THREE_AT_ONCE, MEMCPY, times=3),
        ratio_of(measured, f"until served, of per-parameter: {name}", OURS, PER_PARAMETER, "served_seconds"),
        ratio_of(measured, f"until served, of one context: {name}", OURS, ONE_CONTEXT, "served_seconds"),
        Ratio(f"extra memory, of a shard: {name}", round(extra, 3), "one shard, beside both buffers",
              target=TARGET_OF_SHARD),
        Ratio(f"memory with both buffers, of a shard: {name}", round(extra + standing / shard, 3), "one shard"),
    ]
    return [explained(ratio, measured) for ratio in found]


def explained(ratio: Ratio, measured: Mapping[str, Any]) -> Ratio:
    if ratio.is_met is not False:
        return ratio
    if ratio.name.startswith("extra memory"):
        shard, extra = measured["shard_bytes"], measured["memory"][OURS]["all_bytes"]
        why = f"{(extra - shard) / mmap.PAGESIZE:.0f} pages more than the shard's {shard / mmap.PAGESIZE:.0f}"
    else:
        spent = ", ".join(f"{way} {1000 * median_of(measured, way):.2f}" for way in (OURS, MEMCPY, PER_PARAMETER))
        why = f"ms: {spent}; {measured['tensors']} tensors. {TRIED}"
    return replace(ratio, why=why)


# --- the program ------------------------------------------------------------------------------------------------
def names_of(options: argparse.Namespace) -> list[str]:
    if options.only:
        return [options.only]
    if options.size == "smoke":
        return list(SMOKE_CASES)
    if options.size == "short":
        small = [name for name, case in CASES.items() if name.startswith(("5 ", "50 ")) and case.num_ranks < 4]
        return [*small, SLOW_LINK]
    return [*CASES, SLOW_LINK]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, help="of every way, after one to warm up: 11, short 7, smoke 2")
    parser.add_argument("--only", choices=ALL_CASES, metavar="CASE", help=f"of {'; '.join(ALL_CASES)}")
    add_sizes(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    progress, turns, names = Progress(), options.turns or TURNS[options.size], names_of(options)
    left_out = {}
    if SLOW_LINK in names and (lack := why_no_slow_link()):
        if options.only:
            sys.exit(f"publish: {SLOW_LINK}: no network of its own: {lack}")
        names.remove(SLOW_LINK)
        left_out[SLOW_LINK] = lack
        progress.say(f"without {SLOW_LINK}: {lack}")
    measurements: dict[str, Any] = {}
    ratios: list[Ratio] = []
    for name in names:
        progress.say(f"{name} ({len(measurements) + 1} of {len(names)}): {turns} turns of {len(WAYS)} ways")
        measurements[name] = measure(name, turns)
        ratios += ratios_of_case(name, measurements[name])
        progress.say("; ".join(f"{way} {1000 * median_of(measurements[name], way):.2f} ms" for way in WAYS))
    settings = {"seed": SEED, "turns": turns, "left_out": left_out, "cores": len(os.sched_getaffinity(0))}
    return write_result(make_result("publish", options.size, ratios, settings, measurements), options.out)


if __name__ == "__main__":
    sys.exit(main())

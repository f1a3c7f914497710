"""One case of `publish.py`: a Ray, a rollout worker, a receiver of broadcasts, and the ranks; until all have ended.

    python benchmarks/publish_run.py CASE FOLDER TURNS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from local_ranks import run_on_ranks
from publish import ALL_CASES, RANKS_SECONDS
from publish_case import SEED, Case, given_up_file, ranks_file, served_file

from asa_dist.config import ModelConfig
from asa_dist.rank_ray import object_store_bytes
from asa_dist.rollout.cluster import LOOPBACK_SWITCH, connect, disconnect, start_local_ray
from asa_dist.rollout.engine import Engine, SamplingConfig
from asa_dist.rollout.worker import build_engine

RUN_NAME = "publish"
JOIN_SECONDS = 60.0


def build_watched_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> Engine:
    """In the worker: notes the moment from which it serves a version."""
    engine = build_engine(config_folder, model, sampling)
    load = engine.load

    def load_and_note(version: int, tensors: Any) -> None:
        load(version, tensors)
        partial = Path(config_folder, "moment")
        partial.write_text(str(time.monotonic()), encoding="ascii")
        partial.replace(served_file(Path(config_folder), version))

    engine.load = load_and_note  # type: ignore[method-assign]
    return engine


@contextmanager
def second_ray(head_address: str, store_bytes: int) -> Iterator[None]:
    """The worker's host: it has the CPUs, and a store of its own, so that weights go over the network."""
    import ray

    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={head_address}",
               "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", f"--object-store-memory={store_bytes}"]
    # Ray allows it a second host only so; no address but the loopback's could be found in this network
    process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {LOOPBACK_SWITCH: "1"})
    try:
        deadline = time.monotonic() + JOIN_SECONDS
        while not ray.cluster_resources().get("CPU"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the second Ray did not join the first one")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(JOIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def run(case: Case, folder: Path, turns: int) -> None:
    import torch.multiprocessing
    from publish_ranks import TIMEOUT_SECONDS, receive

    from asa_dist.rollout.system import RolloutSystem
    from asa_dist.runtime.trunk import build_trunk

    config = case.config
    with torch.device("meta"):
        trunk = build_trunk(config.model, SEED, case.vocab_size, case.eos_token_id, 256, on_cuda=False)
    trunk.config.save_pretrained(folder)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in trunk.named_parameters()]
    store_bytes = object_store_bytes(trunk.num_parameters(), case.dtype)

    def note(event: str, details: dict[str, Any]) -> None:
        print(event, details, file=sys.stderr)
        if event == "worker_given_up":
            given_up_file(folder).write_text(str(details["reason"]), encoding="utf-8")

    is_two_hosts = case.link_bits_per_second is not None
    with ExitStack() as stack:
        ray = stack.enter_context(start_local_ray(0 if is_two_hosts else 1, 0, store_bytes))
        os.environ |= ray.environment
        connect(ray.address)
        stack.callback(disconnect)
        if is_two_hosts:
            stack.enter_context(second_ray(ray.address, store_bytes))
        system = RolloutSystem.start(
            RUN_NAME, str(folder), config.model, SamplingConfig(config.rollout, SEED, case.eos_token_id), 1,
            on_event=note,
            stacks_folder=str(folder / "stacks"), build_engine=build_watched_engine)
        stack.callback(system.stop)
        spawn = torch.multiprocessing.get_context("spawn")
        receiver = spawn.Process(target=receive, args=(folder, case.other_core, shapes, case.dtype), daemon=True)
        receiver.start()
        of_ranks = run_on_ranks(case.num_ranks, "publish_ranks", (folder, case, ray.address, RUN_NAME, turns),
                                RANKS_SECONDS, TIMEOUT_SECONDS)
        receiver.join(JOIN_SECONDS)  # a daemon: it does not outlive us
    ranks_file(folder).write_text(json.dumps(of_ranks), encoding="utf-8")


if __name__ == "__main__":
    run(ALL_CASES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))

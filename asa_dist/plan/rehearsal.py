"""A rehearsal on this machine: the real loop, engine and decoder of a config, with one layer and with three.

    python -m asa_dist.plan.rehearsal RANK CONFIG     a rank; rank 0 prints Seconds as JSON

All ranks train at the same time, as they will, on made-up tokens with every response as long as it may get; then one
worker's engine generates alone. A step takes the same time more with every layer, so that two depths say what any depth
takes:

    seconds(L) = seconds of all else + L · seconds of a layer

No figure is assumed: dispatch, ZeRO's hooks, messages of gloo, Adam and threads that share cores are all in there.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, dump_config, load_config
from asa_dist.plan.gloo import INTERFACE
from asa_dist.plan.made_up import EOS, SEED, made_up_loop, random_tokens
from asa_dist.plan.measuring_ranks import answer_of_ranks
from asa_dist.plan.shape import trunk_of, work_of

if TYPE_CHECKING:
    from torch import Tensor

    from asa_dist.runtime.engine import Placement

DEPTHS = (1, 3)
STEPS, WARM_STEPS = 4, 1  # of a turn; the depths take turns, the first steps of a turn do not count
MOST_ROUNDS, ENOUGH_SECONDS = 8, 15.0  # whichever comes first; one round at least
COLLECTIVE_SECONDS = 120.0
ANSWER_SECONDS = 600.0
NEVER = -1  # an end-of-text that no engine samples

Seconds = dict[str, float]  # "layer_compute_seconds", "other_compute_seconds", … of compute, collective, rollout


def rehearse(config: Config) -> Seconds:
    """Of a step of the config.

    Raises:
        MeasuringError: a rank failed, or did not answer in time; with its last words.
    """
    from asa_dist.launcher import free_port

    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder) / "config.yaml", str(free_port())
        path.write_text(dump_config(config), encoding="utf-8")
        found: Seconds = answer_of_ranks(
            "the rehearsal", __name__, str(path), [environment(config, rank, port) for rank in range(config.num_ranks)],
            ANSWER_SECONDS)  # fmt: skip
    return found


def environment(config: Config, rank: int, port: str) -> dict[str, str]:
    """Of a rank on this machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.num_ranks), "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": str(config.train.threads_per_rank)}  # fmt: skip


def with_depth(config: Config, num_layers: int) -> Config:
    """The config, so shallow; nothing but steps, and nothing that a strange policy could set off."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"architecture": config.model.architecture.model_copy(update={"num_layers": num_layers})},
        "rollout": {"on_mismatch": "warn"}, "metrics": {"samples_every_steps": 2**31},
        "train": {"eval_every_steps": 2**31},
    }  # fmt: skip
    return config.model_copy(update={name: getattr(config, name).model_copy(update=fields)
                                     for name, fields in changes.items()})  # fmt: skip


# --- a rank -----------------------------------------------------------------------------------------------------
def run_rank(config: Config, rank: int) -> Seconds:
    import torch

    from asa_dist.runtime.engine import Placement, join_process_group

    torch.set_num_threads(config.train.threads_per_rank)
    placement = Placement(rank, rank, config.num_ranks, torch.device("cpu"))
    join_process_group(placement, COLLECTIVE_SECONDS)
    training = _train(config, placement)
    torch.distributed.destroy_process_group()
    if rank:
        return training
    torch.set_num_threads(config.rollout.threads_per_worker)
    return training | _split("rollout", _generate(config))


def _split(name: str, seconds_by_depth: Sequence[float]) -> Seconds:
    shallow, deep = seconds_by_depth
    layer = min(max(0.0, deep - shallow) / (DEPTHS[1] - DEPTHS[0]), deep / DEPTHS[1])  # nothing is negative
    return {f"layer_{name}_seconds": layer, f"other_{name}_seconds": deep - DEPTHS[1] * layer}


def _train(config: Config, placement: Placement) -> Seconds:
    """Medians over the steps of all turns."""
    measured: list[list[dict[str, float]]] = [[] for _ in DEPTHS]
    loops = [made_up_loop(with_depth(config, depth), placement, rows.append)[0]
             for depth, rows in zip(DEPTHS, measured, strict=True)]  # fmt: skip
    kept: list[list[dict[str, float]]] = [[] for _ in DEPTHS]
    started = time.monotonic()
    for _ in range(MOST_ROUNDS):
        for loop, rows, good in zip(loops, measured, kept, strict=True):
            rows.clear()
            loop.run(loop.finished + WARM_STEPS + STEPS)
            good += [row for row in rows if "time/step_seconds" in row][WARM_STEPS:]
        if any(loops[0].engine.max_over_ranks([time.monotonic() - started > ENOUGH_SECONDS])):  # the same on all ranks
            break

    def medians(*parts: str) -> list[float]:
        return [statistics.median(sum(row[f"time/{part}_seconds"] for part in parts) for row in rows) for rows in kept]

    return _split("compute", medians("compute", "data")) | _split("collective", medians("collective"))


def _generate(config: Config) -> list[float]:
    """Of a worker, for one step, by depth: it takes a version over and decodes all its responses."""
    import numpy as np

    from asa_dist.records import Prompt
    from asa_dist.rollout.engine import SamplingConfig
    from asa_dist.rollout.hf_engine import HfEngine
    from asa_dist.rollout.weights import DTYPES
    from asa_dist.runtime.trunk import build_trunk

    vocab_size, rollout, work = trunk_of(config).vocab_size, config.rollout, work_of(config)
    rng = np.random.default_rng(SEED)
    bundle = rollout.groups_per_lease or max(1, rollout.prompts_per_step // rollout.workers)
    prompts = [Prompt(number, 0, random_tokens(rng, vocab_size, work.prompt_tokens)) for number in range(bundle)]
    bundles = work.prompts_per_worker / bundle
    engines, weights = [], []
    for depth in DEPTHS:
        lm = build_trunk(with_depth(config, depth).model, SEED, vocab_size, EOS, work.row_tokens, on_cuda=False)
        with tempfile.TemporaryDirectory() as folder:
            lm.config.save_pretrained(folder)
            engines.append(HfEngine(folder, config.model, SamplingConfig(rollout, SEED, NEVER), "cpu"))
        dtype = DTYPES[config.model.dtype]
        weights.append([(name, tensor.detach().to(dtype)) for name, tensor in lm.named_parameters()])

    def one_step(engine: HfEngine, tensors: list[tuple[str, Tensor]]) -> float:
        started = time.perf_counter()
        engine.load(0, tensors)
        loaded = time.perf_counter()
        engine.generate(prompts)
        return loaded - started + bundles * (time.perf_counter() - loaded)

    turns = [[one_step(*both) for both in zip(engines, weights, strict=True)] for _ in range(WARM_STEPS + STEPS)]
    return [statistics.median(seconds) for seconds in zip(*turns[WARM_STEPS:], strict=True)]


if __name__ == "__main__":
    print(json.dumps(run_rank(load_config(sys.argv[2]), int(sys.argv[1]))), flush=True)

"""The bytes that a rank's parts really hold: it walks DeepSpeed's own tensors, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from local_ranks import run_on_ranks
from torch import Tensor

from asa_dist.config import Config, load_config
from asa_dist.plan.made_up import made_up_loop
from asa_dist.plan.memory import MODEL_STATES, activations, buffers, model_states
from asa_dist.plan.rehearsal import with_depth
from asa_dist.plan.shape import trunk_of, work_of
from asa_dist.runtime.engine import Placement, TrainEngine

BUCKET, ACTIVATIONS = "reduce bucket", "activations and masks"
WEIGHTS, MASTERS, MOMENTS, GRADIENTS = MODEL_STATES
DEADLINE_SECONDS = 600.0


# --- of an engine -----------------------------------------------------------------------------------------------
def held_bytes(engine: TrainEngine) -> dict[str, int]:
    """By part, of this rank; every storage counts once, for the first part that has it.

    Gradients are there between backward and step, moments after the first step.
    """
    seen: set[int] = set()
    return {part: _new_bytes(tensors, seen) for part, tensors in _tensors(engine)}


def _new_bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(engine: TrainEngine) -> Iterator[tuple[str, list[Any]]]:
    optimizer, innermost = engine.optimizer, engine.engine.basic_optimizer
    parameters = list(engine.engine.module.parameters())
    yield WEIGHTS, [getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters]
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    yield MASTERS, masters or [tensor for group in innermost.param_groups for tensor in group["params"]]
    yield MOMENTS, [tensor for state in innermost.state.values() for name, tensor in state.items() if name != "step"]
    averaged = getattr(optimizer, "averaged_gradients", None) or {}
    yield GRADIENTS, [
        *(parameter.grad for parameter in parameters),
        getattr(optimizer, "grad_partitions_flat_buffer", None),  # stage 3
        *getattr(optimizer, "fp32_groups_gradients_flat", ()),  # stage 0 in bfloat16
        *(tensor for group in averaged.values() if group is not None for tensor in group),
    ]
    buckets = getattr(optimizer, "ipg_buckets", None) or {}
    held = [bucket.buffer for bucket in buckets.values()]
    yield BUCKET, [tensor for buffer in held for tensor in (buffer if isinstance(buffer, list) else [buffer])]


class KeptByAutograd:
    """A context: the bytes that a forward keeps for its backward, beside parameters; the most of all forwards."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.most_bytes = 0
        self._module = module
        self._now: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        of_parameters = {parameter.untyped_storage().data_ptr() for parameter in self._module.parameters()}
        if storage.data_ptr() not in of_parameters:  # whole only now, under ZeRO-3
            self._now[storage.data_ptr()] = storage.nbytes()
            self.most_bytes = max(self.most_bytes, sum(self._now.values()))
        return tensor

    def _begin(self, *_: Any) -> None:
        self._now.clear()

    def __enter__(self) -> KeptByAutograd:
        self._removable = self._module.register_forward_pre_hook(self._begin)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._removable.remove()


# --- of a config ------------------------------------------------------------------------------------------------
def planned_bytes(config: Config) -> dict[str, float]:
    """Of the parts that are measured here. Stages 1 and 2 give their bucket back at the end of a backward."""
    bucket = buffers(config)[BUCKET] if config.train.zero_stage == 3 else 0.0
    kept = sum(activations(config, trunk_of(config), work_of(config)).values())
    return {**model_states(config), BUCKET: bucket, ACTIVATIONS: kept}


def measure_bytes(path: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """(planned, held by rank 0), by part, the most at any time of a step; ``run_on_ranks`` says what it raises."""
    config = load_config(path, overrides)
    held, *_ = run_on_ranks(config.num_ranks, "planner_bytes", (config,), DEADLINE_SECONDS)
    return planned_bytes(config), held


def measure_on_rank(placement: Placement, config: Config) -> dict[str, int]:
    loop, engine = made_up_loop(with_depth(config, config.model.architecture.num_layers), placement, lambda row: None)
    loop.run(1)  # moments are there after it
    step_engine, seen = engine.engine.step, [held_bytes(engine)]

    def seen_step() -> None:
        seen.append(held_bytes(engine))  # gradients are there still
        step_engine()

    engine.engine.step = seen_step
    with KeptByAutograd(engine.engine.module) as kept:
        loop.run(2)
    return {part: max(one[part] for one in seen) for part in seen[0]} | {ACTIVATIONS: kept.most_bytes}

"""Gradient norms and clipping per part (ψ, φ, ξ), for every ZeRO stage.

DeepSpeed clips by one norm over all parameter groups, so that a spike in an evaluator head would shrink the generator's
step. Here each part is clipped by its own norm, on the rank's own gradient partitions, between backward and step;
DeepSpeed's clipping stays off. The same collective tells whether the step can be used at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist  # timed, as ZeRO's own
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def local_gradients(optimizer: Any) -> Iterator[tuple[int, list[Tensor]]]:
    """(parameter group index, gradient tensors) of this rank's partition, after the backward of the last micro-batch.

    Stage 0 holds whole averaged gradients on every rank; the others partition them.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for sub_group in range(len(optimizer.fp16_groups)):
            group = optimizer.sub_group_to_group_id[sub_group]
            if optimizer.offload_optimizer:
                yield group, [optimizer.fp32_partitioned_groups_flat[sub_group].grad]
            else:
                yield group, optimizer.averaged_gradients[sub_group]
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        for group in range(len(optimizer.bit16_groups)):
            if optimizer.cpu_offload:
                yield group, [optimizer.single_partition_of_fp32_groups[group].grad]
            else:
                yield group, optimizer.averaged_gradients[group]
    elif isinstance(optimizer, BF16_Optimizer):
        for group, gradient in enumerate(optimizer.fp32_groups_gradient_flat_partition):
            yield group, [gradient]
    else:
        # bfloat16 keeps the trained parameters beside the optimizer's float32 masters
        trained = getattr(optimizer, "fp16_groups", [settings["params"] for settings in optimizer.param_groups])
        for group, parameters in enumerate(trained):
            yield group, [parameter.grad for parameter in parameters if parameter.grad is not None]


def is_partitioned(optimizer: Any) -> bool:
    """Whether ``local_gradients`` yields a rank's share (norms must be summed over ranks) or whole gradients."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | BF16_Optimizer)


def clip_by_part(
    optimizer: Any,
    part_of_group: list[str],
    parts: list[str],
    max_norm: float,
    num_nonfinite: Tensor,
) -> tuple[dict[str, float], bool]:
    """Norm of each part's gradient before clipping; scales parts above ``max_norm`` (0 = off) down to it.

    One all-reduce of ``len(parts)`` + 1 numbers, and the step's one wait for the device.

    Args:
        num_nonfinite: losses and rewards of this rank that are not finite; a scalar on the device on which the process
            group communicates (offloaded gradients stand elsewhere).

    Returns:
        (norm by part, whether every value on every rank is finite): the same on all ranks. If not, nothing is scaled.
    """
    gradients = [(part_of_group[group], tensors) for group, tensors in local_gradients(optimizer)]
    device = num_nonfinite.device
    squares = torch.zeros(len(parts), dtype=torch.float64, device=device)
    for part, tensors in gradients:
        if tensors:
            sums = torch.stack([tensor.float().square().sum().double() for tensor in tensors])
            squares[parts.index(part)] += sums.sum().to(device)
    if not is_partitioned(optimizer) and dist.get_rank() != 0:
        squares.zero_()  # every rank holds the whole gradient: rank 0's counts
    totals = torch.cat([squares, num_nonfinite.double().reshape(1)])
    dist.all_reduce(totals)
    *squared_norms, total_nonfinite = totals.tolist()
    norms = {part: math.sqrt(square) for part, square in zip(parts, squared_norms, strict=True)}
    is_finite = total_nonfinite == 0 and all(map(math.isfinite, squared_norms))
    if max_norm > 0 and is_finite:
        for part, tensors in gradients:
            if norms[part] > max_norm:
                for tensor in tensors:
                    tensor.mul_(max_norm / norms[part])
    return norms, is_finite


@contextmanager
def no_update(optimizer: Any, innermost: torch.optim.Optimizer) -> Iterator[None]:
    """Within it, a step of DeepSpeed's engine drops the gradients and counts as always, but moves nothing.

    What has to be dropped and counted differs by stage, dtype and version, so DeepSpeed does it; only the innermost
    optimizer, which owns moments and step counts, stands still. Gradients of zero would not do: Adam would still move.
    """
    are_linked = getattr(optimizer, "_hp_optimizer_states_linked", None)
    vars(innermost)["step"] = lambda closure=None: None  # shadows the class's
    try:
        yield
    finally:
        del vars(innermost)["step"]
        if are_linked is not None:  # else DeepSpeed would believe to have linked moments that do not exist yet
            optimizer._hp_optimizer_states_linked = are_linked
            for parameter in [parameter for parameter, state in innermost.state.items() if not state]:
                del innermost.state[parameter]

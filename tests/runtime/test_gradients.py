"""Norms and clipping by part, on gradients of any device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from asa_dist.runtime import gradients
from asa_dist.runtime.gradients import clip_by_part

CPU = torch.device("cpu")


def optimizer() -> torch.optim.Optimizer:
    """Two groups, with gradients of norm 5 and 2; the third has none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for parameter, gradient in zip(parameters, ([3.0, 0.0], [0.0, 4.0], [0.0, -2.0]), strict=False):
        parameter.grad = torch.tensor(gradient)
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:3]}, {"params": parameters[3:]}])


def test_each_part_is_clipped_by_its_own_norm() -> None:
    found = optimizer()
    assert clip_by_part(found, ["psi", "phi", "xi"], ["psi", "phi", "xi"], 2.5, CPU) == {"psi": 5, "phi": 2, "xi": 0}
    left = [p.grad.tolist() for group in found.param_groups for p in group["params"] if p.grad is not None]
    assert left == [[1.5, 0.0], [0.0, 2.0], [0.0, -2.0]]


def test_groups_of_one_part_share_a_norm() -> None:
    assert clip_by_part(optimizer(), ["psi", "psi", "phi"], ["psi", "phi"], 0.0, CPU)["psi"] == pytest.approx(29**0.5)


def test_a_nonfinite_norm_scales_nothing() -> None:
    found = optimizer()
    found.param_groups[1]["params"][0].grad[0] = torch.inf
    assert clip_by_part(found, ["psi", "phi", "xi"], ["psi", "phi", "xi"], 1.0, CPU)["phi"] == torch.inf
    assert found.param_groups[0]["params"][0].grad.tolist() == [3.0, 0.0]


def test_the_sum_travels_on_the_groups_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offloaded optimizer's gradients stand on the CPU, where nccl cannot reach. "meta" plays the GPU here."""

    class Travelled(Exception):
        pass

    def all_reduce(squares: torch.Tensor) -> None:
        raise Travelled(squares.device.type, squares.dtype)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradients, "is_partitioned", lambda optimizer: True)
    with pytest.raises(Travelled) as travelled:
        clip_by_part(optimizer(), ["psi", "phi", "xi"], ["psi", "phi", "xi"], 1.0, torch.device("meta"))
    assert travelled.value.args == ("meta", torch.float64)

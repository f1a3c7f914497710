"""Norms and clipping by part, on gradients of any device; what a step without an update leaves."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed import comm

from asa_dist.runtime import gradients
from asa_dist.runtime.gradients import clip_by_part, no_update

NONE_BAD = torch.zeros((), dtype=torch.float64)


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(comm.comm, "cdb", None)  # and back again
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # it would be compiled
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    yield
    dist.destroy_process_group()


def optimizer() -> torch.optim.Optimizer:
    """Two groups, with gradients of norm 5 and 2; the third has none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for parameter, gradient in zip(parameters, ([3.0, 0.0], [0.0, 4.0], [0.0, -2.0]), strict=False):
        parameter.grad = torch.tensor(gradient)
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:3]}, {"params": parameters[3:]}])


@pytest.mark.usefixtures("_alone")
def test_each_part_is_clipped_by_its_own_norm() -> None:
    found, parts = optimizer(), ["psi", "phi", "xi"]
    assert clip_by_part(found, parts, parts, 2.5, NONE_BAD) == ({"psi": 5, "phi": 2, "xi": 0}, True)
    left = [p.grad.tolist() for group in found.param_groups for p in group["params"] if p.grad is not None]
    assert left == [[1.5, 0.0], [0.0, 2.0], [0.0, -2.0]]


@pytest.mark.usefixtures("_alone")
def test_groups_of_one_part_share_a_norm() -> None:
    norms, _ = clip_by_part(optimizer(), ["psi", "psi", "phi"], ["psi", "phi"], 0.0, NONE_BAD)
    assert norms["psi"] == pytest.approx(29**0.5)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_nonfinite_norm_scales_nothing(value: float) -> None:
    found, parts = optimizer(), ["psi", "phi", "xi"]
    found.param_groups[1]["params"][0].grad[0] = value
    norms, is_finite = clip_by_part(found, parts, parts, 1.0, NONE_BAD)
    assert norms["phi"] == pytest.approx(value, nan_ok=True) and norms["psi"] == 5 and not is_finite
    assert found.param_groups[0]["params"][0].grad.tolist() == [3.0, 0.0]


@pytest.mark.usefixtures("_alone")
def test_a_nonfinite_loss_scales_nothing() -> None:
    found, parts = optimizer(), ["psi", "phi", "xi"]
    norms, is_finite = clip_by_part(found, parts, parts, 1.0, torch.tensor(1.0))
    assert norms["psi"] == 5 and not is_finite
    assert found.param_groups[0]["params"][0].grad.tolist() == [3.0, 0.0]


def test_the_sum_travels_on_the_groups_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offloaded optimizer's gradients stand on the CPU, where nccl cannot reach. "meta" plays the GPU here."""

    class Travelled(Exception):
        pass

    def all_reduce(totals: torch.Tensor) -> None:
        raise Travelled(totals.device.type, totals.dtype)

    monkeypatch.setattr(comm, "all_reduce", all_reduce)
    monkeypatch.setattr(gradients, "is_partitioned", lambda optimizer: True)
    parts = ["psi", "phi", "xi"]
    with pytest.raises(Travelled) as travelled:
        clip_by_part(optimizer(), parts, parts, 1.0, torch.zeros((), device="meta"))
    assert travelled.value.args == ("meta", torch.float64)


def test_no_update_is_for_one_step() -> None:
    found = optimizer()
    before = [p.detach().clone() for group in found.param_groups for p in group["params"]]
    with no_update(found, found):
        found.step()
    assert all(map(torch.equal, before, [p for group in found.param_groups for p in group["params"]]))
    for group in found.param_groups:
        group["lr"] = 1.0
    found.step()
    assert found.param_groups[0]["params"][0].tolist() == [-3.0, 0.0]

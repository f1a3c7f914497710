"""CpuLinear against nn.Linear in float64: values, every gradient, and which of them goes by oneDNN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from asa_kernels import cpu_linear
from asa_kernels.cpu_linear import MIN_ROWS, CpuLinear, use_cpu_linear

FEATURES_IN, FEATURES_OUT = 48, 33


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all left factors so far."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without oneDNN")
    shapes: list[tuple[int, ...]] = []
    product = cpu_linear.product

    def seen(left_NI: Tensor, *rest: Tensor) -> Tensor:
        shapes.append(tuple(left_NI.shape))
        return product(left_NI, *rest)

    monkeypatch.setattr(cpu_linear, "product", seen)
    return shapes


def layer_and_reference(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(3)
    layer = nn.Linear(FEATURES_IN, FEATURES_OUT, bias=bias)
    reference = copy.deepcopy(layer).double()
    use_cpu_linear(layer)
    return layer, reference


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(MIN_ROWS,), (70,), (3, 40), (2, 5, 13)])
def test_values_and_gradients(by_onednn: list[tuple[int, ...]], bias: bool, shape: tuple[int, ...]) -> None:
    layer, reference = layer_and_reference(bias)
    x = torch.randn(*shape, FEATURES_IN, requires_grad=True)
    d_out = torch.randn(*shape, FEATURES_OUT)
    x_double = x.detach().double().requires_grad_()
    out, expected = layer(x), reference(x_double)
    out.backward(d_out)
    expected.backward(d_out.double())
    pairs = [(out, expected), (x.grad, x_double.grad), (layer.weight.grad, reference.weight.grad)]
    for value, right in [*pairs, (layer.bias.grad, reference.bias.grad)] if bias else pairs:
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    assert len(by_onednn) == 3


def test_factors_of_any_strides(by_onednn: list[tuple[int, ...]]) -> None:
    layer, reference = layer_and_reference(bias=False)
    x = torch.randn(FEATURES_IN, 100).T
    out = layer(x)
    d_out = torch.randn(FEATURES_OUT, 100).T
    out.backward(d_out)
    torch.testing.assert_close(out.double(), reference(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, d_out.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(MIN_ROWS - 1, torch.float32), (MIN_ROWS, torch.bfloat16)])
def test_few_rows_and_low_precision_are_pytorchs_own(by_onednn: list[tuple[int, ...]], rows: int,
                                                     dtype: torch.dtype) -> None:
    layer, _ = layer_and_reference(bias=True)
    layer.to(dtype)
    x = torch.randn(rows, FEATURES_IN).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert by_onednn == []


def test_only_plain_layers_are_changed_and_keep_their_parameters() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.ReLU())
    before = dict(model.named_parameters())
    use_cpu_linear(model)
    assert [type(module) for module in model] == [CpuLinear, Special, nn.ReLU]
    assert all(before[name] is parameter for name, parameter in model.named_parameters())

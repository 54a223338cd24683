"""What flows as integers between INT8 layers of a graph, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.graph import fuse_model, lower
from octavo.graph.lower import can_be_int8, max_pool_int8, to_int8
from octavo.graph.scales import LayerQParams
from octavo.layers.convolution.elementwise import Dequantize, Quantize
from octavo.layers.convolution.fused import FusedConv2d
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.quant import QParams, qparams_from_range
from octavo.quant.weights import QuantizedWeight

Between = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, between: Between | nn.Module, *, untraceable: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.between, self.untraceable = between, untraceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.untraceable and x.shape[1] != 3:  # which torch.fx does not know
            return x
        return self.last(self.between(self.first(x)))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """As ShuffleNet does it (arXiv 1707.01083)."""
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def split_and_joined(x: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=1)
    return torch.cat([two, one], dim=1)


def reshaped(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).unsqueeze(3).squeeze(3).reshape(x.shape)


KEEPS_INTEGERS = {
    "module": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "pool": lambda x: functional.max_pool2d(x, 2),
    "torch": lambda x: torch.max_pool2d(x, 3, stride=1, padding=1),
    "relu": nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True)),
    "relu function": lambda x: functional.relu(split_and_joined(x)),
    "shuffle": shuffled,
    "split": split_and_joined,
    "reshape": reshaped,
}
NEEDS_FLOATS = {
    "mean": lambda x: x - x.mean(),
    "indices": lambda x: functional.max_pool2d(x, 2, return_indices=True)[0],
    "zeros": lambda x: torch.cat([torch.zeros(x.shape), x], dim=1)[:, :8],
    "shifted": lambda x: torch.relu(torch.cat([x, x + 1])[: len(x)]),
}


def qparams(low: float = -4.0) -> QParams:
    return qparams_from_range(low, 4.0, "uint8")


def made_int8(net: Net, x: torch.Tensor) -> nn.Module:
    torch.manual_seed(1)
    layers = {}
    for name, y in (("first", qparams()), ("last", None)):
        shape = net.get_submodule(name).weight.shape
        values = torch.randint(-127, 128, shape, dtype=torch.int8)
        bias = torch.randint(-900, 900, shape[:1], dtype=torch.int32)
        weight = QuantizedWeight(values, torch.full(shape[:1], 0.004), bias=bias)
        layers[name] = LayerQParams(qparams(), y, weight=weight)
    result, made = to_int8(fuse_model(net.eval(), x)[0], layers)
    assert set(made) == set(layers)
    assert all(one.weight is None for one in result.octavo_qparams.values())
    return result


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("between", KEEPS_INTEGERS.values(), ids=KEEPS_INTEGERS.keys())
def test_integers_stay_integers(
    between: Between, untraceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 8, 6)
    net = Net(between, untraceable=untraceable)
    made = made_int8(net, x)
    assert (count(made, Quantize), count(made, Dequantize)) == (1, 0)
    monkeypatch.setattr(lower, "on_integers", lambda *_: None)
    by_floats = made_int8(net, x)
    assert (count(by_floats, Quantize), count(by_floats, Dequantize)) == (2, 1)
    assert torch.equal(made(x), by_floats(x))


@torch.no_grad()
@pytest.mark.parametrize("between", NEEDS_FLOATS.values(), ids=NEEDS_FLOATS.keys())
def test_what_integers_cannot_do_gets_floats(between: Between) -> None:
    x = torch.randn(2, 3, 8, 6)
    made = made_int8(Net(between), x)
    assert count(made, Quantize) == 2
    assert made(x).isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool_of_integers(layout: torch.memory_format) -> None:
    values = torch.randint(-128, 128, (2, 5, 17, 13), dtype=torch.int8)
    wanted = functional.max_pool2d(values.double(), 3, 2, 1).to(torch.int8)
    assert torch.equal(max_pool_int8(values.contiguous(memory_format=layout), 3, 2, 1), wanted)


@torch.no_grad()
def test_a_second_activation_without_a_residual_stays_in_float() -> None:
    conv = FusedConv2d(3, 4, 1, activation="relu6", final_activation="relu")
    conv.weight.normal_()
    conv.sources = ("conv",)
    net = nn.Sequential(conv).eval()
    fused = fuse_model(net, torch.randn(1, 3, 4, 4))[0]
    assert can_be_int8(fused, {"conv"}) == set()
    made, layers = to_int8(fused, {"conv": LayerQParams(qparams())})
    assert not layers
    assert not count(made, Int8Conv2d)

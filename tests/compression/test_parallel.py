"""octavo.quantize on parallel convolutions, which fusion makes one of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import images, settled
from torch import nn

import octavo
from octavo import Int8Static
from octavo.graph import merge_parallel
from octavo.layers import Int8Conv2d
from octavo.layers.convolution.elementwise import Dequantize, Quantize
from octavo.quant import sqnr_db

RECIPE = Int8Static("minmax", smooth=None)


def normalized(width: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(width, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Block(nn.Module):
    """The block of RepVGG while it is trained."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.dense = normalized(width, channels, 3, stride)
        self.point = normalized(width, channels, 1, stride)
        self.identity = nn.BatchNorm2d(width) if (width, stride) == (channels, 1) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x) + self.point(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(Block(3, 16, 2), Block(16, 16, 1), Block(16, 24, 2), nn.Conv2d(24, 8, 1))
    return settled(net)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def int8(net: nn.Module) -> nn.Module:
    return octavo.quantize(net, RECIPE, [images(16), images(16, 2)], verbose=False)


@torch.no_grad()
def test_merged_convolutions_are_int8(net: nn.Module, int8: nn.Module) -> None:
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(Int8Conv2d) == 4
    assert nn.Conv2d not in kinds
    assert kinds.count(Quantize) == 1  # codes flow from block to block
    assert kinds.count(Dequantize) == 0
    assert sqnr_db(net(images(8, 3)), int8(images(8, 3))) > 25
    found = {layer.name: layer.detail for layer in int8.octavo_summary.layers}
    assert all(layer.became == "int8 static" for layer in int8.octavo_summary.layers)
    assert found["1.dense.0"] == "per-tensor scales"
    assert found["1.point.0"] == "in one convolution with '1.dense.0'"


@torch.no_grad()
def test_only_parallel_convolutions_are_merged(net: nn.Module) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    merged, layers = merge_parallel(net, images(2))
    assert layers["0.dense.0"] == ("0.dense.0", "0.dense.1", "0.point.0", "0.point.1")
    assert layers["1.dense.0"][-1] == "1.identity"
    torch.testing.assert_close(merged(images(4)), net(images(4)), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert merge_parallel(plain, images(1)) == (plain, {})


@torch.no_grad()
def test_files(int8: nn.Module, tmp_path: Path) -> None:
    path = octavo.save_quantized(int8, tmp_path / "net.safetensors")
    loaded = octavo.load_quantized(network(), path)
    assert torch.equal(loaded(images(3)), int8(images(3)))


@torch.no_grad()
def test_one_that_is_excluded_leaves_all(net: nn.Module) -> None:
    made = octavo.quantize(net, RECIPE, [images(8)], exclude=["1.point.0"], verbose=False)
    found = {layer.name: layer.detail for layer in made.octavo_summary.layers if not layer.became}
    assert found == {
        "1.dense.0": "it is one convolution with '1.point.0', which stays in float",
        "1.point.0": "excluded",
    }
    assert sqnr_db(net(images(8, 3)), made(images(8, 3))) > 20


@torch.no_grad()
@pytest.mark.slow
def test_a_table_does_not_know_them(net: nn.Module) -> None:
    table = octavo.calibrate(net, [images(8)], observer="minmax", verbose=False)
    made = octavo.quantize(net, RECIPE, table, example_inputs=images(2), verbose=False)
    found = {layer.name: layer.detail for layer in made.octavo_summary.layers if not layer.became}
    assert len(found) == 6
    assert found["0.dense.0"].endswith("which the table does not know; give batches")
    assert sqnr_db(net(images(8, 3)), made(images(8, 3))) > 25

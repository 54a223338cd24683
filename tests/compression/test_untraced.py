"""octavo.quantize on convolutions of models that cannot be exported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pictures import images, settled
from torch import nn

import octavo
from octavo import Int8Static
from octavo.core.errors import ArtifactError
from octavo.graph.trace import FusedModel
from octavo.layers import Int8Conv2d, Int8Linear
from octavo.layers.convolution.elementwise import Quantize
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant import sqnr_db

RECIPE = Int8Static(smooth=None)


class Untraced(nn.Module):
    """Its forward asks for values, which no tracer has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(16), nn.ReLU()
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1)
        self.twice, self.never = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.fc = nn.Linear(32, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.point(self.depthwise(x))
        if float(x.abs().max()) > 1e6:
            x = self.never(x)
        x = torch.relu(self.twice(x))
        x = self.twice(x)
        return self.fc(x.view(len(x), 32, -1).mean(-1))


def network() -> Untraced:
    torch.manual_seed(0)
    return settled(Untraced())


@pytest.fixture(scope="module")
def int8() -> nn.Module:
    return octavo.quantize(network(), RECIPE, [images(16), images(16, 2)], verbose=False)


@torch.no_grad()
def test_each_layer_is_quantized_by_itself(int8: nn.Module) -> None:
    kinds = [type(module) for module in int8.modules()]
    assert FusedModel not in kinds
    assert kinds.count(Int8Conv2d) == 4
    assert kinds.count(Int8DepthwiseSeparableConv2d) == 1
    assert kinds.count(Quantize) == 3
    assert kinds.count(Int8Linear) == 1
    found = {layer.name: layer for layer in int8.octavo_summary.layers}
    assert found["stem"].detail.startswith(
        "per-tensor scales, found layer by layer, as the graph cannot be exported (torch cannot"
    )
    assert found["twice"].became  # with one scale for both calls
    assert found["never"].detail == "calibration data never reached it"
    assert sqnr_db(network()(images(8, 3)), int8(images(8, 3))) > 25


@torch.no_grad()
def test_files_and_copies(int8: nn.Module, tmp_path: Path) -> None:
    x = images(3, 3)
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))
    path = octavo.save_quantized(int8, tmp_path / "net.safetensors")
    loaded = octavo.load_quantized(network(), path, example_inputs=x)
    assert torch.equal(loaded(x), int8(x))
    with pytest.raises(ArtifactError, match="Give the example_inputs that it was quantized with"):
        octavo.load_quantized(network(), path)


class Branching(nn.Sequential):
    """torch.fx follows it and ONNX has no such operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[1](self[0](x))
        return self[2](torch.special.bessel_j0(x) + x)


@torch.no_grad()
def test_codes_flow_where_only_the_export_fails() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)
    net = Branching(*layers).eval()
    made = octavo.quantize(net, RECIPE, [images(16)], verbose=False)
    assert isinstance(made, FusedModel)
    kinds = [type(module) for module in made.modules()]
    assert kinds.count(Int8Conv2d) == 3
    assert kinds.count(Quantize) == 2
    assert sqnr_db(net(images(8, 3)), made(images(8, 3))) > 25

"""octavo.quantize on models with convolutions: the engines' integers, in layers of PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional

import octavo
from octavo import Int8Dynamic, Int8Static
from octavo.calibration import CalibrationTable
from octavo.core.errors import ArtifactError, CalibrationError, InputError
from octavo.kernels import use_backend
from octavo.layers import Int8Conv2d, Int8Linear
from octavo.layers.convolution.elementwise import Dequantize, Int8Add, Quantize
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant import sqnr_db

if TYPE_CHECKING:
    from lite0 import Lite0

RECIPE = Int8Static("minmax", smooth=None)


class Block(nn.Module):
    """Expand, depthwise, project, and the input added; or a sum with a ReLU behind it."""

    def __init__(self, channels: int, activation: type[nn.Module], *, last: bool) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(3 * channels), activation()
        self.depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, 1, 1, groups=3 * channels)
        self.norm2, self.act2 = nn.BatchNorm2d(3 * channels), activation()
        self.project = nn.Conv2d(3 * channels, channels, 1, bias=False)
        self.norm3, self.last = nn.BatchNorm2d(channels), nn.ReLU() if last else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.depthwise(y)))
        return self.last(self.norm3(self.project(y)) + x)


class Net(nn.Module):
    """Everything that codes flow through, and some that needs floats."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), activation()
        )
        self.one, self.two = Block(16, activation, last=False), Block(16, activation, last=True)
        self.side, self.plain = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.head, self.fc = nn.Conv2d(16, 128, 1), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(self.stem(x)))
        x = torch.cat([self.side(x), self.plain(x)], dim=1)
        x = functional.max_pool2d(x, 2)
        x = torch.relu(self.head(x)).mean((2, 3))
        return self.fc(x)


def network(activation: type[nn.Module] = nn.ReLU6) -> Net:
    torch.manual_seed(0)
    net = Net(activation)
    with torch.no_grad():
        for _ in range(8):
            net(images(16, seed=7))
    return net.eval()


def images(count: int, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return functional.interpolate(torch.randn(count, 3, 8, 8, generator=random), size=(32, 32))


@pytest.fixture(scope="module")
def net() -> Net:
    return network()


@pytest.fixture(scope="module")
def int8(net: Net) -> nn.Module:
    return octavo.quantize(net, RECIPE, [images(16), images(16, 2)], verbose=False)


def engine_output(
    model: nn.Module, table: CalibrationTable, x: torch.Tensor, folder: Path
) -> torch.Tensor:
    path = folder / "net.octavo"
    octavo.build(
        model, calibration=table, example_inputs=x[:2], precision="int8", output=path, verbose=False
    )
    with octavo.load(path) as engine:
        return torch.as_tensor(engine(x))


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ReLU], ids=lambda kind: kind.__name__)
@pytest.mark.slow
def test_layers_have_the_integers_of_the_engine(
    activation: type[nn.Module], tmp_path: Path
) -> None:
    model, x = network(activation), images(8, 3)
    batches = [images(16), images(16, 2)]
    table = octavo.calibrate(model, batches, observer="percentile", verbose=False)
    made = octavo.quantize(model, RECIPE, table, example_inputs=x, verbose=False)
    with use_backend("reference"):
        exact = made(x)
    assert sqnr_db(engine_output(model, table, x, tmp_path), exact) > 100
    # elsewhere codes may be one off where a value lies at a tie
    assert sqnr_db(model(x), made(x)) > sqnr_db(model(x), exact) - 1


@torch.no_grad()
@pytest.mark.slow
def test_efficientnet_has_the_integers_of_the_engine(
    lite0: Lite0, lite0_table: CalibrationTable, demo_folder: Path
) -> None:
    x = torch.from_numpy(lite0.evaluation[:16])
    recipe = Int8Static(smooth=None)
    made = octavo.quantize(lite0.module, recipe, lite0_table, example_inputs=x[:1], verbose=False)
    swapped = [layer for layer in made.octavo_summary.layers if layer.became]
    assert len(swapped) == 50
    kinds = [type(module) for module in made.modules()]
    assert kinds.count(Quantize) == kinds.count(Dequantize) == 1  # the input, and before the mean
    assert kinds.count(Int8DepthwiseSeparableConv2d) == 16
    assert kinds.count(Int8Add) == 9
    with octavo.load(demo_folder / "onnx-runtime-int8.octavo") as engine:
        engine_y = torch.as_tensor(engine(x))
    with use_backend("reference"):
        exact = made(x)
    assert sqnr_db(engine_y, exact) > 100
    float_y = lite0.module(x)
    assert sqnr_db(float_y, exact) > sqnr_db(float_y, engine_y) - 0.01
    assert sqnr_db(float_y, made(x)) > sqnr_db(float_y, engine_y) - 1


@torch.no_grad()
def test_codes_flow_between_layers(net: Net, int8: nn.Module) -> None:
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(Int8Conv2d) == 10
    assert kinds.count(Int8DepthwiseSeparableConv2d) == 2
    assert kinds.count(Int8Linear) == 1
    assert kinds.count(Quantize) == kinds.count(Dequantize) == 1  # the input, and before the mean
    assert sqnr_db(net(images(8, 3)), int8(images(8, 3))) > 20


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.Hardswish, nn.SiLU], ids=lambda kind: kind.__name__)
def test_activations_that_codes_cannot_do(activation: type[nn.Module]) -> None:
    model, x = network(activation), images(8, 3)
    made = octavo.quantize(model, RECIPE, [images(16), images(16, 2)], verbose=False)
    assert sum(isinstance(module, Int8Conv2d) for module in made.modules()) == 10
    assert sqnr_db(model(x), made(x)) > 20


@torch.no_grad()
def test_copies_files_and_other_types(net: Net, int8: nn.Module, tmp_path: Path) -> None:
    x = images(5, 3)
    expected = int8(x)
    assert torch.equal(copy.deepcopy(int8)(x), expected)
    path = octavo.save_quantized(int8, tmp_path / "net.safetensors")
    fresh = network()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    loaded = octavo.load_quantized(fresh, path)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(net.stem[0].weight, network().stem[0].weight)
    half = copy.deepcopy(int8).to(torch.bfloat16)
    y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert sqnr_db(expected, y.float()) > 15


def test_a_file_of_another_network(int8: nn.Module, tmp_path: Path) -> None:
    path = octavo.save_quantized(int8, tmp_path / "net.safetensors")
    other = network()
    other.head = nn.Conv2d(16, 48, 1)
    with pytest.raises(ArtifactError, match=r"'head.* it belongs to another architecture"):
        octavo.load_quantized(other, path)
    with pytest.raises(ArtifactError, match="it is of another architecture"):
        octavo.load_quantized(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), path)


@torch.no_grad()
def test_compiled_and_exported(int8: nn.Module) -> None:
    x = images(4, 3)
    expected = int8(x)
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    assert sqnr_db(expected, compiled(x)) > 25  # a code may be one off
    program = torch.export.export(int8, (x,), strict=False).module()
    assert torch.equal(program(x), expected)


@torch.no_grad()
def test_selectors_leave_convolutions_in_float(net: Net) -> None:
    batches = [images(16)]
    made = octavo.quantize(net, RECIPE, batches, exclude=["one.*", "fc"], verbose=False)
    found = {layer.name: layer.detail for layer in made.octavo_summary.layers if not layer.became}
    assert found == {
        "one.expand": "excluded",
        "one.depthwise": "excluded",
        "one.project": "excluded",
        "fc": "excluded",
    }
    assert sqnr_db(net(images(8, 3)), made(images(8, 3))) > 20


def test_other_recipes_say_why_not(net: Net) -> None:
    made = octavo.quantize(net, Int8Dynamic(), include=["fc"], verbose=False)
    assert isinstance(made.fc, Int8Linear)
    made = octavo.quantize(net, Int8Dynamic(), verbose=False)
    details = {layer.name: layer.detail for layer in made.octavo_summary.layers}
    assert details["head"] == "convolutions quantize with scales of whole tensors; use Int8Static()"


def test_the_model_stays_in_its_mode() -> None:
    model = network()
    model.one.train()
    octavo.quantize(model, RECIPE, [images(16)], verbose=False)
    assert model.one.norm1.training
    assert not model.training


def test_refusals(net: Net) -> None:
    batches, before = [images(16)], copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=r"becomes a graph of its own; .*exclude torch.nn.Conv2d"):
        octavo.quantize(net, RECIPE, batches, inplace=True, verbose=False)
    overrides = {"head": Int8Static("mse", smooth=None)}
    with pytest.raises(InputError, match="the observers minmax, mse; choose one"):
        octavo.quantize(net, RECIPE, batches, overrides=overrides, verbose=False)
    table = octavo.calibrate(net, batches, observer="minmax", verbose=False)
    other = network(nn.ReLU)
    with pytest.raises(CalibrationError, match="this table belongs to another model"):
        octavo.quantize(other, RECIPE, table, example_inputs=images(2), verbose=False)
    with pytest.raises(CalibrationError, match="this table belongs to another model"):
        octavo.quantize(nn.Linear(256, 256), RECIPE, table, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
@pytest.mark.slow
def test_equalization_and_bias_correction(tmp_path: Path) -> None:
    """What a table says about weights is in the layers, as it is in the engine."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 8, 1, bias=False)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), last).eval()
    table = octavo.calibrate(
        net,
        [images(8), images(8, 2)],
        observer="minmax",
        equalization=True,
        bias_correction=True,
        verbose=False,
    )
    assert table.equalization
    x = images(8, 3)
    made = octavo.quantize(net, RECIPE, table, example_inputs=x, verbose=False)
    with use_backend("reference"):
        exact = made(x)
    assert sqnr_db(engine_output(net, table, x, tmp_path), exact) > 100
    assert sqnr_db(net(x), exact) > 20
    assert made.get_submodule("2").pointwise.bias.any()  # which correction made
    # weights that were made smaller here and larger there belong together
    with pytest.raises(CalibrationError, match="around '2', which stays in float"):
        octavo.quantize(net, RECIPE, table, example_inputs=x, exclude=["2"], verbose=False)


@torch.no_grad()
def test_half_of_a_pair_is_not_equalized(net: Net) -> None:
    """With the pointwise half in float the depthwise one stays too, and its weights as they are."""
    made = octavo.quantize(
        net,
        Int8Static(smooth=None),
        [images(32), images(32, 2)],
        exclude=["*.project"],
        verbose=False,
    )
    found = {layer.name: layer.detail for layer in made.octavo_summary.layers if not layer.became}
    assert found["one.depthwise"].startswith("its other half stays in float")
    assert sqnr_db(net(images(8, 3)), made(images(8, 3))) > 20

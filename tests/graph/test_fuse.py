"""octavo.fuse on models that nobody here wrote."""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from randomised import randomise, relative_error
from safetensors.torch import load_file, save_file
from torch import nn

import octavo
from octavo.demo import images
from octavo.layers import FusedConv2d, FusedSeparableConv2d

PYTORCHCV = {
    "mobilenet_wd4": (13, 13),
    "mobilenetv2_wd4": (17, 17),
    "mobilenetv3_small_w7d20": (2, 11),
    "efficientnet_b0": (0, 16),
    "mnasnet_small": (5, 15),
    "shufflenetv2_wd2": (19, 19),
    "ghostnet": (7, 41),
    "fbnet_cb": (21, 21),
    "resnet10": (0, 0),
}
"""Name -> depthwise-separable blocks found, and depthwise convolutions. Where they differ,
squeeze-and-excitation or a concatenation stands between the two halves."""
FAMILIES = {"resnet10": "resnet"}
TRANSFORMERS = {
    "MobileNetV1": ({"depth_multiplier": 0.25}, (13, 13)),
    "MobileNetV2": ({"depth_multiplier": 0.35}, (17, 17)),
    "ConvNext": ({"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]}, (0, 5)),
    "ResNet": (
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40], "embedding_size": 16},
        (0, 0),
    ),
}


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Crops of real photographs, float32 [2, 3, 224, 224]."""
    return torch.from_numpy(images.crops(images.EVALUATION_PHOTOS, 2, seed=3))


@pytest.fixture(scope="module")
def lite0_module() -> nn.Module:
    """With its ImageNet weights; its convolutions are subclasses that pad themselves."""
    return images.efficientnet_lite0()


def pytorchcv(name: str) -> nn.Module:
    family = FAMILIES.get(name, name.split("_")[0])
    module = importlib.import_module(f"pytorchcv.models.{family}")
    torch.manual_seed(0)
    model: nn.Module = getattr(module, name)()
    if isinstance(getattr(model.features, "final_pool", None), nn.AvgPool2d):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # for images smaller than 224
    return randomise(model)


def transformer(name: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TRANSFORMERS[name][0])
    return randomise(getattr(transformers, f"{name}ForImageClassification")(config))


@torch.no_grad()
def check(
    model: nn.Module, fused: nn.Module, x: torch.Tensor, output: Callable[[Any], torch.Tensor]
) -> None:
    assert relative_error(output(fused(x)), output(model(x))) < 1e-4
    names = {name for name, _ in model.named_modules()}
    layers = [(n, m) for n, m in fused.named_modules() if isinstance(m, FusedConv2d)]
    assert layers
    for name, layer in layers:
        assert name.removesuffix(".depthwise").removesuffix(".pointwise") in names
        assert set(layer.sources) <= names


@pytest.mark.parametrize("name", PYTORCHCV)
def test_gives_what_models_of_pytorchcv_give(name: str, photos: torch.Tensor) -> None:
    model = pytorchcv(name)
    fused = octavo.fuse(model, verbose=False)
    summary = fused.octavo_summary
    assert summary.method == "torch.fx"
    assert (summary.separable, summary.depthwise) == PYTORCHCV[name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    check(model, fused, photos[..., ::3, ::3], lambda y: y)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gives_what_models_of_transformers_give(name: str, photos: torch.Tensor) -> None:
    model, x = transformer(name), photos[..., ::3, ::3]
    fused = octavo.fuse(model, {"pixel_values": x[:1]}, verbose=False)
    summary = fused.octavo_summary
    assert summary.method == "torch.export"
    assert summary.error < 1e-5
    assert (summary.separable, summary.depthwise) == TRANSFORMERS[name][1]
    check(model, fused, x, lambda y: y.logits)  # a batch of two, where the example was one
    with pytest.raises(AssertionError, match="Guard failed"):
        fused(photos)


def test_gives_what_efficientnet_lite0_gives(lite0_module: nn.Module, photos: torch.Tensor) -> None:
    fused = octavo.fuse(lite0_module, verbose=False)
    summary = fused.octavo_summary
    assert (summary.separable, summary.depthwise, summary.fused) == (16, 16, 49)
    assert not summary.unfused
    check(lite0_module, fused, photos, lambda y: y)
    stem = fused.get_submodule("_conv_stem")
    assert isinstance(stem, FusedConv2d)
    assert (stem.padding, stem.activation) == ((0, 1, 0, 1), "relu6")
    assert stem.sources == ("_conv_stem.static_padding", "_conv_stem", "_bn0", "_swish")


def test_a_block_of_mobilenetv2_is_one_layer() -> None:
    model = pytorchcv("mobilenetv2_wd4")
    fused = octavo.fuse(model, verbose=False)
    block = fused.get_submodule("features.stage2.unit2.conv2.conv")
    assert isinstance(block, FusedSeparableConv2d)
    assert block.depthwise.activation == "relu6"
    assert block.pointwise.activation == "none"
    (node,) = (n for n in fused.graph.nodes if n.target == "features.stage2.unit2.conv2.conv")
    assert len(node.args) == 2  # the input, and the residual
    assert "features.stage2.unit2.conv3.bn" in block.sources


def test_the_model_is_not_changed(photos: torch.Tensor) -> None:
    model = pytorchcv("mobilenetv2_wd4")
    before = copy.deepcopy(model.state_dict())
    fused = octavo.fuse(model, photos[:1, :, ::4, ::4], verbose=False)
    assert {id(p) for p in fused.parameters()}.isdisjoint(id(p) for p in model.parameters())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    fused.half()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "octavo_summary")
    assert isinstance(model.features.init_block.bn, nn.BatchNorm2d)


def test_the_fused_model_is_stored_and_copied(photos: torch.Tensor, tmp_path: Path) -> None:
    x = photos[:1, :, ::4, ::4]
    fused = octavo.fuse(pytorchcv("mobilenetv3_small_w7d20"), verbose=False)
    save_file(fused.state_dict(), tmp_path / "fused.safetensors")
    other = octavo.fuse(randomise(pytorchcv("mobilenetv3_small_w7d20"), seed=1), verbose=False)
    assert not torch.equal(other(x), fused(x))
    other.load_state_dict(load_file(tmp_path / "fused.safetensors"))
    twin = copy.deepcopy(other)
    assert torch.equal(other(x), fused(x))
    assert torch.equal(twin(x), fused(x))
    assert twin.octavo_summary == other.octavo_summary
    assert not twin.training


def test_the_fused_model_compiles_and_is_exported(photos: torch.Tensor) -> None:
    x = photos[:, :, ::4, ::4]
    fused = octavo.fuse(pytorchcv("mobilenet_wd4"), verbose=False)
    program = torch.export.export(fused, (x,))
    with torch.no_grad():
        assert relative_error(program.module()(x), fused(x)) < 1e-5


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other burn CPU seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_fusing_pays_on_a_cpu(
    lite0_module: nn.Module, photos: torch.Tensor, one_thread: None
) -> None:
    """In CPU seconds, which other processes hardly spoil; the bound leaves room for that."""
    x = photos[:1].to(memory_format=torch.channels_last)
    last = copy.deepcopy(lite0_module).to(memory_format=torch.channels_last)
    runs = {"fused": octavo.fuse(lite0_module, verbose=False), "eager": last}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(9):
            for name, model in runs.items():
                start = time.process_time()
                model(x)
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    assert medians["fused"] < 1.1 * medians["eager"], medians

"""Weights lie as kernels read them, so that no call copies them again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from octavo.kernels import use_backend
from octavo.kernels.common.convolution import in_kernel_order
from octavo.layers import FusedConv2d, FusedSeparableConv2d, Int8Conv2d
from octavo.layers.convolution import fused
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant.weights import QuantizedWeight

FORMS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "depthwise": ((16, 16, 3), {"groups": 16, "padding": 1}),
    "more than one kernel per channel": ((16, 32, 3), {"groups": 16}),
    "of one channel": ((1, 16, 3), {}),
    "groups": ((32, 32, 3), {"groups": 2, "padding": 1}),
    "k x k": ((16, 20, 3), {"stride": 2}),
    "pointwise": ((16, 20, 1), {}),
    "pointwise with a stride": ((16, 20, 1), {"stride": 2}),
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are brought into another order."""
    found: list[tuple[int, ...]] = []
    contiguous = torch.Tensor.contiguous

    def counted(self: torch.Tensor, **options: Any) -> torch.Tensor:
        result = contiguous(self, **options)
        if result.data_ptr() != self.data_ptr():
            found.append(tuple(self.shape))
        return result

    monkeypatch.setattr(torch.Tensor, "contiguous", counted)
    return found


def images(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-9, 9, shape, generator=random).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@every_form
def test_int8_weights_are_not_copied(form: str, copied: list[tuple[int, ...]]) -> None:
    sizes, options = FORMS[form]
    layer = Int8Conv2d(*sizes, **options, in_codes=True)
    values = images(*layer.weight.shape, dtype=torch.int8)
    layer.set_weight(QuantizedWeight(values, torch.ones(sizes[1])))
    restored = Int8Conv2d(*sizes, **options, in_codes=True)
    state = {name: value.clone().contiguous() for name, value in layer.state_dict().items()}
    restored.load_state_dict(state, assign=True)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last).half().to("cpu")
    x = images(2, sizes[0], 5, 5, dtype=torch.int8)
    results = []
    for one in (layer, restored, moved):
        assert list(one.state_dict()) == list(layer.state_dict())
        copied.clear()
        with use_backend("triton"):
            results.append(one(x))
        assert copied == []
    assert torch.equal(results[0], results[1])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float layers take a CPU for a GPU, where alone they run kernels."""
    monkeypatch.setattr(fused, "_on_gpu", lambda _: True)
    monkeypatch.setattr(fused, "_has_kernels", lambda _: True)


def float_layer(form: str) -> FusedConv2d:
    sizes, options = FORMS[form]
    layer = FusedConv2d(*sizes, **options)
    weight = images(*layer.weight.shape, dtype=torch.float32).contiguous()
    layer.weight = nn.Parameter(weight / 9, requires_grad=False)
    return layer


@pytest.mark.usefixtures("on_gpu")
@every_form
def test_float_weights_are_not_copied(form: str, copied: list[tuple[int, ...]]) -> None:
    layer = float_layer(form)
    weight = layer.weight.detach().clone()
    restored = float_layer(form)
    restored.load_state_dict({"weight": weight.contiguous(), "bias": layer.bias}, assign=True)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last).to(torch.float64).float()
    x = images(2, layer.in_channels, 5, 5, dtype=torch.float32)
    results = []
    for one in (layer, restored, moved):
        assert torch.equal(one.weight, weight)
        own = in_kernel_order(one.weight.detach(), depthwise=one.depthwise)
        assert own.data_ptr() == one.weight.data_ptr()
        copied.clear()
        with use_backend("triton" if one.depthwise else "auto"):
            results.append(one(x))
        assert copied == []
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("on_gpu")
def test_both_halves_in_one_kernel_copy_nothing(copied: list[tuple[int, ...]]) -> None:
    floats = FusedSeparableConv2d(float_layer("depthwise"), float_layer("pointwise"))
    first = Int8Conv2d(16, 16, 3, groups=16, padding=1, in_codes=True, out_codes=True)
    coded = Int8DepthwiseSeparableConv2d(first, Int8Conv2d(16, 20, 1, in_codes=True))
    x, codes = (images(1, 16, 5, 5, dtype=dtype) for dtype in (torch.float32, torch.int8))
    copied.clear()
    with use_backend("triton"):
        floats(x)
        coded.in_one_kernel(codes)
    assert copied == []


def test_on_a_cpu_float_weights_lie_as_torch_reads_them() -> None:
    layer = float_layer("depthwise")
    assert layer.weight.is_contiguous()
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous()
    wide = float_layer("k x k").to(memory_format=torch.channels_last)
    assert wide.weight.is_contiguous(memory_format=torch.channels_last)
    plain = FusedConv2d(16, 20, 3, channels_last=False)
    assert plain.weight.is_contiguous()

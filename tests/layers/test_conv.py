"""Int8Conv2d: its arithmetic, step by step in float64, chains of codes, and how it moves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import octavo
from octavo.core.errors import ArtifactError, InputError
from octavo.kernels import use_backend
from octavo.layers import Int8Conv2d
from octavo.layers.convolution.int8 import signed
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant import PerChannel, QParams, choose_qparams, dequantize, quantize
from octavo.quant.weights import QuantizedWeight

UNSIGNED = QParams(torch.tensor(0.02), torch.tensor(100), "uint8")
SYMMETRIC = QParams(torch.tensor(0.02), torch.tensor(0), "int8")
RESULT = QParams(torch.tensor(0.03), torch.tensor(40), "uint8")


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, 3, **{"padding": 1, "stride": 2, **options}).eval()


def by_hand(conv: nn.Conv2d, x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """The convolution of what the codes stand for, in float64."""
    x = dequantize(quantize(x, qparams), qparams).double()
    weight = conv.weight.detach()
    of = choose_qparams(weight, "int8", PerChannel(0))
    w = quantize(weight, of).double() * of.scale.double()[:, None, None, None]
    bias = None if conv.bias is None else conv.bias.detach().double()
    if bias is not None:  # on the grid of the sums
        step = (qparams.scale * of.scale).double()
        bias = (bias / step).round() * step
    return functional.conv2d(
        x,
        w,
        bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("qparams", [UNSIGNED, SYMMETRIC], ids=["uint8", "int8"])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 4}, {"bias": False}, {"padding": "same", "stride": 1}, {"padding": "valid"},
     {"kernel_size": 1, "padding": 0, "stride": 1}, {"dilation": 2, "padding": (2, 1)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("batch", [0, 3])
def test_arithmetic(qparams: QParams, options: dict[str, Any], batch: int) -> None:
    kernel = options.pop("kernel_size", 3) if "kernel_size" in options else 3
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, kernel, **{"padding": 1, "stride": 2, **options}).eval()
    layer, x = Int8Conv2d.from_float(conv, qparams, activation="relu"), images(batch, 8, 9, 7)
    found = layer(x)
    expected = by_hand(conv, x, qparams).relu()
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_codes_out_and_in() -> None:
    """Two layers and what goes between them as codes, as if it went as floats."""
    one, two = convolution(), nn.Conv2d(12, 5, 1).eval()
    first = Int8Conv2d.from_float(one, UNSIGNED, RESULT, activation="relu6")
    second = Int8Conv2d.from_float(two, RESULT, in_codes=True)
    x = images(2, 8, 9, 9)
    codes = first(x)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous(memory_format=torch.channels_last)
    y = by_hand(one, x, UNSIGNED).clamp(0, 6)
    off = codes.int() + 128 - quantize(y.float(), RESULT).int()
    assert int(off.abs().max()) <= 1
    assert int((off != 0).sum()) <= 2
    between = dequantize((codes.int() + 128).to(torch.uint8), RESULT)
    plain = Int8Conv2d.from_float(two, RESULT)
    torch.testing.assert_close(second(codes), plain(between), rtol=0, atol=0)


@pytest.mark.parametrize("coded", [False, True])
def test_a_residual(coded: bool) -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1).eval(), images(2, 8, 5, 5)
    of = UNSIGNED if coded else None
    layer = Int8Conv2d.from_float(conv, SYMMETRIC, RESULT, residual_qparams=of)
    residual = images(2, 8, 5, 5, seed=2)
    values, given = residual, residual
    if coded:
        codes = quantize(residual, UNSIGNED)
        values, given = dequantize(codes, UNSIGNED), (codes.int() - 128).to(torch.int8)
    y = by_hand(conv, x, SYMMETRIC) + values.double()
    off = layer(x, given).int() + 128 - quantize(y.float(), RESULT).int()
    assert int(off.abs().max()) <= 1
    assert int((off != 0).sum()) <= 2
    alone = layer(x).int() + 128 - quantize(by_hand(conv, x, SYMMETRIC).float(), RESULT).int()
    assert int(alone.abs().max()) <= 1


def test_half_types_keep_their_scales() -> None:
    layer = Int8Conv2d.from_float(convolution(), UNSIGNED, in_codes=True)
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    layer.half()
    for name, buffer in layer.state_dict().items():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == before[name].dtype
    codes = torch.zeros(1, 8, 5, 5, dtype=torch.int8)
    assert layer(codes).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(codes).dtype == torch.bfloat16
    floats = Int8Conv2d.from_float(convolution(), UNSIGNED)
    assert floats(images(1, 8, 5, 5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["floats", "codes"])
def test_copies_state_dicts_and_files(form: str, tmp_path: Path) -> None:
    conv = convolution()
    out = RESULT if form == "codes" else None
    layer, x = Int8Conv2d.from_float(conv, UNSIGNED, out, activation="silu"), images(2, 8, 7, 7)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    fresh = Int8Conv2d(**layer.config())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert repr(fresh) == repr(layer)
    assert not list(layer.parameters())
    path = octavo.save_quantized(nn.Sequential(layer), tmp_path / "model.safetensors")
    loaded = octavo.load_quantized(nn.Sequential(convolution()), path)
    assert torch.equal(loaded(x), expected)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ArtifactError, match="groups 1 in the file and 2 in the model"):
        octavo.load_quantized(nn.Sequential(convolution(groups=2)), path)


def test_a_file_of_a_layer_that_pads_nothing(tmp_path: Path) -> None:
    conv = convolution(padding="valid")
    model = nn.Sequential(Int8Conv2d.from_float(conv, UNSIGNED))
    path = octavo.save_quantized(model, tmp_path / "model.safetensors")
    x = images(1, 8, 7, 7)
    again = octavo.load_quantized(nn.Sequential(convolution(padding="valid")), path)
    assert torch.equal(again(x), model(x))


def test_compile_and_export_give_the_eager_result() -> None:
    layer, x = Int8Conv2d.from_float(convolution(), UNSIGNED, activation="relu"), images(2, 8, 7, 7)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()
    batch = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(layer, (x,), dynamic_shapes=batch).module()
    more = images(5, 8, 7, 7)
    torch.testing.assert_close(exported(more), layer(more), rtol=1e-6, atol=1e-6)


class PadsByItself(nn.Conv2d):
    """As pretrained networks of another framework have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


def test_a_subclass_whose_padding_is_given() -> None:
    torch.manual_seed(0)
    conv, x = PadsByItself(8, 4, 3, stride=2).eval(), images(1, 8, 8, 8)
    layer = Int8Conv2d.from_float(conv, UNSIGNED, padding=(0, 1, 0, 1))
    codes = dequantize(quantize(x, UNSIGNED), UNSIGNED)
    found, expected = layer(x), by_hand(conv, functional.pad(codes, (0, 1, 0, 1)), UNSIGNED)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_signed_codes() -> None:
    assert signed(None) == (torch.ones(()), 0)
    assert signed(UNSIGNED) == (UNSIGNED.scale, -28)
    assert signed(SYMMETRIC) == (SYMMETRIC.scale, 0)


PER_CHANNEL = QParams(torch.ones(8), torch.zeros(8), "int8", PerChannel(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Conv2d.from_float(PadsByItself(8, 4, 3), UNSIGNED), "may pad in a way of its"),
        (
            lambda: Int8Conv2d.from_float(convolution(padding_mode="reflect"), UNSIGNED),
            "padding_mode is 'reflect'; only zeros have a code",
        ),
        (lambda: Int8Conv2d.from_float(convolution(), PER_CHANNEL), "takes int8 or uint8 with one"),
        (lambda: broken("weight"), "NaN"),
        (lambda: broken("bias"), "the bias has values that are not finite"),
        (lambda: Int8Conv2d(1, 1, 1, bias=False, zero_point=3), "zero_point is 3 and needs a bias"),
        (
            lambda: Int8Conv2d(8, 4, 3, in_codes=True)(images(1, 8, 5, 5)),
            "x is torch.float32, and this layer takes int8 codes",
        ),
        (
            lambda: Int8Conv2d(8, 4, 3)(torch.zeros(1, 8, 5, 5, dtype=torch.int8)),
            "x is torch.int8, and this layer takes floats",
        ),
        (
            lambda: Int8Conv2d(8, 4, 5)(images(1, 8, 5, 5), torch.zeros(1, dtype=torch.int8)),
            "residual is torch.int8, and this layer takes floats",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def broken(name: str) -> Int8Conv2d:
    conv = convolution()
    getattr(conv, name).data[0] = torch.nan
    return Int8Conv2d.from_float(conv, UNSIGNED)


def test_a_bias_that_sums_cannot_hold() -> None:
    layer = Int8Conv2d(8, 12, 3, zero_point=-128, in_codes=True)
    bias = torch.full((12,), 2**31 - 1, dtype=torch.int32)
    ones = torch.ones(12, 8, 3, 3, dtype=torch.int8)
    with pytest.raises(InputError, match=r"zero point -128 need 2147492863 steps, and int32 has"):
        layer.set_weight(QuantizedWeight(ones, torch.ones(12), bias=bias))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish", "silu"])
@pytest.mark.parametrize("steps", [0.02, 6 / 255, 0.05])
def test_one_multiplication_gives_the_codes(activation: str, steps: float) -> None:
    """Also where a ReLU6 ends below the largest code, and where codes do not follow from sums."""
    conv, result = convolution(), QParams(torch.tensor(steps), torch.tensor(0), "uint8")
    conv.weight.data *= 8
    layer = Int8Conv2d.from_float(conv, UNSIGNED, result, activation=activation)
    x = images(2, 8, 9, 9)
    real = {
        "none": lambda y: y,
        "relu": torch.relu,
        "relu6": functional.relu6,
        "hardswish": functional.hardswish,
        "silu": functional.silu,
    }[activation](by_hand(conv, x, UNSIGNED))
    off = (layer(x).int() + 128 - quantize(real.float(), result).int()).abs()
    assert int(off.max()) <= 1
    assert int((off != 0).sum()) <= 2


class TestDepthwiseSeparable:
    def layers(self, **options: Any) -> tuple[Int8Conv2d, Int8Conv2d]:
        first = nn.Conv2d(8, 8, 3, padding=1, groups=8).eval()
        settings = {"in_codes": True, "activation": "relu", **options}
        one = Int8Conv2d.from_float(first, UNSIGNED, RESULT, **settings)
        return one, Int8Conv2d.from_float(nn.Conv2d(8, 5, 1).eval(), RESULT, in_codes=True)

    @pytest.mark.parametrize("activation", ["relu", "hardswish"])
    @pytest.mark.parametrize("codes", [False, True])
    def test_one_kernel_has_the_codes_of_two_layers(
        self, activation: str, codes: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = self.layers(activation=activation)
        if codes:
            float_layer = nn.Conv2d(8, 5, 1).eval()
            two = Int8Conv2d.from_float(float_layer, RESULT, UNSIGNED, in_codes=True)
        layer = Int8DepthwiseSeparableConv2d(one, two)
        x = torch.randint(-128, 128, (2, 8, 7, 5)).to(torch.int8)
        with use_backend("reference"):
            expected = layer(x)
            found = layer.in_one_kernel(x)
        if codes:
            assert int((found.int() - expected.int()).abs().max()) <= 1
        else:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_layers_that_do_not_fit(self) -> None:
        one, two = self.layers()
        with pytest.raises(InputError, match="it must be depthwise, to codes"):
            Int8DepthwiseSeparableConv2d(two, two)
        with pytest.raises(InputError, match="both layers must take codes"):
            Int8DepthwiseSeparableConv2d(self.layers(in_codes=False)[0], two)
        other = Int8Conv2d.from_float(nn.Conv2d(8, 5, 1).eval(), UNSIGNED, in_codes=True)
        with pytest.raises(InputError, match="with the zero point -88 and the second takes -28"):
            Int8DepthwiseSeparableConv2d(one, other)

"""Depthwise convolution: sums of codes to the bit, floats within a rounding; all windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import (
    FLOATS,
    TOLERANCES,
    codes,
    error_norm,
    exact_depthwise,
    lend_poisoned,
    reals,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import depthwise_conv1d, depthwise_conv2d, explain
from octavo.kernels.depthwise_conv2d import conv2d, schema
from octavo.kernels.depthwise_conv2d.reference import Convolution
from octavo.kernels.depthwise_conv2d.tiles import candidates, config, loaded_pixels
from octavo.kernels.int8_conv2d import onednn
from octavo.kernels.int8_gemm.reference import ACTIVATIONS, Epilogue
from octavo.kernels.window import Window, make_window

body = pytest.importorskip("octavo.kernels.depthwise_conv2d.triton")

BACKENDS = ("triton", "onednn", "conv2d", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_float_backend = pytest.mark.parametrize("backend", ["triton", "conv2d", "reference"])
SHAPES = {  # B, C, H, W, kernel, stride, padding, dilation
    "3x3": (2, 33, 7, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "one of all": (1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "one pixel": (3, 31, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "three channels": (1, 3, 17, 17, (5, 5), (2, 2), (1, 2, 1, 2), (1, 1)),
    "a block of channels": (1, 64, 5, 7, (3, 3), (1, 2), (0, 1, 2, 0), (1, 1)),
    "blocks of channels": (1, 130, 4, 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "dilated": (1, 8, 9, 11, (3, 3), (1, 1), (2, 2, 3, 1), (2, 3)),
    "no square": (2, 5, 3, 12, (1, 7), (1, 3), (3, 3, 0, 0), (1, 1)),
    "7x7": (1, 16, 7, 7, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
    "all padding": (1, 4, 2, 2, (3, 3), (3, 3), (4, 4, 4, 4), (1, 1)),
    "no images": (0, 8, 5, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, body)


def skip_codes(backend: str, device: torch.device) -> None:
    if backend in ("conv2d", "onednn") and device.type == "cuda":
        pytest.skip("torch has no exact sums of codes on a GPU")
    if backend == "onednn" and onednn.why_not_here():
        pytest.skip(onednn.why_not_here())


def call_of(
    shape: str, device: torch.device, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Images, weights, and the window's arguments."""
    b, c, h, w, kernel, stride, padding, dilation = SHAPES[shape]
    if dtype == torch.int8:
        x, weight = codes(b, c, h, w), codes(c, 1, *kernel, seed=1)
    else:
        x, weight = reals(b, c, h, w, dtype=dtype), reals(c, 1, *kernel, seed=1, dtype=dtype)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return x.to(device), weight.to(device), window


@every_backend
@every_shape
@pytest.mark.parametrize("zero_point", [0, -128])
def test_sums_of_codes_are_exact(
    shape: str, zero_point: int, backend: str, device: torch.device
) -> None:
    skip_codes(backend, device)
    if backend == "onednn" and shape == "no images":
        pytest.skip("oneDNN takes no empty batch")
    x, weight, window = call_of(shape, device)
    found = depthwise_conv2d(
        x, weight, **window, zero_point=zero_point, out_dtype=torch.int32, backend=backend
    )
    assert found.dtype == torch.int32
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = exact_depthwise(x, weight, **window, zero_point=zero_point)
    assert torch.equal(found.cpu(), exact.int())


@every_float_backend
@every_shape
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, weight, window = call_of(shape, device, dtype)
    bias = reals(weight.shape[0]).to(device)
    found = depthwise_conv2d(x, weight, bias, **window, activation="relu", backend=backend)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = exact_depthwise(x, weight, **window) + bias.cpu().double()[:, None, None]
    assert error_norm(found, exact.relu()) <= TOLERANCES[dtype]


@pytest.mark.parametrize("stride", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("padding", [0, 2, (2, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 1)], ids=str)
def test_the_reference_is_torchs(stride: Any, padding: Any, dilation: Any) -> None:
    x, weight, bias = reals(2, 5, 11, 9), reals(5, 1, 3, 5), reals(5)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    for backend in ("reference", "conv2d"):
        found = depthwise_conv2d(x, weight, bias, **window, backend=backend)
        torch.testing.assert_close(found, functional.conv2d(x, weight, bias, **window, groups=5))


@pytest.mark.parametrize("kernel", [(3, 3), (5, 2), (4, 7)], ids=str)
def test_same_padding(kernel: tuple[int, int]) -> None:
    x, weight = reals(1, 4, 10, 13), reals(4, 1, *kernel)
    for dilation in (1, 2):
        window = {"padding": "same", "dilation": dilation}
        found = depthwise_conv2d(x, weight, **window)
        torch.testing.assert_close(found, functional.conv2d(x, weight, **window, groups=4))
    for stride in (2, 3):
        found = depthwise_conv2d(x, weight, stride=stride, padding="same")
        assert found.shape[2:] == (math.ceil(10 / stride), math.ceil(13 / stride))
    # TensorFlow's SAME: the odd pixel comes last
    assert make_window((3, 3), (224, 113), 2, "same", 1).padding == (1, 1, 0, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from([1, 3, 5]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(-128, 127),
    st.booleans(),
)
def test_any_window(
    size: Any, kh: int, kw: int, stride: Any, padding: Any, dilation: Any, point: int, last: bool
) -> None:
    channels, height, width = size[1:]
    left, right, top, bottom = padding
    if height + top + bottom <= dilation[0] * (kh - 1) or width + left + right <= dilation[1] * (
        kw - 1
    ):
        return
    x, weight = codes(*size), codes(channels, 1, kh, kw, seed=1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    window = {"stride": stride, "padding": padding, "dilation": dilation, "zero_point": point}
    exact = exact_depthwise(x, weight, **window)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("triton", "reference", "auto"):
        found = depthwise_conv2d(
            x.to(device), weight.to(device), **window, out_dtype=torch.int32, backend=backend
        )
        assert torch.equal(found.cpu().long(), exact)
    real = depthwise_conv2d(
        x.to(device).half(), weight.to(device).half() / 64, **{**window, "zero_point": 0},
        out_dtype=torch.float32, backend="triton",
    )  # fmt: skip
    exact = exact_depthwise(x, weight, stride, padding, dilation)
    assert torch.equal(real.cpu().double() * 64, exact.double()), "exact in float32 too"


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_epilogue_of_codes(activation: str, backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    x, weight, window = call_of("3x3", device)
    scale_x, scale_w = torch.tensor(0.02, device=device), reals(33).abs().to(device) * 0.01
    arguments = {"scale_x": scale_x, "scale_w": scale_w, "activation": activation, **window}
    bias = reals(33, seed=2).to(device)
    found = depthwise_conv2d(x, weight, bias, **arguments, backend=backend)
    assert found.dtype == torch.float32
    sums = exact_depthwise(x, weight, **window).to(device).double()
    y = sums * scale_x.double() * scale_w.double()[:, None, None] + bias.double()[:, None, None]
    expected = ACTIVATIONS[activation](y)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    half = depthwise_conv2d(x, weight, bias, **arguments, out_dtype=torch.float16, backend=backend)
    torch.testing.assert_close(half, expected.half(), rtol=1e-3, atol=1e-5)
    step = 0.05
    out = {"out_scale": torch.tensor(step, device=device), "out_zero_point": -100}
    got = depthwise_conv2d(x, weight, bias, **arguments, **out, backend=backend)
    assert got.dtype == torch.int8
    wanted = (expected / step).round().add(-100).clamp(-128, 127)
    assert int((got.double() - wanted).abs().max()) <= 1
    assert float((got.double() != wanted).double().mean()) < 0.01, "ties alone differ"


@every_backend
def test_one_scale_for_all_channels_and_codes_of_floats(backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    scale = torch.tensor(0.01, device=device)
    x, weight, window = call_of("dilated", device)
    found = depthwise_conv2d(x, weight, **window, scale_x=scale, scale_w=scale, backend=backend)
    exact = exact_depthwise(x, weight, **window).double() * scale.double().item() ** 2
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-6, atol=0)
    if backend == "onednn":
        return
    x, weight, window = call_of("dilated", device, torch.float32)
    found = depthwise_conv2d(x, weight, **window, out_scale=scale, backend=backend)
    exact = (exact_depthwise(x, weight, **window) / scale.cpu().double()).round().clamp(-128, 127)
    assert int((found.cpu().double() - exact).abs().max()) <= 1


@every_float_backend
def test_nan_stays_where_it_is(backend: str, device: torch.device) -> None:
    x, weight, window = call_of("7x7", device, torch.float32)
    x[0, 3, 3, 3] = math.nan
    for activation in ACTIVATIONS:
        y = depthwise_conv2d(x, weight, **window, activation=activation, backend=backend)
        assert y[0, 3].isnan().all()
        assert not y[0, [0, 1, 2, 4, 15]].isnan().any()


@every_backend
def test_any_memory_order(backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    x, weight, window = call_of("3x3", device)
    expected = exact_depthwise(x, weight, **window).int()
    wide = codes(2, 33, 7, 18).to(device)
    wide[..., ::2] = x
    for image in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        for kernel in (weight, weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)):
            found = depthwise_conv2d(
                image, kernel, **window, out_dtype=torch.int32, backend=backend
            )
            assert torch.equal(found.cpu(), expected)
            assert found.is_contiguous(memory_format=torch.channels_last)


def test_weights_by_taps_are_not_copied() -> None:
    weight = codes(8, 1, 3, 5)
    taps = body.by_taps(weight)
    assert torch.equal(taps[1, 4], weight[:, 0, 1, 4])
    again = taps.permute(2, 0, 1).unsqueeze(1)
    assert body.by_taps(again).data_ptr() == taps.data_ptr()


TILES = [
    {"BLOCK_H": 1, "BLOCK_W": 16, "BLOCK_C": 16, "ROW": 0},
    {"BLOCK_H": 8, "BLOCK_W": 4, "BLOCK_C": 8, "ROW": 1},
    {"BLOCK_H": 16, "BLOCK_W": 16, "BLOCK_C": 64, "ROW": 0},
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_any_tiles(tiles: dict[str, int], device: torch.device) -> None:
    x, weight, window = call_of("3x3", device)
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    place = Window((3, 3), window["stride"], window["padding"], window["dilation"])
    found = body.depthwise_conv2d(
        x, weight, Convolution(place, 7, raw), {**tiles, "num_warps": 4, "num_stages": 1}
    )
    assert torch.equal(found.cpu(), exact_depthwise(x, weight, **window, zero_point=7).int())


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Pixels 2.6 * 10**9 bytes apart; memory of zeros that nobody reads is not taken."""
    if device.type == "cuda":
        pytest.skip("memory of zeros is taken there")
    x = torch.from_numpy(np.zeros((1, 1, 65536, 40000), dtype=np.int8))
    for h in (0, -1):
        for w in (0, -1):
            x[0, 0, h, w] = 5 + 2 * h + w
    found = depthwise_conv2d(
        x, codes(1, 1, 1, 1), stride=(65535, 39999), out_dtype=torch.int32, backend="triton"
    )
    factor = int(codes(1, 1, 1, 1))
    assert (found[0, 0] // factor).tolist() == [[5, 4], [3, 2]]


def test_sequences() -> None:
    x, weight, bias = reals(2, 6, 12), reals(6, 1, 4), reals(6)
    for padding in (0, 2):
        found = depthwise_conv1d(x, weight, bias, stride=2, padding=padding, activation="silu")
        expected = functional.conv1d(x, weight, bias, 2, padding, groups=6)
        torch.testing.assert_close(found, functional.silu(expected))
    same = depthwise_conv1d(x, weight, padding="same", dilation=2)
    torch.testing.assert_close(
        same, functional.conv1d(x, weight, padding="same", dilation=2, groups=6)
    )
    causal = depthwise_conv1d(x, weight, padding=(3, 0))
    torch.testing.assert_close(
        causal, functional.conv1d(functional.pad(x, (3, 0)), weight, groups=6)
    )
    assert depthwise_conv1d(x.transpose(1, 2).contiguous().transpose(1, 2), weight).stride(1) == 1
    with pytest.raises(InputError, match=r"x \[2, 6, 12\] and weight \[6, 4\] do not fit"):
        depthwise_conv1d(x, weight[:, 0])


OPERATOR_CASES = {
    "floats": (torch.float32, torch.float16),
    "codes": (torch.int8, torch.int8),
}


@pytest.mark.parametrize("kind", OPERATOR_CASES)
@pytest.mark.parametrize("backend", ["reference", "conv2d", "triton"])
def test_the_operator_is_sound(kind: str, backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    dtype, out = OPERATOR_CASES[kind]
    x, weight, window = call_of("dilated", device, dtype)
    scale = torch.tensor(0.01, device=device) if kind == "codes" else None
    tensors = (x, weight, reals(8).to(device), scale, scale, scale)
    numbers = (window["stride"], window["padding"], window["dilation"])
    points = (3, -5) if kind == "codes" else (0, 0)
    arguments = (*tensors, *numbers, "relu", *points, out, backend)
    torch.library.opcheck(torch.ops.octavo.depthwise_conv2d, arguments)


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(reals(4, 1, 3, 3))
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = depthwise_conv2d(
            x * 2, self.weight, stride=2, padding="same", activation="silu", backend=self.backend
        )
        return y + 1


def test_compile_and_export() -> None:
    x = reals(3, 4, 9, 9)
    batch = {"x": {0: torch.export.Dim("batch")}}
    for backend in ("reference", "auto"):
        layer = Layer(backend)
        expected = layer(x)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(compiled(x[:2]), expected[:2])
        program = torch.export.export(layer, (x,), dynamic_shapes=batch)
        assert any("depthwise_conv2d" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x[:2]), expected[:2])


def test_inductor_sees_plain_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x, weight, _ = call_of("3x3", torch.device("cpu"))
    scale = torch.tensor(0.01)

    options = {"padding": 1, "scale_x": scale, "scale_w": scale, "zero_point": 4}

    def call(x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, weight, **options, out_scale=scale)

    found = torch.compile(call, fullgraph=True, backend=keep)(x)
    expected = depthwise_conv2d(x, weight, **options, out_scale=scale, backend="conv2d")
    assert torch.equal(found, expected)
    assert not any("octavo" in str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    x, weight, bias = reals(2, 3, 6, 5), reals(3, 1, 3, 3), reals(3)
    found = [one.clone().requires_grad_() for one in (x, weight, bias)]
    wanted = [one.clone().requires_grad_() for one in (x, weight, bias)]
    window = {"stride": (2, 1), "padding": (1, 0)}
    depthwise_conv2d(*found, **window, activation=activation).square().sum().backward()
    plain = ACTIVATIONS[activation](functional.conv2d(*wanted, **window, groups=3))
    plain.square().sum().backward()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradients_by_differences() -> None:
    arguments = [one.requires_grad_() for one in (reals(1, 2, 4, 4), reals(2, 1, 3, 3), reals(2))]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(*tensors, padding=(0, 1, 2, 1), activation="silu")

    torch.autograd.gradcheck(call, arguments, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, _ = call_of("3x3", torch.device("cpu"))
    depthwise_conv2d(x, weight, out_dtype=torch.int32)
    decision = explain("depthwise_conv2d")
    assert decision.body == ("conv2d" if onednn.why_not_here() else "onednn")
    depthwise_conv2d(x.float(), weight.float())
    assert explain("depthwise_conv2d").body == "conv2d"
    assert decision.passed_over[0][0] == "triton"
    wide = codes(1, 1, 32, 33)
    depthwise_conv2d(wide, wide, out_dtype=torch.int32)
    assert explain("depthwise_conv2d").body == "reference"
    with pytest.raises(UnsupportedError, match="sums over 1056 taps are not exact in float32"):
        depthwise_conv2d(wide, wide, out_dtype=torch.int32, backend="conv2d")


def test_the_largest_sums_of_conv2d_are_exact() -> None:
    """As many taps of the largest codes as it accepts, and the worst zero point."""
    side = math.isqrt(conv2d.MOST_TAPS)
    x = torch.full((1, 1, side, side), 127, dtype=torch.int8)
    weight = torch.full((1, 1, side, side), -128, dtype=torch.int8)
    for corner in (0, 1, 2):
        window = {"padding": (corner, 0, 0, corner), "zero_point": -128}
        found = depthwise_conv2d(x, weight, **window, out_dtype=torch.int32, backend="conv2d")
        exact = exact_depthwise(x, weight, (1, 1), window["padding"], (1, 1), -128)
        assert torch.equal(found, exact.int())


ONE = torch.tensor(1.0)
Q, QW = codes(2, 4, 5, 5), codes(4, 1, 3, 3)
CODES = {"x": Q, "weight": QW, "scale_x": ONE, "scale_w": ONE}
REALS = {"x": reals(2, 4, 5, 5), "weight": reals(4, 1, 3, 3)}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (REALS, {"x": Q.double()}, "x is torch.float64; it must be one of"),
        (REALS, {"weight": QW}, "weight is torch.int8 and x torch.float32; convert one"),
        (REALS, {"weight": reals(3, 1, 3, 3)}, r"x \[2, 4, 5, 5\] and weight \[3, 1, 3, 3\] do"),
        (REALS, {"x": reals(4, 5, 5)}, r"x \[4, 5, 5\] and weight"),
        (REALS, {"x": reals(2, 4, 0, 5)}, r"x \[2, 4, 0, 5\] or weight .* is empty; only the"),
        (REALS, {"weight": reals(4, 1, 3, 3).to("meta")}, "weight is on meta and x on cpu; move"),
        (REALS, {"stride": 0}, "stride is 0; give a number or .vertical, horizontal., from 1"),
        (REALS, {"dilation": (1, 1, 1)}, r"dilation is \(1, 1, 1\); give a number"),
        (REALS, {"padding": -1}, "padding is -1; give a number"),
        (REALS, {"padding": (1, 2, 3)}, r"padding is \(1, 2, 3\); give one number"),
        (REALS, {"padding": (1, 2, 3, -1)}, r"padding is \(1, 2, 3, -1\); give one number"),
        (REALS, {"padding": "valid"}, "padding 'valid' is unknown; use 'same' or numbers"),
        (REALS, {"dilation": 3}, "no window of 7 x 7 pixels fits into an image of 5 x 5"),
        (REALS, {"zero_point": 3}, "zero_point is 3 and belongs to int8 codes, and x is"),
        (REALS, {"scale_x": ONE}, "scales and int32 output belong to int8 codes, and x is"),
        (REALS, {"out_dtype": torch.int32}, "scales and int32 output belong to int8 codes"),
        (REALS, {"out_dtype": torch.float64}, "out_dtype torch.float64 is unknown"),
        (REALS, {"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        (REALS, {"bias": torch.ones(3)}, r"bias is torch.float32 \[3\]; it must be .* \[4\]"),
        (REALS, {"out_dtype": torch.int8}, "out_scale belongs to int8 output; give both"),
        (CODES, {"scale_w": None}, "torch.float32 output needs scale_x and scale_w"),
        (CODES, {"scale_w": torch.ones(3)}, r"scale_w is torch.float32 \[3\]; it must be"),
        (CODES, {"scale_x": torch.ones(2)}, r"scale_x is torch.float32 \[2\]; it must be"),
        (CODES, {"zero_point": 128}, "zero_point is 128; an int8 code is from -128 to 127"),
        (CODES, {"out_zero_point": 3}, "out_zero_point is 3 and belongs to int8 output"),
        (CODES, {"out_dtype": torch.int32}, "int32 output is the accumulators alone; leave"),
        (
            REALS,
            {"backend": "cudnn"},
            "no backend 'cudnn'; choose from auto, triton, onednn",
        ),
    ],
)
def test_what_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        depthwise_conv2d(**{**base, **changes})


GEOMETRIES = [  # H, W of the image, kernel, stride
    (112, 112, 3, 1),
    (56, 56, 5, 1),
    (28, 28, 7, 1),
    (14, 14, 3, 2),
    (7, 7, 7, 1),
    (1, 2048, 4, 1),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_tiles_are_such_as_a_kernel_takes(geometry: Any, size: int) -> None:
    height, width, kernel, stride = geometry
    pad = (kernel - 1) // 2
    vertical = (1, 0) if height == 1 else (kernel, pad)
    window = Window((vertical[0], kernel), (stride, stride), (pad, pad, *[vertical[1]] * 2), (1, 1))
    out = window.out_size(height, width)
    for channels in (3, 32, 96, 1024):
        offered = list(candidates(8, *out, channels, size))
        assert 0 < len(offered) <= 30
        for tiles in [config(8, *out, channels, size), *offered]:
            blocks = [tiles[name] for name in ("BLOCK_H", "BLOCK_W", "BLOCK_C")]
            assert all(block & (block - 1) == 0 and block > 0 for block in blocks)
            assert math.prod(blocks) <= 32 * 32 * tiles["num_warps"]
            assert tiles["BLOCK_C"] * size <= 128
            # no pixel is left out, and none is counted less than once
            assert loaded_pixels(window, *out, tiles) >= out[0] * out[1]


def counted(window: Window, out: tuple[int, int], tiles: dict[str, int]) -> int:
    """The same as `loaded_pixels`, pixel by pixel."""
    total = 0
    for first_h in range(0, out[0], tiles["BLOCK_H"]):
        for first_w in range(0, out[1], tiles["BLOCK_W"]):
            total += len(
                {
                    (h * window.stride[0] + i * window.dilation[0],
                     w * window.stride[1] + j * window.dilation[1])
                    for h in range(first_h, min(out[0], first_h + tiles["BLOCK_H"]))
                    for w in range(first_w, min(out[1], first_w + tiles["BLOCK_W"]))
                    for i in range(window.kernel[0])
                    for j in range(window.kernel[1])
                }
            )  # fmt: skip
    return total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_loaded_pixels_by_hand(kernel: int, stride: int) -> None:
    window = Window((kernel, 3), (stride, 1), (1, 1, 1, 1), (1, 1))
    for tiles in ({"BLOCK_H": 4, "BLOCK_W": 2}, {"BLOCK_H": 8, "BLOCK_W": 16}):
        out = (13, 9)
        assert loaded_pixels(window, *out, tiles) == counted(window, out, tiles)


# what the rule's tiles read of an image, where no pixel that another program read is in a cache
MOST_READ = {3: 1.6, 5: 2.4, 7: 3.3}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kernel", MOST_READ)
def test_what_the_rule_reads_again(kernel: int, size: int) -> None:
    pad = (kernel - 1) // 2
    for side in (112, 56, 28, 14):
        window = Window((kernel, kernel), (1, 1), (pad,) * 4, (1, 1))
        found = loaded_pixels(window, side, side, config(32, side, side, 128, size))
        assert found <= MOST_READ[kernel] * (side + 2 * pad) ** 2


def test_small_images_have_enough_programs() -> None:
    few, many = (config(batch, 7, 7, 1024, 2) for batch in (1, 32))
    assert few["num_warps"] < many["num_warps"]
    assert few["BLOCK_H"] * few["BLOCK_W"] < many["BLOCK_H"] * many["BLOCK_W"]


def test_what_decides_a_bucket() -> None:
    x, weight, _ = call_of("3x3", torch.device("cpu"))
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    one = Convolution(make_window((3, 3), (7, 9), 1, 1, 1), 0, raw)
    two = Convolution(make_window((3, 3), (7, 9), 2, 1, 1), 0, raw)
    assert schema.kind(x, weight, one) != schema.kind(x, weight, two)

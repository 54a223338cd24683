"""Both halves in one kernel: codes to the bit, floats within a rounding, in all its bodies."""

from __future__ import annotations

import itertools
import math
from typing import Any

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
from octavo.kernels import depthwise_separable_conv2d, explain
from octavo.kernels.depthwise_conv2d.reference import Convolution
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.depthwise_separable_conv2d.tiles import (
    candidates,
    config,
    loaded_bytes,
    pieces,
)
from octavo.kernels.int8_gemm.reference import ACTIVATIONS, Epilogue
from octavo.kernels.rounding import to_int8
from octavo.kernels.window import Window

body = pytest.importorskip("octavo.kernels.depthwise_separable_conv2d.triton")

BACKENDS = ("triton", "two-kernel", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = {  # B, C, H, W, N, kernel, stride, padding, dilation
    "3x3": (2, 33, 7, 6, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "one of all": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "stride": (1, 3, 17, 17, 7, (5, 5), (2, 2), (1, 2, 1, 2), (1, 1)),
    "blocks of channels": (1, 130, 4, 5, 16, (3, 3), (1, 2), (0, 1, 2, 0), (1, 1)),
    "many outputs": (1, 31, 3, 3, 270, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "dilated": (1, 64, 7, 7, 33, (3, 3), (1, 1), (2, 2, 3, 1), (2, 3)),
    "no images": (0, 8, 5, 5, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, body)


def call_of(
    shape: str, device: torch.device, dtype: torch.dtype = torch.int8
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that every call has, and those of the window."""
    b, c, h, w, n, kernel, stride, padding, dilation = SHAPES[shape]
    if dtype == torch.int8:
        x, dw, pw = codes(b, c, h, w), codes(c, 1, *kernel, seed=1), codes(n, c, seed=2)
    else:
        x = reals(b, c, h, w, dtype=dtype)
        dw, pw = reals(c, 1, *kernel, seed=1, dtype=dtype), reals(n, c, seed=2, dtype=dtype)
    values = {
        "x": x, "dw_weight": dw, "dw_bias": reals(c), "pw_weight": pw, "pw_bias": reals(n),
    }  # fmt: skip
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    return {name: value.to(device) for name, value in values.items()}, window


def scales_of(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Scales under which few codes in the middle saturate."""
    c, n = values["dw_weight"].shape[0], values["pw_weight"].shape[0]
    found = {
        "scale_x": torch.tensor(0.02),
        "dw_scale": reals(c, seed=4).abs() * 0.01 + 1e-3,
        "mid_scale": torch.tensor(0.05),
        "pw_scale": reals(n, seed=5).abs() * 0.01 + 1e-3,
    }
    placed: dict[str, Any] = {name: value.to(device) for name, value in found.items()}
    return {**placed, "zero_point": -7, "mid_zero_point": 12}


def middle_codes(
    values: dict[str, Any], window: dict[str, Any], scales: dict[str, Any], activation: str
) -> torch.Tensor:
    """The codes between the halves, in float32 as documented; int64 [B, C, H', W']."""
    point = scales["zero_point"]
    sums = exact_depthwise(values["x"], values["dw_weight"], **window, zero_point=point)
    y = sums.float() * scales["scale_x"].cpu() * scales["dw_scale"].cpu()[:, None, None]
    y = ACTIVATIONS[activation](y + values["dw_bias"].cpu()[:, None, None])
    return to_int8(y, scales["mid_scale"].cpu(), scales["mid_zero_point"]).long()


@every_backend
@every_shape
def test_sums_of_codes_are_exact(shape: str, backend: str, device: torch.device) -> None:
    values, window = call_of(shape, device)
    scales = scales_of(values, device)
    middle = middle_codes(values, window, scales, "relu6")
    exact = torch.einsum("bchw,nc->bnhw", middle, values["pw_weight"].cpu().long())
    del scales["pw_scale"]
    found = depthwise_separable_conv2d(
        **{**values, "pw_bias": None}, **window, **scales,
        dw_activation="relu6", out_dtype=torch.int32, backend=backend,
    )  # fmt: skip
    assert found.is_contiguous(memory_format=torch.channels_last)
    if device.type == "cuda":  # a product and a sum fused: a few codes of the middle differ
        assert error_norm(found, exact) < 1e-3
    else:
        assert torch.equal(found, exact.int())


@every_backend
@pytest.mark.parametrize("residual", ["none", "floats", "codes"])
@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_the_epilogue_of_codes(
    activation: str, residual: str, backend: str, device: torch.device
) -> None:
    values, window = call_of("3x3", device)
    scales = scales_of(values, device)
    arguments = {**values, **window, **scales, "dw_activation": "relu", "pw_activation": activation}
    middle = middle_codes(values, window, scales, "relu")
    sums = torch.einsum("bchw,nc->bnhw", middle, values["pw_weight"].cpu().long()).double()
    y = sums * scales["mid_scale"].cpu().double() * scales["pw_scale"].cpu().double()[:, None, None]
    expected = ACTIVATIONS[activation](y + values["pw_bias"].cpu().double()[:, None, None])
    if residual == "floats":
        added = reals(*expected.shape)
        arguments["residual"] = added.to(device)
        expected = expected + added
    elif residual == "codes":
        added, scale = codes(*expected.shape), torch.tensor(0.01)
        arguments |= {"residual": added.to(device), "residual_scale": scale.to(device)}
        arguments["residual_zero_point"] = 9
        expected = expected + (added.double() - 9) * scale
    found = depthwise_separable_conv2d(**arguments, backend=backend)
    assert found.dtype == torch.float32
    assert error_norm(found, expected) < (1e-3 if device.type == "cuda" else 1e-6)
    step = float(expected.abs().max()) / 100
    out = {"out_scale": torch.tensor(step, device=device), "out_zero_point": 30}
    got = depthwise_separable_conv2d(**arguments, **out, backend=backend)
    assert got.dtype == torch.int8
    wanted = (expected / step).round().add(30).clamp(-128, 127)
    assert int((got.cpu().double() - wanted).abs().max()) <= 1
    assert float((got.cpu().double() != wanted).double().mean()) < 0.01, "ties alone differ"


@every_backend
@every_shape
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    values, window = call_of(shape, device, dtype)
    arguments = {**values, **window, "dw_activation": "relu6", "pw_activation": "silu"}
    sums = exact_depthwise(values["x"], values["dw_weight"], **window)
    middle = (sums + values["dw_bias"].cpu().double()[:, None, None]).clamp(0, 6).to(dtype)
    y = torch.einsum("bchw,nc->bnhw", middle.double(), values["pw_weight"].cpu().double())
    y = functional.silu(y + values["pw_bias"].cpu().double()[:, None, None])
    residual = reals(*y.shape, dtype=dtype)
    found = depthwise_separable_conv2d(**arguments, residual=residual.to(device), backend=backend)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error_norm(found, y + residual.double()) <= 2 * TOLERANCES[dtype]


def test_the_reference_is_torchs(device: torch.device) -> None:
    values, window = call_of("dilated", torch.device("cpu"), torch.float32)
    x, dw, dw_bias, pw, pw_bias = values.values()
    window["padding"] = 2
    y = functional.relu6(functional.conv2d(x, dw, dw_bias, **window, groups=64))
    expected = functional.gelu(functional.conv2d(y, pw[:, :, None, None], pw_bias))
    activations = {"dw_activation": "relu6", "pw_activation": "gelu"}
    for backend, weight in itertools.product(
        ("reference", "two-kernel"), (pw, pw[..., None, None])
    ):
        found = depthwise_separable_conv2d(
            x, dw, dw_bias, weight, pw_bias, **window, **activations, backend=backend
        )
        torch.testing.assert_close(found, expected)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 8), st.integers(1, 8)),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7]),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(1, 2),
    st.sampled_from(["same", "three"]),
    st.integers(-128, 127),
)
def test_any_shape(
    size: Any, n: int, kernel: int, stride: Any, dilation: int, padding: Any, point: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels = size[1]
    window = {"stride": stride, "dilation": dilation, "padding": padding}
    if padding == "three":
        window["padding"] = (dilation * (kernel - 1), 1, 0, dilation * (kernel - 1))
    x, dw, pw = codes(*size), codes(channels, 1, kernel, kernel, seed=1), codes(n, channels, seed=2)
    numbers = {"scale_x": 0.0123, "dw_scale": 0.0171, "mid_scale": 0.0713}  # few ties
    scales = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    results = [
        depthwise_separable_conv2d(
            x.to(device), dw.to(device), None, pw.to(device), None, **window, **scales,
            zero_point=point, mid_zero_point=point, out_dtype=torch.int32, backend=backend,
        )
        for backend in BACKENDS
    ]  # fmt: skip
    assert device.type == "cuda" or torch.equal(results[0], results[2])
    # codes of the middle may be one apart: by FMA on a GPU, by oneDNN's rounding on a CPU
    bound = pw.long().abs().sum(1).reshape(1, -1, 1, 1)
    for found in results[:2]:
        assert bool(((found - results[2]).cpu().long().abs() <= bound).all())


@every_backend
def test_nan_stays_in_its_window(backend: str, device: torch.device) -> None:
    values, window = call_of("3x3", device, torch.float32)
    values["x"][1, 5, 0, 0] = math.nan
    found = depthwise_separable_conv2d(
        **values, **window, dw_activation="relu6", pw_activation="relu", backend=backend
    )
    assert found[1, :, :2, :2].isnan().all()
    assert int(found.isnan().sum()) == 4 * found.shape[1]


TILES = [
    {"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_C": 32, "BLOCK_N": 16, "ROW": 1, "num_warps": 4},
    {"BLOCK_H": 2, "BLOCK_W": 16, "BLOCK_C": 64, "BLOCK_N": 64, "ROW": 0, "num_warps": 1},
]


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_any_tiles(tiles: dict[str, int], device: torch.device) -> None:
    values, window = call_of("3x3", device)
    place = Window((3, 3), window["stride"], window["padding"], window["dilation"])
    one = torch.tensor(1.0, device=device)
    first = Epilogue(one, one / 300, None, None, one, "none", torch.int8)
    last = Epilogue(None, None, None, None, None, "none", torch.int32)
    s = Separable(Convolution(place, 0, first), last)
    weights = values["dw_weight"], values["pw_weight"]
    found = body.depthwise_separable_conv2d(values["x"], *weights, s, {**tiles, "num_stages": 1})
    expected = depthwise_separable_conv2d(
        values["x"], weights[0], None, weights[1], None, **window, scale_x=one,
        dw_scale=one / 300, mid_scale=one, out_dtype=torch.int32, backend="reference",
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["floats", "codes"])
@every_backend
def test_the_operator_is_sound(kind: str, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if kind == "floats" else torch.int8
    values, window = call_of("stride", device, dtype)
    scales = dict.fromkeys(("scale_x", "dw_scale", "mid_scale", "pw_scale", "out_scale"))
    points = (0, 0, 0, 0)
    if kind == "codes":
        scales = dict.fromkeys(scales, torch.tensor(0.1, device=device))
        points = (3, -4, 5, 0)
    out = torch.float16 if kind == "floats" else torch.int8
    arguments = (
        *values.values(), None, *scales.values(), None, *window.values(),
        "relu", "relu6", *points, out, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.octavo.depthwise_separable_conv2d, arguments)


class Block(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.dw = torch.nn.Parameter(reals(4, 1, 3, 3))
        self.pw = torch.nn.Parameter(reals(4, 4))
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * depthwise_separable_conv2d(
            x, self.dw, None, self.pw, None, padding=1, dw_activation="relu",
            pw_activation="silu", residual=x, backend=self.backend,
        )  # fmt: skip


def test_compile_and_export() -> None:
    x = reals(3, 4, 6, 5)
    batch = {"x": {0: torch.export.Dim("batch")}}
    for backend in ("reference", "auto"):
        block = Block(backend)
        expected = block(x)
        with torch.no_grad():
            compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(compiled(x[:2]), expected[:2])
        program = torch.export.export(block, (x,), dynamic_shapes=batch)
        targets = [str(node.target) for node in program.graph.nodes]
        assert any("depthwise_separable_conv2d" in target for target in targets)
        torch.testing.assert_close(program.module()(x[:2]), expected[:2])


def test_gradients() -> None:
    tensors = (reals(2, 3, 6, 5), reals(3, 1, 3, 3), reals(3), reals(4, 3), reals(4))
    found = [one.clone().requires_grad_() for one in tensors]
    x, dw, dw_bias, pw, pw_bias = wanted = [one.clone().requires_grad_() for one in tensors]
    residual = reals(2, 4, 3, 5)
    added = [residual.clone().requires_grad_() for _ in range(2)]
    depthwise_separable_conv2d(
        *found, stride=(2, 1), padding=1, dw_activation="silu", pw_activation="relu",
        residual=added[0],
    ).square().sum().backward()  # fmt: skip
    middle = functional.silu(functional.conv2d(x, dw, dw_bias, (2, 1), 1, groups=3))
    y = functional.conv2d(middle, pw[:, :, None, None], pw_bias).relu() + added[1]
    y.square().sum().backward()
    for one, other in zip([*found, added[0]], [*wanted, added[1]], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values, window = call_of("3x3", torch.device("cpu"), torch.float32)
    depthwise_separable_conv2d(**values, **window)
    decision = explain("depthwise_separable_conv2d")
    assert decision.body == "two-kernel"
    assert decision.passed_over[0][0] == "triton"
    with pytest.raises(UnsupportedError, match="backend 'triton' of depthwise_separable_conv2d ca"):
        depthwise_separable_conv2d(**values, **window, backend="triton")


ONE = torch.tensor(1.0)
REALS = {
    "x": reals(2, 4, 5, 5), "dw_weight": reals(4, 1, 3, 3), "dw_bias": None,
    "pw_weight": reals(6, 4), "pw_bias": None,
}  # fmt: skip
CODES = {
    **REALS, "x": codes(2, 4, 5, 5), "dw_weight": codes(4, 1, 3, 3), "pw_weight": codes(6, 4),
    "scale_x": ONE, "dw_scale": ONE, "mid_scale": ONE, "pw_scale": ONE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (REALS, {"dw_weight": reals(3, 1, 3, 3)}, r"x .* and weight \[3, 1, 3, 3\] do not fit"),
        (REALS, {"pw_weight": reals(6, 5)}, r"pw_weight \[6, 5\] does not fit; it is \[N, 4\]"),
        (REALS, {"pw_weight": reals(6, 4, 3, 3)}, r"pw_weight \[6, 4, 3, 3\] does not fit"),
        (REALS, {"pw_weight": codes(6, 4)}, "pw_weight is torch.int8 and x torch.float32; conv"),
        (REALS, {"pw_weight": reals(6, 4).to("meta")}, "pw_weight is on meta and x on cpu; move"),
        (REALS, {"mid_scale": ONE}, "scale_x, dw_scale, mid_scale and mid_zero_point belong to"),
        (REALS, {"mid_zero_point": 3}, "and mid_zero_point belong to int8 codes, and x is torch"),
        (REALS, {"pw_scale": ONE}, "scales and int32 output belong to int8 codes, and x is"),
        (REALS, {"residual": reals(2, 6, 5, 5)}, r"residual .*; it must be .* \[2, 6, 3, 3\]"),
        (REALS, {"dw_bias": reals(6)}, r"dw_bias is torch.float32 \[6\]; it must be .* \[4\]"),
        (REALS, {"pw_bias": reals(4)}, r"pw_bias is torch.float32 \[4\]; it must be .* \[6\]"),
        (REALS, {"dw_activation": "tanh"}, "activation 'tanh' is unknown"),
        (REALS, {"pw_activation": "tanh"}, "activation 'tanh' is unknown"),
        (CODES, {"mid_scale": None}, "int8 codes need scale_x, dw_scale, mid_scale; give all"),
        (CODES, {"mid_zero_point": 200}, "mid_zero_point is 200; an int8 code is from -128"),
        (CODES, {"dw_scale": torch.ones(6)}, r"dw_scale is torch.float32 \[6\]; it must be"),
        (CODES, {"pw_scale": torch.ones(4)}, r"pw_scale is torch.float32 \[4\]; it must be"),
        (CODES, {"out_dtype": torch.int32}, "int32 output is the accumulators alone; leave"),
        (CODES, {"residual": codes(2, 6, 3, 3)}, "residual_scale belongs to a residual of int8"),
        (REALS, {"backend": "one"}, "no backend 'one'; choose from auto, triton, two-kernel, ref"),
    ],
)
def test_what_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        depthwise_separable_conv2d(**{**base, **changes})


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("side", "channels", "outputs"), [(112, 32, 64), (14, 512, 512), (7, 3, 5)]
)
def test_tiles_are_such_as_a_kernel_takes(
    side: int, channels: int, outputs: int, size: int
) -> None:
    offered = list(candidates(side, side, channels, outputs, size))
    assert 0 < len(offered) <= 30
    for tiles in [config(side, side, channels, outputs, size), *offered]:
        pixels = tiles["BLOCK_H"] * tiles["BLOCK_W"]
        assert all(tiles[f"BLOCK_{axis}"] & (tiles[f"BLOCK_{axis}"] - 1) == 0 for axis in "HWCN")
        assert pixels >= 16
        assert tiles["BLOCK_C"] >= 32 // size
        assert tiles["BLOCK_N"] >= 16
        assert pieces(tiles) in (1, 2, 4)
        assert pixels * tiles["BLOCK_N"] <= 128 * 32 * tiles["num_warps"], "registers"


MOBILENET = [  # side, C, N, stride
    (112, 32, 64, 1),
    (112, 64, 128, 2),
    (56, 128, 256, 1),
    (28, 256, 512, 1),
    (14, 512, 512, 1),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("shape", MOBILENET, ids=str)
def test_what_the_rule_moves(shape: tuple[int, int, int, int], size: int) -> None:
    """What programs read and the result, beside every byte once; from the L2 cache, mostly."""
    side, channels, outputs, stride = shape
    window = Window((3, 3), (stride, stride), (1, 1, 1, 1), (1, 1))
    out = window.out_size(side, side)
    tiles = config(*out, channels, outputs, size)
    result = 32 * out[0] * out[1] * outputs * size
    read = loaded_bytes(window, 32, *out, channels, outputs, size, tiles)
    least = 32 * side**2 * channels * size + outputs * channels * size + result
    between = 2 * 32 * out[0] * out[1] * channels * size
    again = math.ceil(outputs / tiles["BLOCK_N"])
    assert again == math.ceil(outputs / 256)
    # 10 x 10 pixels are read for 8 x 8 results, the weights of a tile by each of its programs
    weights = 32 * math.ceil(out[0] / 8) * math.ceil(out[1] / 8) * outputs * channels * size
    assert read + result <= again * 1.75 * least + weights
    if again == 1:
        assert read - weights < 32 * side**2 * channels * size + between, "two kernels move more"

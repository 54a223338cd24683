"""Both halves in one kernel: codes to the bit, floats within a rounding, however it runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from convolutions import (
    SEPARABLE,
    TOLERANCES,
    codes,
    error_norm,
    exact_depthwise,
    lend_poisoned,
    reals,
    separable_call,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from octavo.kernels import depthwise_separable_conv2d
from octavo.kernels.common.codes import to_int8
from octavo.kernels.common.convolution import Convolution, Window
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.depthwise_separable_conv2d.reference import Separable

body = pytest.importorskip("octavo.kernels.depthwise_separable_conv2d.triton")

BACKENDS = ("triton", "two-kernel", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_shape = pytest.mark.parametrize("shape", SEPARABLE)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, body)


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
    values, window = separable_call(shape, device)
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
@pytest.mark.parametrize(
    ("activation", "residual"), [("none", "floats"), ("relu", "codes"), ("hardswish", "none")]
)
def test_the_epilogue_of_codes(
    activation: str, residual: str, backend: str, device: torch.device
) -> None:
    values, window = separable_call("3x3", device)
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
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(SEPARABLE, (torch.float32, torch.float16)), ("3x3", torch.bfloat16)],
    ids=str,
)
def test_floats(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    values, window = separable_call(shape, device, dtype)
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
    values, window = separable_call("dilated", torch.device("cpu"), torch.float32)
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


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5]),
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
    values, window = separable_call("3x3", device, torch.float32)
    values["x"][1, 5, 0, 0] = math.nan
    found = depthwise_separable_conv2d(
        **values, **window, dw_activation="relu6", pw_activation="relu", backend=backend
    )
    assert found[1, :, :2, :2].isnan().all()
    assert int(found.isnan().sum()) == 4 * found.shape[1]


CONFIGS = [
    {"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_C": 32, "BLOCK_N": 16, "ROW": 1, "num_warps": 4},
    {"BLOCK_H": 2, "BLOCK_W": 16, "BLOCK_C": 64, "BLOCK_N": 64, "ROW": 0, "num_warps": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_config(config: dict[str, int], device: torch.device) -> None:
    values, window = separable_call("3x3", device)
    place = Window((3, 3), window["stride"], window["padding"], window["dilation"])
    one = torch.tensor(1.0, device=device)
    first = Epilogue(one, one / 300, None, None, one, "none", torch.int8)
    last = Epilogue(None, None, None, None, None, "none", torch.int32)
    s = Separable(Convolution(place, 0, first, 33), last)
    weights = values["dw_weight"], values["pw_weight"]
    found = body.depthwise_separable_conv2d(values["x"], *weights, s, {**config, "num_stages": 1})
    expected = depthwise_separable_conv2d(
        values["x"], weights[0], None, weights[1], None, **window, scale_x=one,
        dw_scale=one / 300, mid_scale=one, out_dtype=torch.int32, backend="reference",
    )  # fmt: skip
    assert torch.equal(found, expected)

"""Depthwise convolution: sums of codes to the bit, floats within a rounding; all windows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import (
    DEPTHWISE,
    TOLERANCES,
    codes,
    depthwise_call,
    error_norm,
    exact_depthwise,
    lend_poisoned,
    reals,
    skip_codes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from octavo.core.errors import InputError
from octavo.kernels import depthwise_conv1d, depthwise_conv2d
from octavo.kernels.common.convolution import Convolution, Window, make_window
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.depthwise_conv2d import conv2d

body = pytest.importorskip("octavo.kernels.depthwise_conv2d.triton")

BACKENDS = ("triton", "onednn", "conv2d", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_float_backend = pytest.mark.parametrize("backend", ["triton", "conv2d", "reference"])
every_shape = pytest.mark.parametrize("shape", DEPTHWISE)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, body)


@every_backend
@every_shape
@pytest.mark.parametrize("zero_point", [0, -128])
def test_sums_of_codes_are_exact(
    shape: str, zero_point: int, backend: str, device: torch.device
) -> None:
    skip_codes(backend, device)
    if backend == "onednn" and shape == "no images":
        pytest.skip("oneDNN takes no empty batch")
    x, weight, window = depthwise_call(shape, device)
    found = depthwise_conv2d(
        x, weight, **window, zero_point=zero_point, out_dtype=torch.int32, backend=backend
    )
    assert found.dtype == torch.int32
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = exact_depthwise(x, weight, **window, zero_point=zero_point)
    assert torch.equal(found.cpu(), exact.int())


@every_float_backend
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(DEPTHWISE, (torch.float32, torch.float16)), ("3x3", torch.bfloat16)],
    ids=str,
)
def test_floats(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, weight, window = depthwise_call(shape, device, dtype)
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


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7)),
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
    x, weight, window = depthwise_call("no square", device)
    scale_x, scale_w = torch.tensor(0.02, device=device), reals(5).abs().to(device) * 0.01
    arguments = {"scale_x": scale_x, "scale_w": scale_w, "activation": activation, **window}
    bias = reals(5, seed=2).to(device)
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
    x, weight, window = depthwise_call("dilated", device)
    found = depthwise_conv2d(x, weight, **window, scale_x=scale, scale_w=scale, backend=backend)
    exact = exact_depthwise(x, weight, **window).double() * scale.double().item() ** 2
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-6, atol=0)
    if backend == "onednn":
        return
    x, weight, window = depthwise_call("dilated", device, torch.float32)
    found = depthwise_conv2d(x, weight, **window, out_scale=scale, backend=backend)
    exact = (exact_depthwise(x, weight, **window) / scale.cpu().double()).round().clamp(-128, 127)
    assert int((found.cpu().double() - exact).abs().max()) <= 1


@every_float_backend
def test_nan_stays_where_it_is(backend: str, device: torch.device) -> None:
    x, weight, window = depthwise_call("7x7", device, torch.float32)
    x[0, 3, 3, 3] = math.nan
    for activation in ACTIVATIONS:
        y = depthwise_conv2d(x, weight, **window, activation=activation, backend=backend)
        assert y[0, 3].isnan().all()
        assert not y[0, [0, 1, 2, 4, 15]].isnan().any()


@every_backend
def test_any_memory_order(backend: str, device: torch.device) -> None:
    skip_codes(backend, device)
    x, weight, window = depthwise_call("no square", device)
    expected = exact_depthwise(x, weight, **window).int()
    wide = codes(*x.shape[:3], 2 * x.shape[3]).to(device)
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


CONFIGS = [
    {"BLOCK_H": 1, "BLOCK_W": 16, "BLOCK_C": 16, "ROW": 0},
    {"BLOCK_H": 8, "BLOCK_W": 4, "BLOCK_C": 8, "ROW": 1},
    {"BLOCK_H": 16, "BLOCK_W": 16, "BLOCK_C": 64, "ROW": 0},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_config(config: dict[str, int], device: torch.device) -> None:
    x, weight, window = depthwise_call("3x3", device)
    raw = Epilogue(None, None, None, None, None, "none", torch.int32)
    place = Window((3, 3), window["stride"], window["padding"], window["dilation"])
    found = body.depthwise_conv2d(
        x, weight, Convolution(place, 7, raw, 33), {**config, "num_warps": 4, "num_stages": 1}
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

"""INT8 convolutions: accumulators to the bit, the epilogue to the last bit that float32 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convolutions import DENSE, codes, dense_call, lend_poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from octavo.core.errors import UnsupportedError
from octavo.kernels import fold_zero_point, int8_conv2d
from octavo.kernels.common.epilogue import ACTIVATIONS

triton_body = pytest.importorskip("octavo.kernels.int8_conv2d.triton")


BACKENDS = ("triton", "onednn", "int_mm")


every_backend = pytest.mark.parametrize("backend", BACKENDS)


def reals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    lend_poisoned(monkeypatch, triton_body)


def runs(backend: str, device: torch.device) -> None:
    """Skips what this machine cannot run."""
    if backend == "onednn" and device.type == "cuda":
        pytest.skip("oneDNN runs on CPUs")


def exact(x: torch.Tensor, w: torch.Tensor, zero_point: int, **window: Any) -> torch.Tensor:
    """The sums as torch has them in float64, of codes that the zero point was taken from."""
    left, right, top, bottom = window.pop("padding", (0, 0, 0, 0))
    padded = functional.pad(x.cpu().double() - zero_point, (left, right, top, bottom))
    sums = functional.conv2d(padded, w.cpu().double(), **window)
    constant = zero_point * w.cpu().double().sum((1, 2, 3))
    return (sums + constant[:, None, None]).int()


every_shape = pytest.mark.parametrize("shape", DENSE)


@every_shape
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("zero_point", [0, -128])
def test_accumulators_are_exact(
    shape: str, backend: str, zero_point: int, device: torch.device
) -> None:
    runs(backend, device)
    x, w, window = dense_call(shape)
    found = int8_conv2d(
        x.to(device), w.to(device), zero_point=zero_point, out_dtype=torch.int32, backend=backend,
        **window,
    )  # fmt: skip
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), exact(x, w, zero_point, **window))


@every_backend
def test_the_largest_sums(backend: str, device: torch.device) -> None:
    runs(backend, device)
    taps = 1 if backend == "onednn" else 3  # more products are left to others, see below
    x = torch.full((1, 1000, 3, 3), -128, dtype=torch.int8, device=device)
    w = torch.full((2, 1000, taps, taps), -128, dtype=torch.int8, device=device)
    found = int8_conv2d(x, w, out_dtype=torch.int32, backend=backend)
    assert bool((found == 1000 * taps * taps * 128**2).all())


def epilogue(shape: str, device: torch.device) -> dict[str, Any]:
    """All arguments, with scales that bring sums near 1."""
    x, w, window = dense_call(shape)
    n, like = len(w), exact(x, w, 0, **window)
    values: dict[str, Any] = {
        "x_q": x,
        "w_q": w,
        "scale_x": reals() * 0.01 + 0.01,
        "scale_w": (reals(n, seed=2) + 0.5) / (70 * w[0].numel() ** 0.5),
        "bias": reals(n, seed=3) - 0.5,
        "residual": reals(*like.shape, seed=4) - 0.5,
    }
    return {**window, **{name: value.to(device) for name, value in values.items()}}


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_epilogue(
    activation: str, out_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    runs(backend, device)
    for shape in ("every second pixel", "groups with a remainder"):
        arguments = {**epilogue(shape, device), "activation": activation, "out_dtype": out_dtype}
        if shape == "groups with a remainder":
            del arguments["residual"]
        elif activation == "none":  # oneDNN adds values of the result's type by itself
            arguments["residual"] = arguments["residual"].to(out_dtype)
        found, expected = (
            int8_conv2d(**arguments, zero_point=3, backend=b) for b in (backend, "reference")
        )
        assert found.dtype == out_dtype
        step = torch.finfo(out_dtype).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=2e-6)
        plain = activation in ("none", "relu", "relu6") and device.type == "cpu"
        if plain and (backend != "triton" or out_dtype != torch.bfloat16):
            assert torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("shape", ["channels with a remainder", "pointwise", "groups"])
@pytest.mark.parametrize("residual", ["none", "floats", "codes"])
def test_codes_out(shape: str, residual: str, backend: str, device: torch.device) -> None:
    runs(backend, device)
    arguments = epilogue(shape, device)
    if residual == "none":
        del arguments["residual"]
    elif residual == "codes":
        size = arguments["residual"].shape
        arguments |= {
            "residual": codes(*size, seed=9).to(device),
            "residual_scale": torch.tensor(0.02, device=device),
            "residual_zero_point": -9,
        }
    out = {"out_dtype": torch.int8, "out_scale": torch.tensor(0.007, device=device)}
    found, expected = (
        int8_conv2d(**arguments, **out, out_zero_point=-20, zero_point=7, backend=b)
        for b in (backend, "reference")
    )
    assert found.dtype == torch.int8
    off = (found.int() - expected.int()).abs()
    assert int(off.max()) <= 1, "a value at a tie may fall either way"
    assert int((off > 0).sum()) <= 2
    assert int(found.max()) == 127, "some must saturate"
    assert int(found.min()) == -128


def test_what_the_codes_stand_for() -> None:
    """The whole arithmetic in float64: values of codes, with a zero point, convolved with zeros."""
    x, w, window = dense_call("of one block")
    scale_x, scale_w = torch.tensor(0.02), reals(len(w)) * 0.01 + 0.001
    bias, zero_point = reals(len(w), seed=5), -7
    left, right, top, bottom = window["padding"]
    values = (x.double() - zero_point) * scale_x.double()
    y = functional.conv2d(
        functional.pad(values, (left, right, top, bottom)),
        w.double() * scale_w.double()[:, None, None, None],
        bias.double(),
    )
    folded = fold_zero_point(bias, w, scale_x, scale_w, zero_point)
    found = int8_conv2d(
        x, w, scale_x, scale_w, bias=folded, zero_point=zero_point, out_dtype=torch.float32,
        **window,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), y, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("channels", [False, True])
def test_folding_a_zero_point(channels: bool) -> None:
    w = codes(5, 3, 2, 2)
    scale_x = torch.tensor(0.3)
    scale_w = reals(5) if channels else torch.tensor(0.7)
    sums = w.double().sum((1, 2, 3))
    constant = 11 * sums * scale_x.double() * scale_w.double()
    bias = reals(5, seed=1).half()
    found = fold_zero_point(bias, w, scale_x, scale_w, 11)
    assert torch.equal(found, (bias.double() - constant).float())
    assert torch.equal(fold_zero_point(None, w, scale_x, scale_w, 11), (-constant).float())
    assert fold_zero_point(bias, w, scale_x, scale_w, 0) is bias
    assert fold_zero_point(None, w, scale_x, scale_w, 0) is None


@every_backend
def test_any_memory_format(backend: str, device: torch.device) -> None:
    runs(backend, device)
    x, w, window = dense_call("of one block")
    expected = exact(x, w, 0, **window)
    wide = codes(1, 7, 7, 64)
    wide[..., ::2] = x.permute(0, 2, 3, 1)
    views = (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2].permute(0, 3, 1, 2))
    for view in views:
        for weight in (w, w.contiguous(memory_format=torch.channels_last), w.transpose(2, 3)):
            if weight.shape == w.shape and torch.equal(weight, w):
                found = int8_conv2d(
                    view.to(device), weight.to(device), out_dtype=torch.int32, backend=backend,
                    **window,
                )  # fmt: skip
                assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_depthwise_has_a_kernel_of_its_own(residual: bool, device: torch.device) -> None:
    arguments = epilogue("depthwise", device)
    if not residual:
        del arguments["residual"]
    arguments |= {"out_dtype": torch.float32, "zero_point": -3}
    found, expected = (int8_conv2d(**arguments, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", ["pointwise", "stem"])
def test_no_images(shape: str, device: torch.device) -> None:
    values = epilogue(shape, device)
    values |= {name: values[name][:0] for name in ("x_q", "residual")}
    found, expected = (int8_conv2d(**values, backend=b) for b in ("triton", "reference"))
    assert found.shape == expected.shape
    assert found.shape[0] == 0
    assert torch.equal(found, int8_conv2d(**values))


sizes = st.integers(1, 9)


@settings(max_examples=50, deadline=None)
@given(
    image=st.tuples(st.integers(0, 2), sizes, sizes),
    channels=st.sampled_from([1, 3, 8, 16, 31, 33]),
    n=st.sampled_from([1, 5, 18]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(*[st.integers(0, 3)] * 4), st.just("same"), st.integers(2, 3)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2, 3]),
    zero_point=st.sampled_from([0, -128, 127]),
    activation=st.sampled_from(["none", "relu", "silu", "hardswish"]),
    out_dtype=st.sampled_from([torch.float32, torch.int8, torch.int32]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_call(
    image: tuple[int, int, int],
    channels: int,
    n: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Any,
    dilation: int,
    groups: int,
    zero_point: int,
    activation: str,
    out_dtype: torch.dtype,
    backend: str,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, height, width = image
    if (backend == "onednn" and device.type == "cuda") or not batch:
        backend = "auto"
    if isinstance(padding, tuple):  # so that a window fits
        height, width = height + 4, width + 4
    x = codes(batch, channels * groups, height, width).to(device)
    w = codes(n * groups, channels, *kernel, seed=1).to(device)
    arguments: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "zero_point": zero_point, "out_dtype": out_dtype,
    }  # fmt: skip
    if out_dtype != torch.int32:
        arguments |= {
            "scale_x": torch.tensor(0.01, device=device),
            "scale_w": (reals(n * groups) * 0.01).to(device),
            "bias": reals(n * groups, seed=1).to(device),
            "activation": activation,
        }
    if out_dtype == torch.int8:
        arguments |= {"out_scale": torch.tensor(0.05, device=device), "out_zero_point": 4}
    if backend == "int_mm" and device.type == "cpu" and n > 1 and w[0].numel() == 1:
        with pytest.raises(UnsupportedError, match="reads beyond its arguments where K is 1"):
            int8_conv2d(x, w, **arguments, backend=backend)
        backend = "auto"
    found, expected = (int8_conv2d(x, w, **arguments, backend=b) for b in (backend, "reference"))
    assert found.shape == expected.shape
    if out_dtype == torch.int32:
        assert torch.equal(found, expected)
    elif out_dtype == torch.int8:
        off = (found.int() - expected.int()).abs()
        assert not off.numel() or int(off.max()) <= 1
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)

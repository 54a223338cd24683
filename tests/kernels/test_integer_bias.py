"""A bias of int32: added to the accumulators, so that codes follow by one multiplication."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import (
    depthwise_conv2d,
    depthwise_separable_conv2d,
    int8_conv2d,
    int8_gemm,
)

ONE = torch.ones(())


def codes(*shape: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random).to(torch.int8)


def numbers(n: int, seed: int, products: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bias of int32, and steps under which sums of so many products fill the codes."""
    random = torch.Generator().manual_seed(seed)
    spread = int(128 * 128 * products**0.5 / 3)
    bias = torch.randint(-spread, spread, (n,), generator=random, dtype=torch.int32)
    return bias, (torch.rand(n, generator=random) + 0.5) * 60 / spread


def requantized(sums: torch.Tensor, bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """round(float32(sums + bias) * step) of sums [..., N] in int64, as an engine does it."""
    y = torch.round((sums + bias).float() * step) + 3
    return y.clamp(-128, 127).to(torch.int8)


def channels_last(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1)


def convolved(x: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums [B, H, W, N], exact in float64."""
    y = functional.conv2d(x.double(), w.double(), padding=w.shape[2] // 2, groups=groups)
    return channels_last(y.long())


def gemm(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = codes(37, 96, seed=1), codes(33, 96, seed=2)
    bias, step = numbers(33, 3, 96)
    options = {"out_dtype": torch.int8, "out_scale": ONE, "out_zero_point": 3}
    found = int8_gemm(x, w, ONE, step, bias=bias, **options, backend=backend)
    return found, requantized((x.double() @ w.double().T).long(), bias, step)


def conv(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = codes(2, 20, 7, 5, seed=1), codes(17, 20, 3, 3, seed=2)
    bias, step = numbers(17, 3, 180)
    options = {"padding": 1, "out_dtype": torch.int8, "out_scale": ONE, "out_zero_point": 3}
    found = int8_conv2d(x, w, ONE, step, bias=bias, **options, backend=backend)
    return channels_last(found), requantized(convolved(x, w, 1), bias, step)


def depthwise(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = codes(2, 19, 7, 5, seed=1), codes(19, 1, 3, 3, seed=2)
    bias, step = numbers(19, 3, 9)
    options = {"padding": 1, "out_scale": ONE, "out_zero_point": 3}
    found = depthwise_conv2d(x, w, bias, scale_x=ONE, scale_w=step, **options, backend=backend)
    return channels_last(found), requantized(convolved(x, w, 19), bias, step)


def separable(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, dw, pw = codes(2, 19, 7, 5, seed=1), codes(19, 1, 3, 3, seed=2), codes(21, 19, seed=4)
    (first, dw_step), (second, pw_step) = numbers(19, 3, 9), numbers(21, 5, 19)
    found = depthwise_separable_conv2d(
        *(x, dw, first, pw, second),
        padding=1,
        scale_x=ONE,
        dw_scale=dw_step,
        mid_scale=ONE,
        mid_zero_point=3,
        pw_scale=pw_step,
        out_scale=ONE,
        out_zero_point=3,
        backend=backend,
    )
    middle = requantized(convolved(x, dw, 19), first, dw_step)
    sums = (middle.double() @ pw.double().T).long()
    return channels_last(found), requantized(sums, second, pw_step)


BODIES = [
    (gemm, ("reference", "triton", "int_mm")),
    (conv, ("reference", "triton", "int_mm")),
    (depthwise, ("reference", "triton", "conv2d")),
    (separable, ("reference", "triton")),
]


@pytest.mark.parametrize(
    ("operator", "backend"), [(operator, body) for operator, bodies in BODIES for body in bodies]
)
def test_codes_have_the_bits_of_an_engine(
    operator: Callable[[str], tuple[torch.Tensor, torch.Tensor]], backend: str
) -> None:
    found, expected = operator(backend)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 100


@pytest.mark.parametrize("operator", [conv, depthwise, separable])
def test_cpu_codes_are_one_apart_at_ties_alone(
    operator: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    try:
        found, expected = operator("onednn")
    except (InputError, UnsupportedError):
        found, expected = operator("auto")
    off = (found.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 0.01


@pytest.mark.parametrize("backend", ["reference", "triton", "int_mm"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_floats(backend: str, activation: str) -> None:
    x, w = codes(18, 64, seed=1), codes(24, 64, seed=2)
    bias, step = numbers(24, 3, 64)
    options = {"bias": bias, "activation": activation, "out_dtype": torch.float32}
    found = int8_gemm(x, w, ONE, step, **options, backend=backend)
    exact = ((x.double() @ w.double().T) + bias) * step.double()
    exact = functional.gelu(exact) if activation == "gelu" else exact
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_floats_have_no_bias_of_int32() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3)
    with pytest.raises(InputError, match=r"bias is torch.int32 \[3\]; it must be"):
        depthwise_conv2d(x, w, torch.zeros(3, dtype=torch.int32))

"""INT8 products in C: every tile and tail, memory around the result, weights that change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.int8_gemm import native
from octavo.kernels.int8_gemm.reference import int8_gemm as oracle

pytestmark = pytest.mark.skipif(bool(native.LIBRARY.reason()), reason=native.LIBRARY.reason())


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x) + 2, len(w)), -7, dtype=torch.int32)
    native.product(x, w, None, None, None, "none", out[1:-1])
    assert (out[0] == -7).all(), "memory before the result"
    assert (out[-1] == -7).all(), "memory after the result"
    return out[1:-1]


@pytest.mark.parametrize("m", [*range(1, 14), 24, 47, 193])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 3), (31, 4), (32, 5), (33, 64), (65, 131)])
def test_every_tile_and_tail_is_exact(m: int, n: int, k: int) -> None:
    x, w = codes(m, k, seed=m), codes(n, k, seed=1)
    assert torch.equal(sums(x, w), (x.long() @ w.long().T).int())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(500, 40, 700), (3, 3000, 300), (200, 700, 1000)])
def test_any_number_of_threads(m: int, n: int, k: int, threads: int) -> None:
    x, w = codes(m, k), codes(n, k, seed=1)
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(sums(x, w), (x.double() @ w.double().T).int())
    finally:
        torch.set_num_threads(most)


@pytest.mark.parametrize("x_code", [-128, 127])
@pytest.mark.parametrize("w_code", [-128, 127])
def test_sums_that_leave_int32_on_the_way(x_code: int, w_code: int) -> None:
    x = torch.full((3, 131071), x_code, dtype=torch.int8)
    w = torch.full((2, 131071), w_code, dtype=torch.int8)
    assert sums(x, w).tolist() == [[x_code * w_code * 131071] * 2] * 3


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 70), st.integers(1, 90)),
    by_token=st.booleans(),
    by_channel=st.booleans(),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16, torch.int32]),
    residual=st.sampled_from([None, torch.float32, torch.float16]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    out=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 1000),
)
def test_any_epilogue(
    shape: tuple[int, int, int],
    by_token: bool,
    by_channel: bool,
    bias: torch.dtype | None,
    residual: torch.dtype | None,
    activation: str,
    out: torch.dtype,
    seed: int,
) -> None:
    (m, n, k), random = shape, torch.Generator().manual_seed(seed)

    def scales(count: int) -> torch.Tensor:
        return torch.rand(count, generator=random) * 1e-2 + 1e-4

    epilogue = Epilogue(
        scales(m) if by_token else scales(1)[0],
        scales(n) if by_channel else scales(1)[0],
        None if bias is None else (torch.randn(n, generator=random) * 9).to(bias),
        None if residual is None else torch.randn(m, n, generator=random).to(residual),
        torch.tensor(0.03) if out == torch.int8 else None,
        activation,
        out,
        out_zero_point=-11 if out == torch.int8 else 0,
    )
    x, w = codes(m, k, seed=seed), codes(n, k, seed=seed + 1)
    found, wanted = native.int8_gemm(x, w, epilogue), oracle(x, w, epilogue)
    assert found.dtype == out
    if activation in ("none", "relu", "relu6"):
        assert torch.equal(found, wanted)
    elif out == torch.int8:  # a last bit may lead to the next code
        assert int((found.int() - wanted.int()).abs().max()) <= 1
    else:
        step = 2 * torch.finfo(out).eps
        torch.testing.assert_close(found, wanted, rtol=step, atol=2e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "silu", "hardswish"])
def test_activations_against_float64(activation: str) -> None:
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, 1e30, 0.0, -5.5, 5.5])])
    ones = torch.ones(1, 1, dtype=torch.int8)
    found = torch.empty(1, len(values))
    scale = torch.ones(1)
    zeros = torch.zeros(len(values), 1, dtype=torch.int8)
    native.product(ones, zeros, scale, scale, values, activation, found)
    exact = ACTIVATIONS[activation](values.double())
    torch.testing.assert_close(found[0].double(), exact, rtol=4e-7, atol=5e-7)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_nan_and_infinity(activation: str, out: torch.dtype) -> None:
    # torch gives NaN for GELU of infinity
    bias = torch.tensor([torch.nan, 1e30 if activation == "gelu" else torch.inf, -torch.inf, 1.0])
    epilogue = Epilogue(
        torch.tensor(1.0),
        torch.tensor(1.0),
        bias,
        None,
        torch.tensor(0.5) if out == torch.int8 else None,
        activation,
        out,
    )
    x, w = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8)
    found, wanted = native.int8_gemm(x, w, epilogue), oracle(x, w, epilogue)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-2, atol=1)


def test_weights_that_change_are_seen() -> None:
    x, w = codes(4, 40), codes(8, 40, seed=1)
    assert native.panels(w) is native.panels(w)
    sums(x, w)
    w.add_(1)
    assert torch.equal(sums(x, w), (x.long() @ w.long().T).int())
    w.data = codes(8, 40, seed=2)
    assert torch.equal(sums(x, w), (x.long() @ w.long().T).int())
    with torch.inference_mode():
        silent = codes(8, 40, seed=3)
        sums(x, silent)
        silent.add_(1)
        assert torch.equal(sums(x, silent), (x.long() @ silent.long().T).int())


def test_panels_end_with_their_weights() -> None:
    w = codes(8, 40)
    gone = weakref.ref(native.panels(w))
    del w
    gc.collect()
    assert gone() is None

"""The eager CPU path of a dynamic Int8Linear: what the operators give, where it may be used."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels import dynamic_quantize, explain, int8_gemm
from octavo.kernels.common.codes import scale_of_peak, to_int8
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.kernels.dynamic_quantize import native as native_quantize
from octavo.kernels.dynamic_quantize import reference
from octavo.kernels.int8_gemm import int_mm, native
from octavo.kernels.int8_linear import schema as linear_cpu
from octavo.layers import Int8Linear

exact = pytest.mark.skipif(
    not int_mm._exact_on_cpu(), reason="torch._int_mm is not exact on this processor"
)
NO_C = native.LIBRARY.why_not()


@pytest.fixture(
    autouse=True,
    params=["int_mm", pytest.param("native", marks=pytest.mark.skipif(bool(NO_C), reason=NO_C))],
)
def body(request: pytest.FixtureRequest) -> str:
    """Who multiplies."""
    if request.param == "int_mm":
        request.getfixturevalue("without_native")
    return str(request.param)


def layer(n: int = 33, k: int = 65, *, bias: bool = True, activation: str = "none") -> Int8Linear:
    torch.manual_seed(n + k)
    return Int8Linear.from_float(nn.Linear(k, n, bias=bias), activation=activation)


def by_operators(one: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    codes, scale = dynamic_quantize(x, backend="reference")
    return int8_gemm(
        codes,
        one.weight,
        scale,
        one.weight_scale,
        bias=one.bias,
        activation=one.activation,
        out_dtype=x.dtype,
        backend="reference",
    )


def takes(one: Int8Linear, x: torch.Tensor) -> bool:
    return bool(linear_cpu.body_for(x, one.weight, one.weight_scale, one.bias))


@exact
@pytest.mark.parametrize("shape", [(65,), (1, 65), (17, 65), (2, 3, 65)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_it_gives_what_the_operators_give(shape: tuple[int, ...], bias: bool) -> None:
    one, x = layer(bias=bias), torch.randn(shape)
    assert takes(one, x)
    torch.testing.assert_close(one(x), by_operators(one, x), rtol=1e-6, atol=1e-6)


@exact
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    one, x = layer(activation=activation), torch.randn(5, 65)
    torch.testing.assert_close(one(x), by_operators(one, x), rtol=1e-5, atol=1e-6)


@exact
def test_the_input_stays_as_it_is_and_may_have_any_strides() -> None:
    one, x = layer(), torch.randn(65, 3, 4).permute(2, 1, 0)
    before = x.clone()
    torch.testing.assert_close(one(x), one(x.contiguous()), rtol=0, atol=0)
    assert torch.equal(x, before)


@exact
def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    one, x = layer(), torch.randn(4, 65)
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    y = one(x)
    assert one.bias is not None
    torch.testing.assert_close(y[0], one.bias)
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().any()
    torch.testing.assert_close(y[3], by_operators(one, x[3]), rtol=1e-6, atol=1e-6)


def test_it_leaves_the_rest_to_the_operators() -> None:
    one = layer()
    assert not takes(one, torch.randn(2, 65, dtype=torch.float16))
    assert not takes(one, torch.randn(0, 65))
    assert not takes(one, torch.randn(2, 65, requires_grad=True))
    assert not takes(one, torch.randn(2, 65, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert one(torch.randn(2, 65)).dtype == torch.bfloat16
    assert one(torch.randn(0, 65)).shape == (0, 33)
    with pytest.raises(InputError, match=r"x_q \[2, 64\] and w_q \[33, 65\] do not fit"):
        one(torch.randn(2, 64))


@exact
def test_compiled_it_is_the_same() -> None:
    one, x = layer(), torch.randn(6, 65)
    compiled: Any = torch.compile(one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), one(x), rtol=1e-6, atol=1e-6)


@exact
def test_who_ran_is_explained(body: str) -> None:
    layer()(torch.randn(2, 65))
    assert explain("dynamic_quantize").body == ("native" if body == "native" else "reference")
    assert explain("int8_gemm").body == body


def oracle(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scale_of_peak(rows.abs().amax(-1, keepdim=True))
    return to_int8(rows, scale), scale


@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
def test_codes_are_bit_exact_for_any_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", chunk)
    rows = torch.randn(37, 50) * torch.logspace(-30, 30, 37).unsqueeze(1)
    for found, wanted in zip(reference.quantize_rows(rows), oracle(rows), strict=True):
        assert torch.equal(found, wanted)
    whole, scale = dynamic_quantize(rows, granularity="per-tensor", backend="reference")
    assert torch.equal(whole, to_int8(rows, scale))


def test_halves_round_to_even() -> None:
    rows = torch.cat([torch.arange(-253, 254, 2) / 2, torch.tensor([127.0])]).unsqueeze(0)
    codes, scale = reference.quantize_rows(rows)
    assert float(scale) == 1
    assert torch.equal(codes, rows.round().to(torch.int8))


def test_scales_that_are_not_normal_numbers() -> None:
    for value in (0.0, 1e-42, 1e-38, 3e38, torch.inf, torch.nan):
        rows = torch.tensor([[value, 0.0, -value]])
        for found, wanted in zip(reference.quantize_rows(rows), oracle(rows), strict=True):
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


def test_memory_that_is_kept_serves_all_sizes_modes_and_threads() -> None:
    all_rows = [torch.randn(3, 900), torch.randn(200, 7), torch.randn(1, 2000), torch.randn(9, 5)]
    wrong: list[int] = []

    def work(inference: bool) -> None:
        with torch.inference_mode(inference):
            for _ in range(20):
                wrong.extend(
                    1
                    for rows in all_rows
                    if not torch.equal(reference.quantize_rows(rows)[0], oracle(rows)[0])
                )

    work(True)
    work(False)
    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_the_epilogue_in_place_is_that_of_the_oracle(dtype: torch.dtype, per_token: bool) -> None:
    x, w = (torch.randint(-128, 128, (n, 65), dtype=torch.int8) for n in (17, 33))
    scale_x = torch.rand(17) if per_token else torch.tensor(0.3)
    arguments = (x, w, scale_x, torch.rand(33))
    options: dict[str, Any] = {"bias": torch.randn(33).to(dtype), "out_dtype": dtype}
    found = int8_gemm(*arguments, **options, backend="int_mm")
    wanted = int8_gemm(*arguments, **options, backend="reference")
    rtol = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-4)


@pytest.mark.skipif(bool(NO_C), reason=NO_C)
@pytest.mark.parametrize("k", [1, 15, 16, 17, 64, 100])
def test_codes_in_c_have_the_bits_of_the_reference(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    rows = torch.randn(41, k, generator=random) * torch.logspace(-44, 38, 41).unsqueeze(1)
    for place, value in enumerate((0.0, -0.0, 1e-45, 3.4e38, torch.inf, -torch.inf, torch.nan)):
        rows[place] = value
        rows[place + 7, -1] = value
    codes, scale = native_quantize.quantize_rows(rows)
    wanted_codes, wanted_scale = oracle(rows)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(scale, wanted_scale, rtol=0, atol=0, equal_nan=True)
    strided, _ = native_quantize.quantize_rows(rows.T.contiguous().T)
    assert torch.equal(strided, codes)

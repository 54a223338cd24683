"""int8_linear beside the two operators that it comes down to, and the codes that they make."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import dynamic_quantize, explain, int8_gemm, int8_linear, use_backend
from octavo.kernels.common.codes import scale_of_peak, to_int8
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.kernels.dynamic_quantize import native as native_quantize
from octavo.kernels.dynamic_quantize import reference
from octavo.kernels.int8_gemm import int_mm
from octavo.kernels.int8_linear import native
from octavo.kernels.int8_linear.schema import OPERATOR
from octavo.layers import Int8Linear
from octavo.quant.weights import QuantizedWeight, quantize_weight

exact = pytest.mark.skipif(
    not int_mm._exact_on_cpu(), reason="torch._int_mm is not exact on this processor"
)
NO_C = native.LIBRARY.reason()
in_c = pytest.mark.skipif(bool(NO_C), reason=NO_C)


@pytest.fixture(params=[pytest.param("int_mm", marks=exact), pytest.param("native", marks=in_c)])
def product(request: pytest.FixtureRequest) -> str:
    """Who multiplies."""
    if request.param == "int_mm":
        request.getfixturevalue("without_native")
    return str(request.param)


def weight_of(n: int = 33, k: int = 65, *, bias: bool = True) -> QuantizedWeight:
    random = torch.Generator().manual_seed(n + k)
    offset = torch.randn(n, generator=random) if bias else None
    return quantize_weight(torch.randn(n, k, generator=random), 0, bias=offset)


def by_operators(
    x: torch.Tensor, weight: QuantizedWeight, activation: str = "none"
) -> torch.Tensor:
    codes, scale = dynamic_quantize(x, backend="reference")
    return int8_gemm(
        codes,
        weight.values,
        scale,
        weight.scale,
        bias=weight.bias,
        activation=activation,
        out_dtype=x.dtype,
        backend="reference",
    )


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    # the last product and the bias may be rounded once together
    rtol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("shape", [(65,), (1, 65), (17, 65), (2, 3, 65)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_it_gives_what_the_operators_give(shape: tuple[int, ...], bias: bool, product: str) -> None:
    x, weight = torch.randn(shape), weight_of(bias=bias)
    close(int8_linear(x, weight), by_operators(x, weight))
    assert explain("int8_linear").implementation == (
        "native" if product == "native" else "two-kernel"
    )


def test_it_is_a_product_of_quantized_rows(product: str) -> None:
    """In float64, of codes that are rounded there."""
    x, weight = torch.randn(9, 65), weight_of()
    scale = x.abs().amax(-1, keepdim=True).div(127).double()
    codes = torch.round(x.double() / scale)
    assert weight.bias is not None
    expected = codes @ weight.values.double().T * scale * weight.scale + weight.bias.double()
    torch.testing.assert_close(int8_linear(x, weight).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, product: str) -> None:
    x, weight = torch.randn(5, 65), weight_of()
    found = int8_linear(x, weight, activation=activation)
    wanted = by_operators(x, weight, activation)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_floats(dtype: torch.dtype, product: str) -> None:
    x, weight = torch.randn(5, 65).to(dtype), weight_of()
    assert weight.bias is not None
    for one in (weight, weight._replace(bias=weight.bias.to(dtype))):
        close(int8_linear(x, one), by_operators(x, one), dtype)


@in_c
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 16, 3), (7, 33, 64), (64, 70, 512), (700, 33, 96)]
)
def test_one_call_of_c_has_the_bits_of_two(m: int, n: int, k: int) -> None:
    random, weight = torch.Generator().manual_seed(m), weight_of(n, k)
    x = torch.randn(m, k, generator=random)
    for activation in ("none", "gelu"):
        found = int8_linear(x, weight, activation=activation, backend="native")
        wanted = int8_linear(x, weight, activation=activation, backend="two-kernel")
        assert explain("dynamic_quantize").implementation == "native"
        assert explain("int8_gemm").implementation == "native"
        assert torch.equal(found, wanted)


@in_c
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight, most = torch.randn(32, 1024), weight_of(1000, 1024), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(int8_linear(x, weight, backend="native"))
    finally:
        torch.set_num_threads(most)
    assert torch.equal(*found)


@in_c
def test_callers_at_once_have_memory_of_their_own() -> None:
    weight = weight_of()
    inputs = [torch.randn(7 + i % 3, 65) for i in range(60)]
    wanted = [int8_linear(x, weight, backend="two-kernel") for x in inputs]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda x: int8_linear(x, weight, backend="native"), inputs))
    assert all(map(torch.equal, found, wanted))


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 9)], -1)[..., 0]


@pytest.mark.parametrize("part", ["values", "scale", "bias"])
def test_a_weight_may_have_any_strides(part: str, product: str) -> None:
    x, weight = torch.randn(5, 65), weight_of()
    wide = weight._replace(**{part: apart(getattr(weight, part))})
    assert torch.equal(int8_linear(x, wide), int8_linear(x, weight))


def test_the_input_stays_as_it_is_and_may_have_any_strides(product: str) -> None:
    x, weight = torch.randn(65, 3, 4).permute(2, 1, 0), weight_of()
    before = x.clone()
    assert torch.equal(int8_linear(x, weight), int8_linear(x.contiguous(), weight))
    assert torch.equal(int8_linear(apart(x), weight), int8_linear(x.contiguous(), weight))
    assert torch.equal(x, before)


def test_a_weight_that_changes_is_packed_anew(product: str) -> None:
    x, weight = torch.randn(5, 65), weight_of()
    before = int8_linear(x, weight)
    with torch.inference_mode():
        assert torch.equal(int8_linear(x, weight), before)
    weight.values.copy_(weight.values.flip(0))
    after = int8_linear(x, weight)
    assert not torch.equal(after, before)
    close(after, by_operators(x, weight))


def test_rows_of_zeros_and_rows_that_are_not_finite(product: str) -> None:
    x, weight = torch.randn(4, 65), weight_of()
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    y = int8_linear(x, weight)
    assert weight.bias is not None
    torch.testing.assert_close(y[0], weight.bias)
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().any()
    close(y[3], by_operators(x[3], weight))


def test_nothing_to_multiply(product: str) -> None:
    assert int8_linear(torch.randn(0, 65), weight_of()).shape == (0, 33)
    assert int8_linear(torch.randn(2, 0, 65), weight_of()).shape == (2, 0, 33)
    weight = weight_of(4, 65)
    empty = QuantizedWeight(weight.values[:0], weight.scale[:0])
    assert int8_linear(torch.randn(3, 65), empty).shape == (3, 0)


@in_c
def test_what_one_call_of_c_leaves_to_two() -> None:
    weight = weight_of()
    assert weight.bias is not None
    x = torch.randn(2, 65)
    assert native.reason(x, weight, "none") == ""
    floats = "it takes float32 input and bias"
    assert native.reason(x.half(), weight, "none") == floats
    assert native.reason(x, weight._replace(bias=weight.bias.half()), "none") == floats
    assert native.reason(x[:0], weight, "none") == "there is nothing to multiply"
    assert native.reason(x.to("meta"), weight, "none") == "the tensors are on meta"
    close(int8_linear(x.half(), weight), by_operators(x.half(), weight), torch.float16)
    decision = explain("int8_linear")
    assert decision.implementation == "two-kernel"
    assert decision.reasons == (("native", floats),)
    with pytest.raises(UnsupportedError, match=f"cannot run this: {floats}; use backend 'auto'"):
        int8_linear(x.half(), weight, backend="native")


def test_without_c_it_is_two_calls(without_native: None) -> None:
    int8_linear(torch.randn(2, 65), weight_of())
    assert str(explain("int8_linear")) == "int8_linear: two-kernel (native not: a test)"
    assert explain("dynamic_quantize").implementation == "reference"
    assert explain("int8_gemm").implementation in ("int_mm", "reference")


def test_the_reference_can_be_asked_for() -> None:
    x, weight = torch.randn(3, 65), weight_of()
    layer = Int8Linear.from_float(nn.Linear(65, 33))
    with use_backend("reference"):
        assert torch.equal(int8_linear(x, weight), by_operators(x, weight))
        layer(x)
    assert explain("dynamic_quantize").implementation == "reference"
    assert explain("int8_gemm").implementation == "reference"


def test_the_operator_is_sound() -> None:
    given = OPERATOR.flat(torch.randn(3, 16), weight_of(8, 16), "relu")
    torch.library.opcheck(OPERATOR.overload, (*given, "auto"))
    given = OPERATOR.flat(torch.randn(3, 16), weight_of(8, 16, bias=False), "none")
    for backend in ("auto", "two-kernel"):  # whether one writes to its arguments
        torch.library.opcheck(
            OPERATOR.overload, (*given, backend), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("way", ["compile", "export"])
def test_compilers_see_the_two_operators(way: str) -> None:
    layer, x = Int8Linear.from_float(nn.Linear(65, 33)), torch.randn(6, 65)
    seen: list[torch.fx.Graph] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(graph.graph)
        return graph

    with torch.no_grad():
        if way == "export":
            program = torch.export.export(layer, (x,))
            seen.append(program.graph)
            found = program.module()(x)
        else:
            found = torch.compile(layer, fullgraph=True, backend=keep)(x)
        close(found, layer(x))
    (graph,) = seen
    names = [str(node.target) for node in graph.nodes]
    assert not any("int8_linear" in name for name in names)
    if way == "export" or not NO_C:
        for operator in ("octavo.dynamic_quantize", "octavo.int8_gemm"):
            assert sum(operator in name for name in names) == 1


def test_a_backend_that_is_named_runs_or_is_refused_where_a_gradient_is_wanted_too() -> None:
    weight = weight_of()
    for x in (torch.randn(2, 65), torch.randn(2, 65, requires_grad=True)):
        with pytest.raises(InputError, match="int8_linear has no backend 'cublas'; choose from"):
            int8_linear(x, weight, backend="cublas")


def test_a_gradient_is_an_error() -> None:
    x, weight = torch.randn(2, 65, requires_grad=True), weight_of()
    y = int8_linear(x, weight)
    close(y.detach(), by_operators(x.detach(), weight))
    with pytest.raises(UnsupportedError, match=r"has no gradient; .* under torch\.no_grad"):
        y.sum().backward()


def test_autocast_decides_the_dtype_of_a_layer() -> None:
    layer = Int8Linear.from_float(nn.Linear(65, 33))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 65)).dtype == torch.bfloat16


WEIGHT, X = weight_of(4, 8), torch.ones(2, 8)


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        (X.double(), WEIGHT, {}, "x is torch.float64; int8_linear takes float16, bfloat16 or"),
        (X[:, :7], WEIGHT, {}, r"x \[2, 7\] and weight \[4, 8\] do not fit; they are \[..., K\]"),
        (X[0, 0], WEIGHT, {}, r"x \[\] and weight \[4, 8\] do not fit"),
        (X, WEIGHT, {"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        (
            X,
            WEIGHT._replace(values=WEIGHT.values.view(torch.uint8)),
            {},
            r"weight is torch.uint8 \[4, 8\]; it must be torch.int8 \[4, 8\]",
        ),
        (X, WEIGHT._replace(scale=torch.ones(3)), {}, r"scale is torch.float32 \[3\]; .* \[4\]"),
        (X, WEIGHT._replace(scale=torch.ones(4).half()), {}, "scale is torch.float16"),
        (X, WEIGHT._replace(bias=torch.ones(5)), {}, r"bias is torch.float32 \[5\]; it must be"),
        (X, WEIGHT._replace(bias=torch.ones(4).int()), {}, r"bias is torch.int32 \[4\]; it must"),
        (X.to("meta"), WEIGHT, {}, "weight is on cpu and x on meta; move one of them"),
        (X, WEIGHT, {"backend": "int_mm"}, "no backend 'int_mm'; choose from auto, native, two-"),
    ],
)
def test_what_is_refused(
    x: torch.Tensor, weight: QuantizedWeight, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        int8_linear(x, weight, **options)


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


@in_c
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

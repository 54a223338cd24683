"""INT8 products: accumulators to the bit, the epilogue to the last bit that float32 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import explain, int8_gemm
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.int8_gemm import int_mm, native, schema
from octavo.kernels.int8_gemm.configs import default_config

triton_body = pytest.importorskip("octavo.kernels.int8_gemm.triton")

SHAPES = [(1, 5, 7), (17, 40, 33), (64, 64, 256), (130, 96, 129), (3, 200, 1000), (33, 1, 1)]
NO_C = native.LIBRARY.reason()
BACKENDS = ("triton", "int_mm", *(() if NO_C else ("native",)))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)


def case(m: int, n: int, k: int, device: torch.device) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m)
    values = {
        "scale_x": torch.rand(m, generator=random) * 1e-3 + 1e-4,
        "scale_w": torch.rand(n, generator=random) * 1e-2 + 1e-3,
        "bias": torch.randn(n, generator=random),
        "residual": torch.randn(m, n, generator=random),
    }
    values |= {"x_q": codes(m, k), "w_q": codes(n, k, seed=1)}
    return {name: value.to(device) for name, value in values.items()}


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulators_are_exact(
    shape: tuple[int, int, int], backend: str, device: torch.device
) -> None:
    m, n, k = shape
    x, w = codes(m, k).to(device), codes(n, k, seed=1).to(device)
    found = int8_gemm(x, w, out_dtype=torch.int32, backend=backend)
    exact = (x.cpu().long() @ w.cpu().long().T).int()
    assert torch.equal(found.cpu(), exact)


@every_backend
def test_the_largest_sum_there_is(backend: str, device: torch.device) -> None:
    x = torch.full((2, 131071), -128, dtype=torch.int8, device=device)
    config = {**default_config(1, 16, 131071), "BLOCK_N": 16, "SPLIT_K": 2}
    if device.type == "cpu":  # few steps, for the interpreter
        config["BLOCK_K"] = 8192
    if backend == "triton":
        raw = Epilogue(None, None, None, None, None, "none", torch.int32)
        found = triton_body.int8_gemm(x, x[:1], raw, config)
    else:
        found = int8_gemm(x, x[:1], out_dtype=torch.int32, backend=backend)
    assert found.tolist() == [[131071 * 128**2]] * 2


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_epilogue(
    activation: str, out_dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    values = case(20, 48, 100, device)
    arguments = {**values, "activation": activation, "out_dtype": out_dtype}
    found, expected = (int8_gemm(**arguments, backend=b) for b in (backend, "reference"))
    assert found.dtype == out_dtype
    # one rounding apart in the output's type: erf and exp differ in their last bits, compilers
    # fuse a product with a sum, and the interpreter cuts bfloat16 off instead of rounding it
    step = torch.finfo(out_dtype).eps
    torch.testing.assert_close(found, expected, rtol=step, atol=2e-6)
    if device.type == "cpu" and activation in ("none", "relu", "relu6"):
        assert out_dtype == torch.bfloat16 or torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_granularities_of_scales(
    tokens: bool, channels: bool, backend: str, device: torch.device
) -> None:
    values = case(5, 9, 64, device)
    scale_x = values["scale_x"] if tokens else values["scale_x"][0]
    scale_w = values["scale_w"] if channels else values["scale_w"][0]
    found = int8_gemm(
        values["x_q"], values["w_q"], scale_x, scale_w, out_dtype=torch.float32, backend=backend
    )
    exact = values["x_q"].double() @ values["w_q"].double().T
    exact = exact * (scale_x.double()[:, None] if tokens else scale_x.double()) * scale_w.double()
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)


@every_backend
@pytest.mark.parametrize("residual", ["floats", "codes"])
@pytest.mark.parametrize("zero_point", [0, -40])
def test_codes_out(residual: str, zero_point: int, backend: str, device: torch.device) -> None:
    values = case(40, 24, 90, device)
    arguments = {**values, "out_dtype": torch.int8, "out_scale": torch.tensor(0.01, device=device)}
    if residual == "codes":
        arguments |= {
            "residual": codes(40, 24, seed=3).to(device),
            "residual_scale": torch.tensor(0.02, device=device),
            "residual_zero_point": 30,
        }
    arguments["out_zero_point"] = zero_point
    found, expected = (int8_gemm(**arguments, backend=b) for b in (backend, "reference"))
    assert found.dtype == torch.int8
    assert int((found.int() - expected.int()).abs().max()) <= (device.type == "cuda")
    assert int(found.max()) == 127, "some must saturate"
    assert int(found.min()) == -128


@every_backend
def test_shapes_and_strides(backend: str, device: torch.device) -> None:
    x = codes(4, 6, 80).to(device)
    w = codes(80, 10, seed=1).to(device).T
    scale = torch.tensor(0.01, device=device)
    for view in (x, x[:, ::2], x.transpose(0, 1), codes(80, 4, 6).to(device).permute(1, 2, 0)):
        found = int8_gemm(view, w, scale, scale, out_dtype=torch.float32, backend=backend)
        expected = int8_gemm(view, w, scale, scale, out_dtype=torch.float32, backend="reference")
        assert found.shape == (*view.shape[:-1], 10)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 8, 8), (4, 0, 8), (4, 8, 0)], ids=str)
def test_nothing_to_multiply(shape: tuple[int, int, int], device: torch.device) -> None:
    values = case(*shape, device)
    found, expected = (int8_gemm(**values, backend=b) for b in ("triton", "reference"))
    assert torch.equal(found, expected)
    assert torch.equal(found, int8_gemm(**values))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_operator_is_sound(backend: str, device: torch.device) -> None:
    x, w, *scales, bias, residual = (
        case(4, 24, 32, device)[name]
        for name in ("x_q", "w_q", "scale_x", "scale_w", "bias", "residual")
    )
    epilogue = Epilogue(*scales, bias, residual, None, "relu", torch.float16)
    operator = schema.OPERATOR
    torch.library.opcheck(operator.overload, (*operator.flat(x, w, epilogue), backend))


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(0.01)
        return int8_gemm(x, w, scale, scale, activation="silu", backend="reference") * 2


def test_compile_and_export_keep_it_whole() -> None:
    x, w, layer = codes(4, 32), codes(16, 32), Layer()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x, w), layer(x, w))
    program = torch.export.export(layer, (x, w))
    assert any("int8_gemm" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x, w), layer(x, w))


@pytest.mark.skipif(bool(NO_C), reason=NO_C)
def test_c_is_the_first_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    int8_gemm(codes(2, 8), codes(4, 8), out_dtype=torch.int32)
    assert explain("int8_gemm").implementation == "native"


@pytest.mark.usefixtures("without_native")
def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    int8_gemm(codes(2, 8), codes(4, 8), out_dtype=torch.int32)
    decision = explain("int8_gemm")
    assert decision.implementation in ("int_mm", "reference")
    assert decision.reasons[0][0] == "triton"
    with pytest.raises(
        UnsupportedError, match="backend 'int_mm' of int8_gemm cannot run this: there"
    ):
        int8_gemm(codes(0, 8), codes(4, 8), out_dtype=torch.int32, backend="int_mm")


ONE = torch.tensor(1.0)
GOOD = {"x_q": codes(2, 8), "w_q": codes(4, 8), "scale_x": ONE, "scale_w": ONE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_q": torch.ones(2, 8)}, "x_q is torch.float32; int8_gemm takes int8 codes"),
        ({"w_q": codes(4, 8).char().int()}, "w_q is torch.int32"),
        ({"w_q": codes(4, 9)}, r"x_q \[2, 8\] and w_q \[4, 9\] do not fit"),
        ({"w_q": codes(8)}, r"w_q \[8\] do not fit"),
        ({"x_q": codes(1, 131072), "w_q": codes(1, 131072)}, "K is 131072, and sums over more"),
        ({"w_q": codes(4, 8).to("meta")}, "w_q is on meta and x_q on cpu; move one"),
        ({"out_dtype": torch.float64}, "out_dtype torch.float64 is unknown"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        ({"out_dtype": torch.int32}, "int32 output is the accumulators alone; leave scales"),
        ({"scale_w": None}, "torch.float16 output needs scale_x and scale_w"),
        ({"out_dtype": torch.int8}, "out_scale belongs to int8 output; give both"),
        ({"out_scale": ONE}, "out_scale belongs to int8 output; give both"),
        ({"out_zero_point": 3}, "out_zero_point is 3 and belongs to int8 output; leave it 0"),
        ({"residual": codes(2, 4)}, "residual_scale belongs to a residual of int8 codes; give"),
        ({"residual_scale": ONE}, "residual_scale belongs to a residual of int8 codes; give"),
        ({"residual_zero_point": 200}, "residual_zero_point is 200; an int8 code is from -128"),
        (
            {"scale_x": torch.ones(3)},
            r"scale_x is torch.float32 \[3\]; it must be .* \[\] or \[2\]",
        ),
        ({"scale_w": ONE.half()}, r"scale_w is torch.float16 \[\]; it must be torch.float32"),
        ({"bias": torch.ones(2)}, r"bias is torch.float32 \[2\]; it must be .* \[4\]"),
        ({"residual": torch.ones(4)}, r"residual is torch.float32 \[4\]; it must be .* \[2, 4\]"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta and x on cpu; move one"),
        (
            {"backend": "cublas"},
            "no backend 'cublas'; choose from auto, triton, native, int_mm, reference",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        int8_gemm(**{**GOOD, **changes})


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_one_product_a_sum(rows: int) -> None:
    """torch._int_mm reads foreign memory there, so it is not asked."""
    x, w = codes(rows, 1), codes(5, 1, seed=1)
    found = int8_gemm(x, w, out_dtype=torch.int32)
    assert torch.equal(found, x.int() * w.int().T)
    with pytest.raises(UnsupportedError, match="reads beyond its arguments where K is 1"):
        int8_gemm(x, w, out_dtype=torch.int32, backend="int_mm")


def test_more_rows_than_the_kernels_count() -> None:
    many = codes(1, 8).expand(2**31, 8)
    with pytest.raises(UnsupportedError, match="it counts up to 2147483392 rows; use backend"):
        int8_gemm(many, codes(4, 8), out_dtype=torch.int32, backend="triton")


def test_the_compiler_takes_the_probe_for_a_constant() -> None:
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(int_mm._exact_on_cpu) == vars(marked) != {}

"""Weight-only products: every width, layout and tiling against float64 on dequantized weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import explain, weight_only_gemm
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.dispatch.operator import forget_plans
from octavo.kernels.weight_only_gemm import schema
from octavo.kernels.weight_only_gemm.configs import candidates, default_config
from octavo.quant.packing import pack, unpack
from octavo.quant.qparams import QDType
from octavo.quant.weights import QuantizedWeight

triton = pytest.importorskip("octavo.kernels.weight_only_gemm.triton")

BACKENDS = ("triton", "dequantize", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# of the norm; the interpreter cuts bfloat16 off instead of rounding it
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 8e-3, torch.float32: 1e-6}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_width = pytest.mark.parametrize("bits", [8, 4, 3, 2])


def kind(bits: int, asymmetric: bool) -> QDType:
    low = 0 if asymmetric else -(1 << (bits - 1))
    storage = torch.uint8 if asymmetric else torch.int8
    return QDType("codes", bits, low, low + (1 << bits) - 1, storage)


def case(
    m: int,
    n: int,
    k: int,
    bits: int,
    device: torch.device,
    group: int | None = None,
    asymmetric: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(m + n + k)
    codes = kind(bits, asymmetric)
    q = torch.randint(codes.qmin, codes.qmax + 1, (n, k), generator=random)
    shape = (n,) if group is None else (n, k // group)
    values = {
        "x": torch.randn(m, k, generator=random).to(dtype),
        "w_packed": q.to(codes.storage) if bits == 8 else pack(q, codes),
        "scale": torch.rand(shape, generator=random) * 0.02 + 1e-3,
    }
    if asymmetric:
        values["zero_point"] = torch.randint(0, 1 << bits, shape, generator=random).to(torch.uint8)
    placed: dict[str, Any] = {name: value.to(device) for name, value in values.items()}
    return {**placed, "bits": bits, "group_size": group}


def weight_of(values: dict[str, Any]) -> QuantizedWeight:
    zero_point, bits, group = (values.get(n) for n in ("zero_point", "bits", "group_size"))
    return QuantizedWeight(values["w_packed"], values["scale"], zero_point, None, bits, 0, group)


def exact(values: dict[str, Any]) -> torch.Tensor:
    """The product in float64 on the CPU, by octavo.quant's own unpacking."""
    x, bits = values["x"].cpu().double(), values["bits"]
    zero_point = values.get("zero_point")
    q = values["w_packed"].cpu()
    if bits < 8:
        q = unpack(q, kind(bits, zero_point is not None), x.shape[-1])
    size = values["group_size"] or x.shape[-1]

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.cpu().double().reshape(len(q), -1).repeat_interleave(size, 1)

    w = q.double() - (0 if zero_point is None else spread(zero_point))
    return x @ (w * spread(values["scale"])).T


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30))


@every_backend
@every_width
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(dtype: torch.dtype, bits: int, backend: str, device: torch.device) -> None:
    for group, asymmetric in ((None, bits < 4), (32, bits >= 4)):
        for m in (1, 3):
            values = case(m, 19, 128, bits, device, group, asymmetric, dtype)
            found = weight_only_gemm(**values, backend=backend)
            assert found.dtype == dtype
            assert found.shape == (m, 19)
            assert error(found, exact(values)) < TOLERANCES[dtype]


@every_backend
@every_width
def test_the_other_zero_points(bits: int, backend: str, device: torch.device) -> None:
    """Those that the test above leaves out, in one dtype."""
    for group, asymmetric in ((None, bits >= 4), (32, bits < 4)):
        for m in (1, 3):
            values = case(m, 5, 64, bits, device, group, asymmetric)
            assert error(weight_only_gemm(**values, backend=backend), exact(values)) < 1e-6


@every_backend
@every_width
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (17, 33, 63), (2, 3, 97)], ids=str)
def test_odd_shapes(
    shape: tuple[int, int, int], bits: int, backend: str, device: torch.device
) -> None:
    values = case(*shape, bits, device)
    assert error(weight_only_gemm(**values, backend=backend), exact(values)) < 1e-6


@pytest.mark.parametrize("group", [64, 96, 128])
def test_sizes_of_groups(group: int, device: torch.device) -> None:
    for m in (1, 5):
        values = case(m, 6, 384, 4, device, group, asymmetric=True)
        assert error(weight_only_gemm(**values, backend="triton"), exact(values)) < 1e-6


TILES = {"BLOCK_N": 16, "BLOCK_K": 32, "GROUP_M": 2, "SPLIT_K": 1, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_m", [1, 16])
@pytest.mark.parametrize(("split", "k"), [(1, 160), (2, 128), (4, 160)])
def test_any_tiles(
    split: int,
    k: int,
    block_m: int,
    bits: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of K that are even, and that are not; what follows a product is done once."""
    values = case(*((2, 5) if block_m == 1 else (17, 17)), k, bits, device, 32)
    config = {**TILES, "BLOCK_M": block_m, "SPLIT_K": split}
    if block_m == 1:
        config |= {"BLOCK_N": 4, "BLOCK_K": 2 * 128 // bits}
    bias = torch.randn(len(values["scale"]), device=device)
    end = Epilogue(None, None, bias, None, None, "relu", torch.float32)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    found = triton.weight_only_gemm(values["x"], weight_of(values), end, config)
    assert error(found, (exact(values) + bias.cpu().double()).relu()) < 1e-6
    if (split, bits) == (4, 4):
        again = triton.weight_only_gemm(values["x"], weight_of(values), end, config)
        assert torch.equal(found, again)


@pytest.mark.parametrize("m", [1, 4, 70])
def test_every_candidate_has_the_fields_of_the_rule(m: int) -> None:
    for bits, group in ((8, None), (4, 32), (4, 128)):
        options = {"bits": bits, "group_size": group}
        rule = default_config(m, 4096, 4096, **options)
        found = [rule, *candidates(m, 4096, 4096, **options)]
        assert 4 < len(found) <= 31
        assert len({tuple(config.values()) for config in found[1:]}) == len(found) - 1
        for config in found:
            assert config.keys() == rule.keys()
            if config["BLOCK_M"] > 1:
                assert config["BLOCK_K"] <= (group or 256)
                assert (group or config["BLOCK_K"]) % config["BLOCK_K"] == 0


@every_backend
@pytest.mark.parametrize(("m", "activation"), [(1, "gelu"), *((3, one) for one in ACTIVATIONS)])
def test_the_epilogue(m: int, activation: str, backend: str, device: torch.device) -> None:
    values = case(m, 24, 64, 4, device, 32)
    bias = torch.randn(24, device=device)
    residual = torch.randn(m, 24, device=device)
    found = weight_only_gemm(
        **values, bias=bias, activation=activation, residual=residual, backend=backend
    )
    product = exact(values) + bias.cpu().double()
    expected = ACTIVATIONS[activation](product) + residual.cpu().double()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("m", [1, 40])
def test_what_the_launcher_offers_for_tuning(
    m: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates of one key give the rule's result, and have the rule's fields."""
    asked: list[str] = []

    def choose(operator: str, key: str, where: Any, rule: Any, others: Any, run: Any) -> Any:
        assert (operator, where) == ("weight_only_gemm", values["x"].device)
        for config in itertools.islice(others(), 0, None, 9):
            assert config.keys() == rule.keys()
            torch.testing.assert_close(run(config), run(rule), rtol=1e-5, atol=1e-5)
        asked.append(key)
        return rule

    monkeypatch.setattr(triton, "best_config", choose)
    values = case(m, 24, 128, 4, device, 32)
    assert error(weight_only_gemm(**values, backend="triton"), exact(values)) < 1e-6
    assert asked == [f"{1 if m == 1 else 64}x24x128 4 bits, symmetric, groups 32, fp32, fast True"]


def test_what_makes_products_alike() -> None:
    def kind(m: int, **options: Any) -> Any:
        values = {**case(m, 8, 64, 4, torch.device("cpu"), 32), **options}
        residual, activation = values.get("residual"), values.get("activation", "none")
        end = Epilogue(None, None, None, residual, None, activation, torch.float32)
        return schema._bucket(values["x"], weight_of(values), end)

    assert kind(1) is None, "few rows are not measured"
    assert kind(32) is None
    assert kind(33) == kind(64) != kind(65)
    others = [kind(64, group_size=64), kind(64, activation="relu"), kind(64, residual=1)]
    assert len({kind(64), *others}) == 4


@every_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types_of_scales(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    values = case(2, 9, 64, 4, device, 32)
    values["scale"] = values["scale"].to(dtype)
    assert error(weight_only_gemm(**values, backend=backend), exact(values)) < 1e-6


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_hides_nan(activation: str, backend: str, device: torch.device) -> None:
    values = case(2, 9, 64, 8, device)
    values["x"][0, 5] = float("nan")
    found = weight_only_gemm(**values, activation=activation, backend=backend)
    assert bool(found[0].isnan().all())
    assert not bool(found[1].isnan().any())


@every_backend
@pytest.mark.parametrize("bits", [8, 4])
def test_strides(bits: int, backend: str, device: torch.device) -> None:
    values = case(1, 10, 96, bits, device, 32)
    wide = torch.randn(4, 6, 97, device=device)
    views = [wide[..., :96], wide[..., 1:], wide[:, ::2, :96], wide[..., :96].transpose(0, 1)]
    views += [torch.randn(96, 2, device=device).T, torch.randn(96, device=device)]
    for x in views:
        values["x"] = x
        found = weight_only_gemm(**values, backend=backend)
        assert found.shape == (*x.shape[:-1], 10)
        assert error(found, exact(values)) < 1e-6
    values["x"], w = views[0], values["w_packed"]
    values["w_packed"] = torch.cat([w, w[:, :3]], 1)[:, : w.shape[1]]
    assert error(weight_only_gemm(**values, backend=backend), exact(values)) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(0, 8, 32), (4, 0, 32), (4, 8, 0)], ids=str)
def test_nothing_to_multiply(
    shape: tuple[int, int, int], backend: str, device: torch.device
) -> None:
    for bits, group in ((8, None), (4, 32), (3, 32)):
        found = weight_only_gemm(**case(*shape, bits, device, group), backend=backend)
        assert torch.equal(found, torch.zeros(shape[:2], device=device))


@settings(max_examples=10, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 24),
    groups=st.integers(1, 5),
    bits=st.sampled_from([8, 4, 3, 2]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_any_case(
    m: int, n: int, groups: int, bits: int, asymmetric: bool, dtype: torch.dtype
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = case(m, n, 32 * groups, bits, device, 32, asymmetric, dtype)
    for backend in BACKENDS:
        found = weight_only_gemm(**values, backend=backend)
        assert error(found, exact(values)) < TOLERANCES[dtype]


def test_the_operator_is_sound(device: torch.device) -> None:
    operator = schema.OPERATOR.overload
    for values in (case(4, 24, 32, 4, device, 32, True), case(1, 8, 32, 8, device)):
        bias = torch.randn(len(values["scale"]), device=device)
        end = Epilogue(None, None, bias, None, None, "relu", torch.float32)
        given = schema.OPERATOR.flat(values["x"], weight_of(values), end)
        for backend in BACKENDS:  # whether one writes to its arguments, or returns one
            torch.library.opcheck(
                operator, (*given, backend), test_utils=("test_schema", "test_faketensor")
            )
    torch.library.opcheck(operator, (*given, "reference"))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        values = case(1, 16, 64, 4, torch.device("cpu"), 32)
        self.register_buffer("w", values["w_packed"])
        self.register_buffer("scale", values["scale"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * weight_only_gemm(
            x, self.w, self.scale, bits=4, group_size=32, activation="silu", backend="reference"
        )


def test_compile_and_export_keep_it_whole() -> None:
    x, layer = torch.randn(4, 64), Layer()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("octavo.weight_only_gemm.default") == 1
    longer = torch.randn(9, 64)
    assert torch.equal(program.module()(longer), layer(longer))


def test_more_rows_than_the_kernels_count() -> None:
    many = torch.ones(1, 8).expand(2**31, 8)
    with pytest.raises(UnsupportedError, match="it counts up to 2147483392 rows; use backend"):
        weight_only_gemm(
            many, torch.ones(4, 8, dtype=torch.int8), torch.ones(4), bits=8, backend="triton"
        )


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedError, match="groups of 16 are not a multiple of 32; use"):
        weight_only_gemm(**case(1, 4, 32, 4, device, 16), backend="triton")
    assert error(weight_only_gemm(**(values := case(1, 4, 32, 4, cpu, 16))), exact(values)) < 1e-6
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_plans()
    weight_only_gemm(**case(1, 4, 32, 4, cpu))
    decision = explain("weight_only_gemm")
    assert decision.implementation == "reference"
    assert "on the CPU, where Triton has no compiler" in str(decision)


GOOD = case(2, 4, 64, 4, torch.device("cpu"), 32, asymmetric=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh' is unknown; use one of none, relu"),
        ({"bits": 5}, "bits is 5; weight_only_gemm takes 8, 4, 3 or 2"),
        ({"x": torch.ones(2, 64).double()}, r"x is torch.float64 \[2, 64\]; it must be float16"),
        ({"x": torch.tensor(1.0)}, r"x is torch.float32 \[\]; it must be .* \[..., K\]"),
        (
            {"w_packed": GOOD["w_packed"].view(torch.int8)},
            "w_packed is torch.int8; codes of 4 bits with a zero point are torch.uint8",
        ),
        (
            {"bits": 8, "zero_point": None},
            "w_packed is torch.uint8; codes of 8 bits without a zero point are torch.int8",
        ),
        (
            {"w_packed": GOOD["w_packed"][:, :31]},
            r"w_packed has shape \[4, 31\]; 4-bit codes for x \[2, 64\] are \[N, 32\]",
        ),
        ({"w_packed": GOOD["w_packed"][0]}, r"w_packed has shape \[32\]"),
        ({"w_packed": GOOD["w_packed"].to("meta")}, "w_packed is on meta and x on cpu; move one"),
        ({"group_size": 48}, "group_size 48 does not divide K, which is 64"),
        ({"group_size": 0}, "group_size 0 does not divide K, which is 64"),
        (
            {"scale": torch.ones(4)},
            r"scale is torch.float32 \[4\]; it must be .* or torch.float32 \[4, 2\]",
        ),
        ({"scale": torch.ones(4, 2).int()}, r"scale is torch.int32 \[4, 2\]; it must be"),
        ({"zero_point": torch.ones(4, 2)}, r"zero_point is torch.float32 .* be torch.uint8"),
        ({"zero_point": GOOD["zero_point"][:, :1]}, r"zero_point is torch.uint8 \[4, 1\]"),
        ({"bias": torch.ones(2)}, r"bias is torch.float32 \[2\]; it must be .* \[4\]"),
        ({"residual": torch.ones(4)}, r"residual is torch.float32 \[4\]; it must be .* \[2, 4\]"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta and x on cpu; move one"),
        ({"backend": "cublas"}, "no backend 'cublas'; choose from auto, triton, reference, deq"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        weight_only_gemm(**{**GOOD, **changes})

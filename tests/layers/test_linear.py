"""Int8Linear and WeightOnlyLinear: their arithmetic, step by step in float64, and how they move."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from octavo.core.errors import InputError
from octavo.kernels.int8_gemm.native import LIBRARY
from octavo.layers import Int8Linear, WeightOnlyLinear
from octavo.layers.linear.int8 import rows_of
from octavo.layers.module import QuantizedModule
from octavo.quant.weights import QuantizedWeight


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40).eval()


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (weight.float().abs().amax(1) / 127).double()
    return torch.round(weight.double() / scale[:, None]).clamp(-128, 127), scale


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (0, 96)], ids=str)
def test_dynamic_arithmetic(linear: nn.Linear, shape: tuple[int, ...], smooth: bool) -> None:
    factors = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.5
    layer = Int8Linear.from_float(linear, smooth=factors if smooth else None)
    x = rows(*shape)
    divisor = factors if smooth else torch.ones(96)
    codes, scale_w = weight_codes(linear.weight.detach() * divisor)
    divided = (x / divisor).double()
    scale_x = divided.abs().amax(-1, keepdim=True).float().double() / 127
    x_codes = torch.round(divided / scale_x).nan_to_num(0)
    expected = (x_codes @ codes.T) * scale_x * scale_w + linear.bias.detach().double()
    found = layer(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smooth", [False, True])
def test_static_arithmetic(linear: nn.Linear, smooth: bool) -> None:
    factors = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.5
    scale = torch.tensor(0.02)
    layer = Int8Linear.from_float(
        linear, smooth=factors if smooth else None, input_scale=scale, activation="relu"
    )
    x = rows(7, 96) * 2
    divisor = factors if smooth else torch.ones(96)
    codes, scale_w = weight_codes(linear.weight.detach() * divisor)
    x_codes = torch.round(x / (divisor * scale)).clamp(-128, 127).double()
    assert int(x_codes.max()) == 127, "some must saturate"
    y = (x_codes @ codes.T) * scale.double() * scale_w + linear.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), y.relu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "step"),
    [
        (8, None, True, 127),
        (4, 32, False, 15),
        (4, 96, True, 7),
        (3, 48, True, 3),
        (2, 32, False, 3),
    ],
)
def test_weight_only(
    linear: nn.Linear, bits: int, group: int | None, symmetric: bool, step: int
) -> None:
    layer = WeightOnlyLinear.from_float(linear, bits=bits, group_size=group, symmetric=symmetric)
    weight = layer(torch.eye(96)).T - linear.bias.detach()[:, None]
    parts = linear.weight.detach().reshape(40, -1, group or 96)
    reach = parts.abs().amax(-1) if symmetric else parts.amax(-1) - parts.amin(-1)
    error = (weight - linear.weight.detach()).reshape(parts.shape)
    # clipping gives up at most half of the range, and the best grid is no worse than rounding
    assert bool((error.abs().amax(-1) <= reach * 0.5 + reach / step).all())
    plain = torch.round(parts / (reach / step)[..., None]) * (reach / step)[..., None] - parts
    assert float(error.square().sum()) <= float(plain.square().sum()) * 1.001 + 1e-9
    x = rows(3, 96)
    expected = x.double() @ weight.double().T + linear.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static", "weights"])
def test_rows_are_a_part_of_the_whole(linear: nn.Linear, kind: str) -> None:
    layer: nn.Module
    if kind == "weights":
        layer = WeightOnlyLinear.from_float(linear, bits=4, group_size=32, symmetric=False)
    else:
        scale = torch.tensor(0.03) if kind == "static" else None
        layer = Int8Linear.from_float(linear, input_scale=scale)
    x = rows(5, 96)
    for _ in range(2):
        found = layer(x, slice(8, 24))
        torch.testing.assert_close(found, layer(x)[:, 8:24], rtol=1e-6, atol=1e-6)
        layer.weight.copy_(layer.weight.flip(0))  # what is packed of some rows changes with it


def test_some_rows_are_one_tensor_in_every_call(linear: nn.Linear) -> None:
    """So that kernels find what they have packed of it."""
    layer = Int8Linear.from_float(linear)
    weight = QuantizedWeight(layer.weight, layer.weight_scale, bias=layer.bias)
    some = rows_of(weight, slice(8, 24))
    assert rows_of(weight, slice(8, 24)).values is some.values
    assert rows_of(weight, slice(8, 32)).values.shape == (24, 96)
    for part, whole in zip(some[:4], weight[:4], strict=True):
        assert part is whole is None or torch.equal(part, whole[8:24])


def test_no_bias_and_half_types() -> None:
    plain = nn.Linear(64, 24, bias=False).to(torch.bfloat16)
    layer = Int8Linear.from_float(plain)
    assert layer.bias is None
    x = rows(4, 64).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), plain(x), rtol=0.1, atol=0.05)


def test_autocast_decides_the_output(linear: nn.Linear) -> None:
    layer = Int8Linear.from_float(linear)
    narrow = WeightOnlyLinear.from_float(linear)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (layer, narrow, linear):
            assert each(rows(2, 96)).dtype == torch.bfloat16


def layers(linear: nn.Linear) -> list[QuantizedModule]:
    return [
        Int8Linear.from_float(linear, smooth=torch.full((96,), 2.0)),
        Int8Linear.from_float(linear, smooth=torch.ones(96), input_scale=torch.tensor(0.02)),
        WeightOnlyLinear.from_float(linear, bits=4, group_size=32, symmetric=False),
    ]


def test_scales_stay_float32(linear: nn.Linear) -> None:
    for layer in layers(linear):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer.half()
        for name, buffer in layer.named_buffers():
            if name == "bias":
                assert buffer.dtype == torch.float16
            else:
                assert torch.equal(buffer, before[name])
                assert buffer.dtype == before[name].dtype
        assert layer(rows(2, 96).half()).dtype == torch.float16


def test_shared_buffers_stay_shared(linear: nn.Linear) -> None:
    model = nn.ModuleList([Int8Linear.from_float(linear), Int8Linear.from_float(linear)])
    model[1].weight = model[0].weight
    for moved in (model.to("meta"), copy.deepcopy(model).double()):
        assert moved[1].weight is moved[0].weight


def test_copies_and_state_dicts(linear: nn.Linear) -> None:
    x = rows(3, 96)
    for layer in layers(linear):
        twin = copy.deepcopy(layer)
        fresh = type(layer)(**layer.config())
        assert torch.equal(twin(x), layer(x))
        assert not torch.equal(fresh(x), layer(x))
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), layer(x))
        assert repr(fresh) == repr(layer)
        assert not list(layer.parameters())


class Every(nn.ModuleList):
    """Layers side by side, which are so compiled at once."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self]


def test_compile_and_export_give_the_eager_result(linear: nn.Linear) -> None:
    model, x = Every(layers(linear)), rows(5, 96)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (x,)).module()
    for run in (compiled, exported):
        for found, wanted in zip(run(x), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: broken("weight"), "NaN"),
        (lambda: Int8Linear.from_float(nn.Linear(4, 4), smooth=torch.zeros(4)), "smooth has val"),
        (
            lambda: Int8Linear.from_float(nn.Linear(4, 4), input_scale=torch.tensor(torch.nan)),
            "input_scale has values that are not positive and finite",
        ),
        (lambda: Int8Linear(4, 4, zero_point=3), "zero_point is 3; only static layers with a bias"),
        (
            lambda: Int8Linear(4, 4, static=True, bias=False, zero_point=3),
            "zero_point is 3; only static layers with a bias",
        ),
        (lambda: WeightOnlyLinear(96, 4, bits=5), "bits is 5; use 8, 4, 3 or 2"),
        (lambda: WeightOnlyLinear(96, 4, bits=4, group_size=64), "group_size 64 does not divide"),
        (lambda: WeightOnlyLinear(96, 4, bits=8, symmetric=False), "8-bit weights are symmetric"),
        (
            lambda: WeightOnlyLinear.from_float(infinite(), bits=4, group_size=2),
            "the weights hold NaN or infinity",
        ),
    ],
)
def test_what_is_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def broken(name: str) -> Int8Linear:
    linear = nn.Linear(4, 4)
    getattr(linear, name).data[0] = torch.nan
    return Int8Linear.from_float(linear)


def infinite() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 1] = torch.inf
    return linear


@pytest.mark.usefixtures("without_native")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_computes_an_activation_once_for_all_its_readers() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 48), nn.Linear(48, 32)
    gelu, after = Int8Linear.from_float(first, activation="gelu"), Int8Linear.from_float(second)
    x = torch.randn(9, 64)
    with torch.no_grad():
        both = nn.Sequential(gelu, after)
        found, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), x)
    error = (found - both(x)).abs()
    # the last bit of an activation may lead to the next code, which changes its row
    assert float(error.median()) < 1e-6
    assert float(error.max()) < 2e-2
    assert code.count(".erf()") == 1, code
    assert "octavo.int8_gemm" not in code


@pytest.mark.skipif(bool(LIBRARY.reason()), reason=LIBRARY.reason())
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_calls_the_products_in_c() -> None:
    torch.manual_seed(0)
    both = nn.Sequential(
        Int8Linear.from_float(nn.Linear(64, 48), activation="gelu"),
        Int8Linear.from_float(nn.Linear(48, 32)),
    )
    x = torch.randn(9, 64)
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), x)
    torch.testing.assert_close(found, both(x), rtol=1e-6, atol=1e-6)
    for operator in ("dynamic_quantize", "int8_gemm"):
        assert code.count(f"torch.ops.octavo.{operator}.default(") == 2, code

"""Dynamic quantization: the kernel is the reference bit for bit, and the reference is ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import dynamic_quantize, explain
from octavo.kernels.common.codes import scale_of_peak, to_int8
from octavo.kernels.dynamic_quantize import schema
from octavo.kernels.dynamic_quantize.configs import candidates, default_config
from octavo.quant import PerTensor, PerToken, choose_qparams, quantize

triton_body = pytest.importorskip("octavo.kernels.dynamic_quantize.triton")

GRANULARITIES = ("per-token", "per-tensor")
SHAPES = [(1, 1), (3, 16), (2, 5, 33), (7, 128), (1, 4097), (1, 20000), (0, 8), (5,)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
BACKENDS = ["reference", "triton"]
CONFIGS = [{"ROWS": 4, "BLOCK": 128, "num_warps": 1}, {"BLOCK": 64, "num_warps": 1}]
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Poisoned:
    """torch, whose new tensors hold what no test expects."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *sizes: Any, **options: Any) -> torch.Tensor:
        return self._poison(torch.empty(*sizes, **options))

    def empty_like(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return self._poison(torch.empty_like(*arguments, **options))

    def _poison(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -111)


@pytest.fixture(autouse=True, scope="module")
def poison() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_body, "torch", Poisoned())
        yield


def both(
    x: torch.Tensor, granularity: str, smooth: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Asserts that the kernel and the reference agree, and returns the kernel's results."""
    kernel, oracle = (
        dynamic_quantize(x, granularity=granularity, smooth=smooth, backend=backend)
        for backend in ("triton", "reference")
    )
    for one, other in zip(kernel, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return list(kernel)


@every_granularity
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], granularity: str, device: torch.device) -> None:
    torch.manual_seed(0)
    codes, scale = both(torch.randn(shape, device=device) * 5, granularity)
    assert codes.shape == shape
    assert codes.dtype == torch.int8
    assert scale.shape == (shape[:-1] if granularity == "per-token" else ())


@every_granularity
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_dtypes(dtype: torch.dtype, granularity: str, smooth: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    x = (torch.randn(6, 100, device=device) * 3).to(dtype)
    both(x, granularity, torch.rand(100, device=device) + 0.1 if smooth else None)


@pytest.mark.parametrize(
    ("granularity", "ours"), [("per-token", PerToken()), ("per-tensor", PerTensor())]
)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_reference_is_the_rule_of_octavo_quant(
    granularity: str, ours: object, smooth: bool
) -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(9, 77, generator=random)
    divisor = torch.rand(77, generator=random) + 0.1 if smooth else None
    codes, scale = dynamic_quantize(x, granularity=granularity, smooth=divisor, backend="reference")
    values = x if divisor is None else x / divisor
    qparams = choose_qparams(values, "int8", ours)
    assert torch.equal(scale, qparams.scale)
    assert torch.equal(codes, quantize(values, qparams))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(GRANULARITIES),
)
def test_any_numbers(rows: list[list[float]], granularity: str) -> None:
    """The kernel, the reference and its definition, which saturates whatever comes."""
    x = torch.tensor(rows)
    codes, scale = both(x, granularity)
    peak = x.abs().amax(-1, keepdim=True) if granularity == "per-token" else x.abs().amax()
    torch.testing.assert_close(
        scale.reshape(peak.shape), scale_of_peak(peak), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(codes, to_int8(x, scale_of_peak(peak)))


@every_granularity
def test_ties_round_to_even(granularity: str, device: torch.device) -> None:
    """A peak of 127 makes the scale 1, and the codes the rounded numbers themselves."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]], device=device)
    codes, scale = both(x, granularity)
    assert float(scale.reshape(())) == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]


@every_granularity
def test_zeros_and_nan(granularity: str, device: torch.device) -> None:
    x = torch.zeros(3, 10, device=device)
    x[1] = 2.0
    x[2, 7] = math.nan
    codes, scale = both(x, granularity)
    assert bool(scale.reshape(-1)[-1].isnan())
    assert codes[2].tolist() == [-128] * 10
    if granularity == "per-token":
        assert float(scale[0]) == pytest.approx(1 / 127)
        assert codes[:2].tolist() == [[0] * 10, [127] * 10]


@every_granularity
@pytest.mark.parametrize("special", [math.inf, -math.inf, 1e-45, 3e-38, 3e38, -0.0])
def test_the_ends_of_float32(special: float, granularity: str, device: torch.device) -> None:
    x = torch.zeros(2, 6, device=device)
    x[1, :3] = torch.tensor([special, -special / 2, special / 3], device=device)
    both(x, granularity)


def test_strides_do_not_matter(device: torch.device) -> None:
    x = torch.randn(4, 2, 12, device=device)
    views = (
        x[:, :1].expand(4, 2, 12), x.reshape(2, 2, 2, 12).permute(1, 0, 2, 3)[..., ::2],
        x.transpose(0, 1), x[::2], x[:, 1:], x.transpose(1, 2), x[..., ::3], x[None],
    )  # fmt: skip
    for number, view in enumerate(views):
        for granularity in GRANULARITIES if number < 2 else ("per-token",):
            codes, _ = both(view, granularity)
            assert codes.is_contiguous()


@pytest.mark.parametrize(
    ("order", "copied"), [((0, 1, 2, 3), False), ((1, 0, 2, 3), True), ((2, 0, 1, 3), False)]
)
def test_rows_are_found_without_a_copy(order: tuple[int, ...], copied: bool) -> None:
    x = torch.randn(2, 3, 4, 5).permute(order)
    rows, inner, outer_stride, inner_stride = triton_body._rows(x)
    assert (rows.data_ptr() != x.data_ptr()) == copied
    flat = x.reshape(-1, 5)
    for r in range(24):
        start = r // inner * outer_stride + r % inner * inner_stride
        found = rows.as_strided((5,), (rows.stride(-1),), start)
        assert torch.equal(found, flat[r])


@every_granularity
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_config_gives_the_same(
    config: dict[str, int], smooth: bool, granularity: str, device: torch.device
) -> None:
    """Rows together, alone and in blocks; the last tile of rows reaches beyond the end."""
    torch.manual_seed(3)
    x = torch.randn(5, 101, device=device) * 3
    divisor = torch.rand(101, device=device) + 0.3 if smooth else None
    token = granularity == "per-token"
    found = triton_body.dynamic_quantize(x, divisor, token, config)
    expected = dynamic_quantize(x, granularity=granularity, smooth=divisor, backend="reference")
    assert all(map(torch.equal, found, expected))


@every_granularity
def test_what_the_launcher_offers_for_tuning(
    granularity: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of one key give the rule's result, and have the rule's fields."""
    asked: list[str] = []

    def choose(operator: str, key: str, where: Any, rule: Any, others: Any, run: Any) -> Any:
        assert (operator, where) == ("dynamic_quantize", x.device)
        expected = run(rule)
        for config in others():
            assert config.keys() == rule.keys()
            assert all(map(torch.equal, run(config), expected))
        asked.append(key)
        return rule

    monkeypatch.setattr(triton_body, "best_config", choose)
    x = torch.randn(3, 40, device=device)
    both(x, granularity)
    both(x, granularity, torch.ones(40, device=device))
    assert asked == [f"4x40 4 {granularity[4:]}", f"4x40 4 {granularity[4:]} smooth"]


def test_more_peaks_than_one_program_reduces(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(triton_body, "PARTS", 4)
    x = torch.randn(9, 8, device=device)
    both(x, "per-tensor")
    x[5, 2] = math.nan
    both(x, "per-tensor")


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_call(data: st.DataObject) -> None:
    draw = data.draw
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 70)))
    dtype, step = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(*shape[:-1], shape[-1] * step) * draw(st.sampled_from([0.1, 1, 30]))
    x = x.to(dtype)[..., ::step]
    if draw(st.booleans()) and x.ndim == 3:
        x = x.transpose(0, 1)
    smooth = (torch.rand(shape[-1]) + 0.3).to(draw(st.sampled_from(FLOATS)))
    both(x, draw(st.sampled_from(GRANULARITIES)), smooth if draw(st.booleans()) else None)


@every_backend
def test_the_input_stays_as_it_is(backend: str, device: torch.device) -> None:
    x, smooth = torch.randn(3, 32, device=device), torch.rand(32, device=device) + 0.3
    given = x.clone(), smooth.clone()
    dynamic_quantize(x, backend=backend)
    dynamic_quantize(x, smooth=smooth, backend=backend)
    assert torch.equal(x, given[0])
    assert torch.equal(smooth, given[1])


def test_the_correction_rounds_like_a_division() -> None:
    """What a GPU does for ordinary scales, with its fused product and sum by way of float64."""
    random = torch.Generator().manual_seed(0)
    peak = torch.rand(500_000, generator=random) * 4 + 1e-3
    scale = scale_of_peak(peak)
    near = (torch.randint(-127, 127, peak.shape, generator=random) + 0.5) * scale
    steps = torch.randint(-2, 3, peak.shape, generator=random, dtype=torch.int32)
    near = (near.view(torch.int32) + steps).view(torch.float32)
    for y in (near, peak / 2, peak, peak * (torch.rand(peak.shape, generator=random) * 2 - 1)):
        y = torch.minimum(y.abs(), peak).copysign(y)
        inverse = 1 / scale
        ratio = y * inverse
        left = (y.double() - ratio.double() * scale.double()).float()
        ratio = (ratio.double() + left.double() * inverse.double()).float()
        assert torch.equal(ratio, y / scale)
        shifted = ratio + 12582912.0
        assert torch.equal(shifted.view(torch.int32).to(torch.int8), to_int8(y, scale))


@every_granularity
def test_the_correction_in_the_kernel(granularity: str, device: torch.device) -> None:
    """The interpreter rounds twice, so a tie may go the other way there."""
    config = {"ROWS": 2, "BLOCK": 64, "num_warps": 1, "FMA": True}
    x = torch.randn(6, 50, device=device)
    for row in (x, torch.cat((x, torch.full((1, 50), math.nan)))):
        token = granularity == "per-token"
        codes, scale = triton_body.dynamic_quantize(row, None, token, config)
        wanted, same = dynamic_quantize(row, granularity=granularity, backend="reference")
        torch.testing.assert_close(scale, same, rtol=0, atol=0, equal_nan=True)
        assert int((codes.int() - wanted.int()).abs().max()) <= (device.type == "cpu")


@pytest.mark.parametrize(
    ("m", "k", "rows", "warps"),
    [(1, 384, 1, 1), (8192, 128, 16, 2), (8192, 768, 4, 4), (300, 768, 1, 1), (4096, 4096, 1, 4),
     (1, 4096, 1, 8), (1, 16384, 1, 32), (8192, 16384, 1, 16)],
)  # fmt: skip
def test_the_rule(m: int, k: int, rows: int, warps: int) -> None:
    chosen = default_config(m, k)
    assert (chosen["ROWS"], chosen["num_warps"]) == (rows, warps)
    assert chosen["BLOCK"] >= k


@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 768), (8192, 4096), (8192, 53248)])
def test_candidates(m: int, k: int) -> None:
    found = list(candidates(m, k))
    assert found[0] == default_config(m, k)
    assert len({str(sorted(one.items())) for one in found}) == len(found)
    for one in found:
        assert one["num_warps"] in (1, 2, 4, 8, 16, 32)
        assert one["BLOCK"] * one.get("ROWS", 1) <= 64 * 32 * one["num_warps"]


@every_backend
def test_the_operator_is_sound(backend: str, device: torch.device) -> None:
    x, smooth = torch.randn(4, 24, device=device), torch.rand(24, device=device) + 0.5
    operator = schema.OPERATOR
    for arguments in ((x, None, True), (x.T.contiguous().T.half(), smooth, False)):
        torch.library.opcheck(operator.overload, (*operator.flat(*arguments), backend))


class Block(torch.nn.Module):
    """Both granularities, with a divisor and without."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("smooth", torch.linspace(0.5, 2, 32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = dynamic_quantize(x * 2, smooth=self.smooth, backend="reference")
        whole = dynamic_quantize(x, granularity="per-tensor", backend="reference")
        return codes * scale.unsqueeze(-1), whole[0] * whole[1]


def test_compile_keeps_it_whole() -> None:
    x, model = torch.randn(4, 32), Block()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, other in zip(compiled(x), model(x), strict=True):
        assert torch.equal(one, other)


def test_export_keeps_it_whole() -> None:
    x, model = torch.randn(4, 32), Block()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("octavo.dynamic_quantize.default") == 2
    longer = torch.randn(9, 32)
    for one, other in zip(program.module()(longer), model(longer), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("without_native")
def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dynamic_quantize(torch.ones(1, 4))
    assert str(explain("dynamic_quantize")) == (
        "dynamic_quantize: reference (triton not: the tensors are on the CPU, where Triton has no "
        "compiler; native not: a test)"
    )
    with pytest.raises(UnsupportedError, match="backend 'triton' of dynamic_quantize cannot run"):
        dynamic_quantize(torch.ones(1, 4), backend="triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"x": torch.ones(2, 2, dtype=torch.float64)},
            "x is torch.float64; dynamic_quantize takes",
        ),
        ({"x": torch.ones(())}, r"x has shape \[\]; its last axis"),
        ({"x": torch.ones(2, 0)}, r"x has shape \[2, 0\]; its last axis"),
        ({"granularity": "per-group"}, "granularity 'per-group' is unknown; use per-token or"),
        ({"smooth": torch.ones(3)}, r"smooth is torch.float32 \[3\]; it must be .* \[4\]"),
        ({"smooth": torch.ones(4).int()}, r"smooth is torch.int32 \[4\]"),
        ({"smooth": torch.ones(4, device="meta")}, "smooth is on meta and x on cpu; move one"),
        ({"backend": "cuda"}, "has no backend 'cuda'; choose from auto, triton, native, reference"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dynamic_quantize(**{"x": torch.ones(2, 4), **arguments})

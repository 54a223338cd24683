"""Dynamic quantization: the kernel is the reference bit for bit, and the reference is ours.

What is fused before it is compared with float64: the scale within float32's rounding, and every
code is a nearest one up to that.
"""

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
from octavo.kernels.dynamic_quantize.configs import candidates, config
from octavo.kernels.dynamic_quantize.prologue import ACTIVATIONS, Prologue
from octavo.kernels.dynamic_quantize.schema import LayerNorm, RmsNorm, add_dynamic_quantize
from octavo.quant import PerTensor, PerToken, choose_qparams, quantize

triton_body = pytest.importorskip("octavo.kernels.dynamic_quantize.triton")

GRANULARITIES = ("per-token", "per-tensor")
SHAPES = [(1, 1), (3, 16), (2, 5, 33), (7, 128), (1, 4097), (1, 20000), (0, 8), (5,)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
BACKENDS = ["reference", "triton"]
FUSIONS = ["rms", "layer", "add", "add rms", "add layer", *ACTIVATIONS]
TILES = [
    {"ROWS": 4, "BLOCK": 128, "num_warps": 1},
    {"BLOCK": 64, "num_warps": 1},
]
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
EPS = 2.0**-23


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


def exact(x: torch.Tensor, p: Prologue) -> tuple[torch.Tensor, torch.Tensor]:
    """The values before quantization in float64, and how far float32 may be off, a row."""
    x = x.double()
    size = x.abs().amax(-1, keepdim=True)
    weight, bias = (None if value is None else value.double() for value in (p.weight, p.bias))
    if p.norm == "rms":
        y = x / (x.square().mean(-1, keepdim=True) + p.eps).sqrt()
        y = y if weight is None else y * weight
        slack = y.abs().amax(-1, keepdim=True)
    elif p.norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + p.eps).sqrt()
        y = centred / deviation * (1 if weight is None else weight) + (0 if bias is None else bias)
        # the mean is off by a rounding of the largest value
        largest = 1 if weight is None else weight.abs().amax()
        slack = size / deviation * largest + y.abs().amax(-1, keepdim=True)
    else:
        gate, up = x.chunk(2, -1) if p.activation == "silu-mul" else (x, torch.ones_like(x))
        y = {
            "none": lambda: gate,
            "gelu": lambda: gate * 0.5 * torch.special.erfc(-gate / math.sqrt(2)),
            "gelu-tanh": lambda: torch.nn.functional.gelu(gate, approximate="tanh"),
            "silu": lambda: gate * torch.sigmoid(gate),
            "silu-mul": lambda: gate * torch.sigmoid(gate) * up,
        }[p.activation]()
        slack = gate.abs().amax(-1, keepdim=True) * up.abs().amax(-1, keepdim=True)
    if p.smooth is not None:
        y, slack = y / p.smooth.double(), slack / p.smooth.double().min()
    return y, slack * 8 * EPS


def close_to_exact(
    codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, prologue: Prologue
) -> None:
    """Asserts that the scale is right, and that each code is a nearest one."""
    y, slack = exact(x, prologue)
    if scale.ndim == 0:
        slack = slack.amax()
        peak = y.abs().amax()
    else:
        peak = y.abs().amax(-1, keepdim=True)
    found = scale.double().reshape(peak.shape)
    off = (found * 127 - peak).abs()
    assert bool(((off <= slack + 4 * EPS * peak) | (peak <= slack)).all())
    distance = (codes.double() - y / found).abs()
    assert bool((distance <= 0.5 + 1e-4 + slack / found).all())


def run(
    kind: str,
    x: torch.Tensor,
    prologue: Prologue,
    granularity: str,
    backend: str,
    residual: torch.Tensor | None = None,
) -> None:
    """Runs the public function and compares it with float64."""
    norm: RmsNorm | LayerNorm | None = None
    if prologue.norm == "rms":
        norm = RmsNorm(prologue.weight, prologue.eps)
    elif prologue.norm == "layer":
        norm = LayerNorm(prologue.weight, prologue.bias, prologue.eps)
    options: dict[str, Any] = {
        "norm": norm, "smooth": prologue.smooth, "granularity": granularity, "backend": backend
    }  # fmt: skip
    if residual is None:
        codes, scale = dynamic_quantize(x, activation=prologue.activation, **options)
    else:
        before = residual.clone()
        codes, scale, total = add_dynamic_quantize(x, residual, **options)
        assert torch.equal(residual, before), "the stream given stays as it is"
        assert total.dtype == residual.dtype
        wanted = x.double() + residual.double()
        # the interpreter cuts bfloat16 off instead of rounding it
        step = torch.finfo(total.dtype).eps
        torch.testing.assert_close(total.double(), wanted, rtol=step, atol=1e-6)
        x = total
    assert codes.shape == (*x.shape[:-1], prologue.width(x.shape[-1])), kind
    assert codes.is_contiguous()
    assert scale.dtype == torch.float32
    close_to_exact(codes, scale, x, prologue)


def make(
    kind: str, shape: tuple[int, ...], smooth: bool, device: torch.device, affine: bool = True
) -> Prologue:
    """A prologue with random parameters; for "silu-mul" the shape is that of the codes."""
    k = shape[-1]
    weight = torch.rand(k, device=device) + 0.5 if affine else None
    divisor = torch.rand(k, device=device) + 0.3 if smooth else None
    if "rms" in kind:
        return Prologue("rms", weight, None, 1e-6, smooth=divisor)
    if "layer" in kind:
        bias = torch.randn(k, device=device).bfloat16() if affine else None
        return Prologue("layer", weight, bias, 1e-5, smooth=divisor)
    activation = "none" if "add" in kind else kind
    return Prologue(activation=activation, smooth=divisor)


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
def test_the_reference_is_the_rule_of_octavo_quant(granularity: str, ours: object) -> None:
    x = torch.randn(9, 77, generator=torch.Generator().manual_seed(2))
    codes, scale = dynamic_quantize(x, granularity=granularity, backend="reference")
    qparams = choose_qparams(x, "int8", ours)
    assert torch.equal(scale, qparams.scale)
    assert torch.equal(codes, quantize(x, qparams))


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


@every_granularity
def test_strides_do_not_matter(granularity: str, device: torch.device) -> None:
    x = torch.randn(4, 2, 12, device=device)
    views = (
        x.transpose(0, 1), x[::2], x[:, 1:], x.transpose(1, 2), x[..., ::3],
        x[:, :1].expand(4, 2, 12), x[None], x.reshape(2, 2, 2, 12).permute(1, 0, 2, 3)[..., ::2],
    )  # fmt: skip
    for view in views:
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
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", FUSIONS)
def test_any_tile_gives_the_same(
    kind: str, tile: dict[str, int], granularity: str, device: torch.device
) -> None:
    """Rows together, alone and in blocks; the last tile of rows reaches beyond the end."""
    torch.manual_seed(3)
    prologue = make(kind, (5, 101), True, device)
    x = torch.randn(5, 202 if kind == "silu-mul" else 101, device=device) * 3
    token = granularity == "per-token"
    if "add" in kind:
        residual = torch.randn(5, 101, device=device).half()
        codes, scale, total = triton_body.add_dynamic_quantize(x, residual, prologue, token, tile)
        assert torch.equal(total, (x + residual).half())
        x = total
    else:
        codes, scale = triton_body.dynamic_quantize(x, prologue, token, tile)
    close_to_exact(codes, scale, x, prologue)


@every_granularity
def test_what_the_launcher_offers_for_tuning(
    granularity: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates of one key give the rule's result, and have the rule's fields."""
    asked: list[str] = []

    def choose(operator: str, key: str, where: Any, rule: Any, others: Any, run: Any) -> Any:
        assert (operator, where) == ("dynamic_quantize", x.device)
        expected = run(rule)
        for tiles in others():
            assert tiles.keys() == rule.keys()
            assert all(map(torch.equal, run(tiles), expected))
        asked.append(key)
        return rule

    monkeypatch.setattr(triton_body, "best", choose)
    x = torch.randn(3, 40, device=device)
    both(x, granularity)
    assert asked == [f"4x40 4 {granularity[4:]} none none"]


def test_more_peaks_than_one_program_reduces(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(triton_body, "PARTS", 4)
    x = torch.randn(9, 8, device=device)
    both(x, "per-tensor")
    x[5, 2] = math.nan
    both(x, "per-tensor")


@every_backend
@every_granularity
@pytest.mark.parametrize("kind", FUSIONS)
def test_what_is_fused(kind: str, granularity: str, backend: str, device: torch.device) -> None:
    torch.manual_seed(4)
    for dtype in FLOATS:
        prologue = make(kind, (2, 63), dtype == torch.float16, device, dtype != torch.bfloat16)
        x = (torch.randn(2, 126 if kind == "silu-mul" else 63, device=device) * 2).to(dtype)
        residual = torch.randn(2, 63, device=device).to(dtype) if "add" in kind else None
        run(kind, x, prologue, granularity, backend, residual)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_fusion_of_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    kind = draw(st.sampled_from(FUSIONS))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 70)))
    dtype, stream = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 99)))
    cpu = torch.device("cpu")
    prologue = make(kind, shape, draw(st.booleans()), cpu, draw(st.booleans()))
    last = shape[-1] * (2 if kind == "silu-mul" else 1)
    step = draw(st.sampled_from([1, 2]))
    x = (torch.randn(*shape[:-1], last * step) * draw(st.sampled_from([0.1, 1, 30]))).to(dtype)
    x = x[..., ::step]
    if draw(st.booleans()) and x.ndim == 3:
        x = x.transpose(0, 1)
    residual = torch.randn(x.shape).to(stream) if "add" in kind else None
    run(kind, x, prologue, draw(st.sampled_from(GRANULARITIES)), "triton", residual)


@every_backend
def test_a_nan_passes_what_is_fused(backend: str, device: torch.device) -> None:
    x = torch.ones(2, 8, device=device)
    x[1, 3] = math.nan
    for options in ({"norm": RmsNorm()}, {"norm": LayerNorm()}, {"activation": "gelu"},
                    {"activation": "gelu-tanh"}, {"activation": "silu-mul"}):  # fmt: skip
        codes, scale = dynamic_quantize(x, backend=backend, **options)
        assert scale.isnan().tolist() == [False, True]
        assert codes[1].tolist() == [-128] * codes.shape[1]


@every_backend
def test_the_input_stays_as_it_is(backend: str, device: torch.device) -> None:
    for kind in FUSIONS:
        prologue = make(kind, (3, 32), True, device)
        x = torch.randn(3, 64 if kind == "silu-mul" else 32, device=device)
        before = x.clone()
        run(kind, x, prologue, "per-token", backend, x.clone() if "add" in kind else None)
        assert torch.equal(x, before)


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
    tile = {"ROWS": 2, "BLOCK": 64, "num_warps": 1, "FMA": True}
    x = torch.randn(6, 50, device=device)
    for row in (x, torch.cat((x, torch.full((1, 50), math.nan)))):
        token = granularity == "per-token"
        codes, scale = triton_body.dynamic_quantize(row, Prologue(), token, tile)
        wanted, same = dynamic_quantize(row, granularity=granularity, backend="reference")
        torch.testing.assert_close(scale, same, rtol=0, atol=0, equal_nan=True)
        assert int((codes.int() - wanted.int()).abs().max()) <= (device.type == "cpu")


@pytest.mark.parametrize(
    ("m", "k", "rows", "warps"),
    [(1, 384, 1, 1), (8192, 128, 16, 2), (8192, 768, 4, 4), (300, 768, 1, 1), (4096, 4096, 1, 4),
     (1, 4096, 1, 8), (1, 16384, 1, 32), (8192, 16384, 1, 16)],
)  # fmt: skip
def test_the_rule(m: int, k: int, rows: int, warps: int) -> None:
    chosen = config(m, k)
    assert (chosen["ROWS"], chosen["num_warps"]) == (rows, warps)
    assert chosen["BLOCK"] >= k


@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 768), (8192, 4096), (8192, 53248)])
def test_candidates(m: int, k: int) -> None:
    found = list(candidates(m, k))
    assert found[0] == config(m, k)
    assert len({str(sorted(one.items())) for one in found}) == len(found)
    for one in found:
        assert one["num_warps"] in (1, 2, 4, 8, 16, 32)
        assert one["BLOCK"] * one.get("ROWS", 1) <= 64 * 32 * one["num_warps"]


@every_backend
def test_the_operators_are_sound(backend: str, device: torch.device) -> None:
    x, smooth = torch.randn(4, 24, device=device), torch.rand(24, device=device) + 0.5
    for tail in (
        ("none", None, None, 0.0, "none", None, True, backend),
        ("layer", smooth, smooth, 1e-5, "none", smooth, False, backend),
        ("none", None, None, 0.0, "silu-mul", smooth[:12], True, backend),
    ):
        torch.library.opcheck(torch.ops.octavo.dynamic_quantize, (x, *tail))
    for residual in (x.half(), x.T.contiguous().T):
        tail = ("rms", smooth, None, 1e-6, "none", None, True, backend)
        torch.library.opcheck(torch.ops.octavo.add_dynamic_quantize, (x, residual, *tail))


class Block(torch.nn.Module):
    """What a pre-norm block does with both operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = LayerNorm(self.norm.weight, self.norm.bias, self.norm.eps)
        codes, scale, total = add_dynamic_quantize(x, x * 2, norm=norm, backend="reference")
        mixed = dynamic_quantize(
            total, activation="silu-mul", granularity="per-tensor", backend="reference"
        )
        return codes * scale.unsqueeze(-1), mixed[0] * mixed[1]


def test_compile_keeps_it_whole() -> None:
    x, model = torch.randn(4, 32), Block()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, other in zip(compiled(x), model(x), strict=True):
        assert torch.equal(one, other)


def test_export_keeps_it_whole() -> None:
    x, model = torch.randn(4, 32), Block()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"octavo.dynamic_quantize.default", "octavo.add_dynamic_quantize.default"} <= targets
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
    with pytest.raises(InputError, match=r"'relu' has not run in this process; known: \["):
        explain("relu")


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
        ({"smooth": torch.ones(3)}, r"smooth is torch.float32 \[3\]; x of shape \[2, 4\] needs"),
        ({"smooth": torch.ones(4).int()}, r"smooth is torch.int32 \[4\]"),
        ({"smooth": torch.ones(4, device="meta")}, "smooth is on meta and x on cpu; move one"),
        ({"backend": "cuda"}, "has no backend 'cuda'; choose from auto, triton, native, reference"),
        ({"activation": "relu"}, "activation 'relu' is unknown; use one of none, gelu, gelu-tanh"),
        (
            {"x": torch.ones(2, 5), "activation": "silu-mul"},
            r"x has shape \[2, 5\]; for silu-mul its last axis must hold two halves",
        ),
        (
            {"activation": "silu-mul", "smooth": torch.ones(4)},
            r"smooth is torch.float32 \[4\]; x of shape \[2, 4\] needs a floating tensor of \[2\]",
        ),
        ({"norm": RmsNorm(), "activation": "silu"}, "RmsNorm and silu at once; quantize after one"),
        ({"norm": "rms"}, r"norm is 'rms'; give RmsNorm\(...\), LayerNorm\(...\) or None"),
        ({"norm": RmsNorm(eps=-1.0)}, "norm.eps is -1.0; it must be finite and not negative"),
        ({"norm": RmsNorm(eps=math.nan)}, "norm.eps is nan; it must be finite"),
        ({"norm": RmsNorm(torch.ones(3))}, r"norm.weight is torch.float32 \[3\]; x of shape"),
        ({"norm": LayerNorm(bias=torch.ones(1))}, r"norm.bias is torch.float32 \[1\]; x of shape"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dynamic_quantize(**{"x": torch.ones(2, 4), **arguments})


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.ones(2, 5), r"residual is torch.float32 \[2, 5\]; it must be .* \[2, 4\]"),
        (torch.ones(2, 4).double(), r"residual is torch.float64 \[2, 4\]; it must be float16, bfl"),
        (torch.ones(2, 4, device="meta"), "residual is on meta and x on cpu; move one"),
    ],
)
def test_what_cannot_be_added(residual: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_dynamic_quantize(torch.ones(2, 4), residual)

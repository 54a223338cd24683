"""Dynamic quantization: the kernel is the reference bit for bit, and the reference is ours."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import dynamic_quantize, explain
from octavo.quant import PerTensor, PerToken, choose_qparams, quantize

pytest.importorskip("triton")

GRANULARITIES = ("per-token", "per-tensor")
SHAPES = [(1, 1), (3, 16), (2, 5, 33), (7, 128), (1, 4097), (2, 20000), (0, 8), (5,)]
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(GRANULARITIES),
)
def test_any_numbers(rows: list[list[float]], granularity: str) -> None:
    both(torch.tensor(rows), granularity)


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
def test_strides_do_not_matter(granularity: str, device: torch.device) -> None:
    x = torch.randn(8, 6, 40, device=device)
    for view in (x.transpose(0, 1), x[:, ::2], x.transpose(1, 2), x[..., ::3], x.expand(8, 6, 40)):
        codes, _ = both(view, granularity)
        assert codes.is_contiguous()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_operator_is_sound(backend: str, device: torch.device) -> None:
    x, smooth = torch.randn(4, 24, device=device), torch.rand(24, device=device) + 0.5
    for arguments in ((x, None, True, backend), (x.half(), smooth, False, backend)):
        torch.library.opcheck(torch.ops.octavo.dynamic_quantize, arguments)


def test_compile_keeps_it_whole() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dynamic_quantize(x * 2, backend="reference")

    x = torch.randn(4, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, other in zip(compiled(x), model(x), strict=True):
        assert torch.equal(one, other)


class Quantizes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_quantize(x, granularity="per-tensor", backend="reference")
        return codes * scale


def test_export_keeps_it_whole() -> None:
    x = torch.randn(4, 32)
    program = torch.export.export(
        Quantizes(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert any("dynamic_quantize" in str(node.target) for node in program.graph.nodes)
    longer = torch.randn(9, 32)
    assert torch.equal(program.module()(longer), Quantizes()(longer))


def test_the_choice_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dynamic_quantize(torch.ones(1, 4))
    assert str(explain("dynamic_quantize")) == (
        "dynamic_quantize: reference (triton not: the tensors are on the CPU, where Triton has no "
        "compiler)"
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
        ({"backend": "cuda"}, "has no backend 'cuda'; choose from auto, triton, reference"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dynamic_quantize(**{"x": torch.ones(2, 4), **arguments})

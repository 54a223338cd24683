"""Softmax attention in C beside torch's and float64's, and where it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels import attention, explain, use_backend
from octavo.kernels.attention import native
from octavo.kernels.attention.schema import OPERATOR
from octavo.kernels.native import library
from octavo.layers.attention.multihead import MultiheadAttention

NO_C = native.LIBRARY.reason()
in_c = pytest.mark.skipif(bool(NO_C), reason=NO_C)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C as it is built for processors that do not multiply bfloat16, and for those that do."""
    if NO_C:
        pytest.skip(NO_C)
    asked: str = request.param
    if asked == "float32":
        monkeypatch.setattr(library, "OPTIONAL", ())
        there = native.LIBRARY
        narrow = library.Library(there.source, there.functions)
        assert narrow.reason() == ""
        monkeypatch.setattr(native, "LIBRARY", narrow)
    elif not library._optional_flags(str(library._compiler())):
        pytest.skip("this processor or compiler does not know products in bfloat16")
    return asked


def in_native(*given: Any, **options: Any) -> torch.Tensor:
    return attention(*given, **options, backend="native")


def inputs(b: int, h: int, t: int, s: int, d: int) -> tuple[torch.Tensor, ...]:
    """As a model has them: heads are a view of features."""
    random = torch.Generator().manual_seed(t + s + d)
    sizes = (t, s, s)
    return tuple(torch.randn(b, n, h, d, generator=random).transpose(1, 2) for n in sizes)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    result = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, **options
    )
    return result.nan_to_num(0)  # queries that see no key


def bound(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Of the errors that rounding queries, keys, weights and values to bfloat16 makes of `out`.

    A weight p that becomes p (1 + e) with |e| <= r changes the sum of p v, where those of p are 1,
    by e p (v - out) / (1 + sum of e p) at most.
    """
    unit, scale = 2.0**-8, options.get("scale") or q.shape[-1] ** -0.5
    q, k, v = (x.double() for x in (q, k, v))
    weights = exact(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1), **options)
    largest = (q.abs() * scale) @ k.abs().transpose(-1, -2)
    changed = weights * ((1 + unit + 2e-4) * torch.exp(largest * (2 * unit + unit**2)) - 1)
    every = changed.sum(-1, keepdim=True)
    assert (every < 0.9).all()
    from_weights = (changed @ v.abs() + every * out.abs()) / (1 - every)
    return from_weights + unit * (weights + changed) @ v.abs() / (1 - every)


def close(products: str, found: torch.Tensor, *given: torch.Tensor, **options: Any) -> None:
    """To float64's, as near as products in float32 or in bfloat16 are."""
    q, k, v = given
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    wanted = exact(q, k, v, **options)
    allowed = 2e-6 + 3e-6 * wanted.abs()
    if products == "bfloat16":
        allowed += bound(q, k, v, wanted, **options)
    ratio = float(((found - wanted).abs() / allowed).max())
    assert ratio <= 1, f"errors are {ratio} of what is allowed"


SIZES = [
    (1, 1, 6, 1, 1), (2, 3, 12, 16, 8), (1, 2, 13, 33, 17), (2, 2, 25, 31, 32), (1, 2, 193, 70, 40),
    (1, 1, 7, 1100, 64), (2, 1, 200, 520, 128), (1, 1, 30, 300, 256),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "pairs", "added", "causal"])
def test_it_is_softmax_attention(size: tuple[int, ...], mask: str, products: str) -> None:
    (b, h, t, s, _), random = size, torch.Generator().manual_seed(0)
    q, k, v = inputs(*size)
    given, causal = None, mask == "causal"
    if mask == "keys":
        given = torch.rand(b, 1, 1, s, generator=random) < 0.7
        given[..., 0] = True
    elif mask == "pairs":
        given = torch.rand(b, h, t, s, generator=random) < 0.7
        given[..., 0] = True
    elif mask == "added":
        given = torch.randn(t, s, generator=random) * 4
    found = in_native(q, k, v, given, causal=causal)
    assert found.shape == q.shape
    assert found.transpose(1, 2).is_contiguous()
    close(products, found, q, k, v, attn_mask=given, is_causal=causal)


@pytest.mark.parametrize("size", [(2, 3, 128, 128, 32), (1, 2, 50, 700, 64)], ids=str)
def test_how_far_it_is_from_float64(size: tuple[int, ...], products: str) -> None:
    q, k, v = inputs(*size)
    wanted = exact(q, k, v)
    noise = wanted - in_native(q, k, v)
    sqnr = float(20 * torch.log10(torch.linalg.norm(wanted) / torch.linalg.norm(noise)))
    assert sqnr > {"float32": 120, "bfloat16": 48}[products]


def test_sums_of_weights_are_of_the_weights_that_are_used(products: str) -> None:
    q, k, v = inputs(2, 2, 20, 77, 17)
    rounded = v.bfloat16().float() if products == "bfloat16" else v
    same = rounded[:, :, :1].expand_as(v)
    torch.testing.assert_close(
        in_native(q, k, v[:, :, :1].expand_as(v)),
        same[:, :, :20], rtol=1e-6, atol=0,
    )  # fmt: skip
    one = torch.arange(77) == torch.tensor(40)
    found = in_native(q, k, v, one.expand(20, 77))
    assert torch.equal(found, rounded[:, :, 40:41].expand_as(q))


@pytest.mark.parametrize("shape", [(20, 1), (1, 1), (2, 1, 1, 33), (3, 20, 1), (2, 3, 20, 33)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_any_shape_and_strides(
    shape: tuple[int, ...], dtype: torch.dtype, products: str
) -> None:
    q, k, v = inputs(2, 3, 20, 33, 16)
    random = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=random)
    mask = mask < 0.8 if dtype == torch.bool else mask * 3
    for given in (mask, mask.transpose(-1, -2).contiguous().transpose(-1, -2)):
        found = in_native(q, k, v, given)
        close(products, found, q, k, v, attn_mask=given)


def test_heads_that_share_keys(products: str) -> None:
    q, k, v = inputs(2, 6, 14, 20, 8)
    found = in_native(q, k[:, :2], v[:, :2], causal=True)
    close(products, found, q, k[:, :2], v[:, :2], is_causal=True)


def test_large_scores(products: str) -> None:
    q, k, v = inputs(1, 2, 20, 600, 16)
    # integers times powers of two, and a scale that makes scores powers of two: exact in bfloat16
    q, k, scale = (q * 4).round() * 2.0**12, (k * 4).round(), math.log(2)
    k[:, :, 3] *= 16  # a large score, of either sign
    found = in_native(q, k, v, scale=scale)
    tolerance = {"float32": 1e-3, "bfloat16": 2.0**-8}[products]
    wanted = exact(q, k, v, scale=scale)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-3)
    assert in_native(q * 1e30, k, v).isfinite().all()


def test_rows_without_keys(products: str) -> None:
    q, k, v = inputs(1, 2, 20, 600, 16)
    mask = torch.ones(1, 1, 20, 600, dtype=torch.bool)
    mask[..., 3, :] = False
    mask[..., 4, :550] = False  # the first block of keys has none
    found = in_native(q, k, v, mask)
    assert (found[:, :, 3] == 0).all()
    close(products, found, q, k, v, attn_mask=mask)
    # transformers hides keys by the lowest float: with all of them hidden, they are all the same
    lowest = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found = in_native(q, k, v, lowest)
    close(products, found, q, k, v, attn_mask=lowest)
    assert float((found[:, :, 3] - v.mean(2)).abs().max()) < 1e-3
    never = torch.where(mask, 0.0, -torch.inf)
    assert torch.equal(in_native(q, k, v, never), in_native(q, k, v, mask))


def test_nan_stays_where_it_belongs(products: str) -> None:
    q, k, v = inputs(1, 2, 20, 40, 16)
    q[0, 0, 5] = torch.nan
    found = in_native(q, k, v)
    assert found[0, 0, 5].isnan().all()
    assert int(found.isnan().sum()) == 16


def test_any_number_of_threads_gives_the_same_bits(products: str) -> None:
    q, k, v = inputs(3, 4, 250, 130, 32)
    most, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(in_native(q, k, v))
    finally:
        torch.set_num_threads(most)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "added", "causal"])
def test_the_reference_is_softmax_attention(mask: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 4, 9, 12, 8))
    k, v = k[:, :2], v[:, :2]
    given = torch.rand(2, 1, 9, 12) < 0.7
    given[..., 3, :] = False
    if mask == "added":
        given = torch.randn(9, 12).to(dtype)
    passed = None if mask in ("none", "causal") else given
    causal = mask == "causal"
    found = attention(q, k, v, passed, scale=0.3, causal=causal, backend="reference")
    assert found.dtype == dtype
    assert found.transpose(1, 2).is_contiguous()
    wide = (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    wanted = exact(*wide, attn_mask=passed, is_causal=causal, scale=0.3)
    unit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=unit, atol=unit)
    if mask == "bool":
        assert (found[:, :, 3] == 0).all(), "this query sees no key"


@in_c
def test_what_it_leaves_to_torch() -> None:
    q, k, v = inputs(1, 2, 8, 8, 16)
    assert native.reason(q, k, v) == ""
    few = "there are no keys, or fewer than 6 queries"
    wide = inputs(1, 2, 8, 8, 257)
    for given, reason in (
        ((q.half(), k.half(), v.half()), "it computes in float32"),
        ((q[:, :, :3], k, v), few),
        ((q, k[:, :, :0], v[:, :, :0]), few),
        (wide, "heads have more than 256 features"),
        ((q.to("meta"), k, v), "the tensors are on meta"),
    ):
        assert native.reason(*given) == reason
        if not given[0].is_meta:
            attention(*given)
            assert str(explain("attention")) == f"attention: reference (native not: {reason})"
            with pytest.raises(UnsupportedError, match=f"cannot run this: {reason}; use backend"):
                in_native(*given)
    double = torch.zeros(8, 8, dtype=torch.float64)
    assert native.reason(q, k, v, double) == "the mask is torch.float64"
    attention(q, k, v)
    assert explain("attention").implementation == "native"
    with use_backend("reference"):
        attention(q, k, v)
    assert explain("attention").implementation == "reference"


def test_the_operator_is_sound() -> None:
    q, k, v = inputs(2, 2, 9, 20, 8)
    mask = torch.rand(2, 1, 1, 20) < 0.5
    torch.library.opcheck(OPERATOR.overload, (q, k, v, mask, 0.5, False, "auto"))
    for given in (None, mask.float()):
        for backend in ("auto", "reference"):  # whether one writes to its arguments
            call = (q, k, v, given, 0.5, False, backend)
            torch.library.opcheck(
                OPERATOR.overload, call, test_utils=("test_schema", "test_faketensor")
            )


@pytest.mark.parametrize("padded", [False, True])
def test_multihead_attention_uses_it(
    padded: bool, products: str, count_calls: Callable[[Any, str], list[int]]
) -> None:
    torch.manual_seed(0)
    one = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, padding = torch.randn(2, 10, 32), None
    if padded:
        padding = torch.arange(10).expand(2, 10) > torch.tensor([[9], [6]])
    calls = count_calls(native.LIBRARY, "octavo_attention")
    with torch.no_grad():
        found, _ = MultiheadAttention(one)(x, x, x, padding, need_weights=False)
        wanted, _ = one(x, x, x, padding, need_weights=True)
    assert calls == [1]
    tolerance = {"float32": 1e-6, "bfloat16": 2e-3}[products]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=tolerance)


def test_it_runs_where_the_c_does_not(without_native: None) -> None:
    q, k, v = inputs(2, 4, 14, 20, 8)
    given = (q, k[:, :2], v[:, :2], torch.rand(2, 1, 1, 20) < 0.8)
    found = attention(*given, scale=0.3)
    assert str(explain("attention")) == "attention: reference (native not: a test)"
    close("float32", found, *given[:3], attn_mask=given[3], scale=0.3)
    assert found.transpose(1, 2).is_contiguous()
    assert torch.equal(torch.ops.octavo.attention(*given, 0.3, False, "auto"), found)


def test_gradients_are_torchs_and_the_operator_has_none() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 8, 8, 16))
    attention(q, k, v).square().sum().backward()
    found = [x.grad for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    functional.scaled_dot_product_attention(q, k, v).square().sum().backward()
    for one, x in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(one, x.grad)
    with pytest.raises(UnsupportedError, match="octavo::attention has no gradient"):
        attention(q, k, v, backend="reference").sum().backward()


@pytest.mark.parametrize("without_c", [False, True], ids=["", "without C"])
def test_a_compiler_sees_one_operator_or_torchs(
    without_c: bool, request: pytest.FixtureRequest
) -> None:
    if without_c:
        request.getfixturevalue("without_native")
    elif NO_C:
        pytest.skip(NO_C)
    q, k, v = inputs(1, 2, 8, 8, 16)
    mask, seen = torch.rand(1, 1, 8, 8) < 0.8, []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(attention, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(q, k, v, mask), attention(q, k, v, mask))
    assert sum("octavo.attention" in name for name in seen) == (not without_c)
    assert sum("scaled_dot_product_attention" in name for name in seen) == without_c


Q, K, V = inputs(1, 4, 8, 9, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((Q[0], K, V), r"q \[4, 8, 16\], k .* do not fit; they are \[B, H, T, D\], \[B, G, S, D\]"),
        ((Q, K[0], V[0]), r"q \[1, 4, 8, 16\], k \[4, 9, 16\] and v \[4, 9, 16\] do not fit"),
        ((Q, K, V[:, :, 1:]), r"k \[1, 4, 9, 16\] and v \[1, 4, 8, 16\] do not fit"),
        ((Q[..., 1:], K, V), "B and D are the same, and each head of k serves H / G of q"),
        ((Q.expand(2, -1, -1, -1), K, V), "B and D are the same"),
        ((Q, K[:, :3], V[:, :3]), "each head of k serves H / G of q"),
        ((Q, K[:, :0], V[:, :0]), "each head of k serves H / G of q"),
        ((Q, K.half(), V), "k is torch.float16 on cpu and q torch.float32 on cpu"),
        ((Q, K, V.to("meta")), "v is torch.float32 on meta and q torch.float32 on cpu"),
        ((Q.int(), K.int(), V.int()), "q is torch.int32"),
        ((Q, K, V, torch.ones(8, 9).to("meta")), "the mask is on meta and q on cpu; move one"),
        ((Q, K, V, torch.ones(3, 9)), r"mask .*\[3, 9\]"),
        ((Q, K, V, torch.ones(8, 9).double()), "mask is torch.float64"),
    ],
)
def test_what_is_refused(given: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention(*given)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no backend 'flash'; choose from auto, native, reference"):
        attention(Q, K, V, backend="flash")

"""Softmax attention in C beside torch's and float64's, and where it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.kernels import use_backend
from octavo.kernels.attention import schema as attention_native
from octavo.kernels.native import library as native
from octavo.layers.attention.multihead import MultiheadAttention

pytestmark = pytest.mark.skipif(
    bool(attention_native.LIBRARY.why_not()), reason=attention_native.LIBRARY.why_not()
)


@pytest.fixture(autouse=True, params=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C as it is built for processors that do not multiply bfloat16, and for those that do."""
    asked: str = request.param
    if asked == "float32":
        monkeypatch.setattr(native, "OPTIONAL", ())
        there = attention_native.LIBRARY
        library = native.Library(there.source, there.functions)
        assert library.why_not() == ""
        monkeypatch.setattr(attention_native, "LIBRARY", library)
    elif not native._optional_flags(str(native._compiler())):
        pytest.skip("this processor or compiler does not know products in bfloat16")
    return asked


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
    found = attention_native.attention(q, k, v, given, causal=causal)
    assert found.shape == q.shape
    assert found.transpose(1, 2).is_contiguous()
    close(products, found, q, k, v, attn_mask=given, is_causal=causal)


@pytest.mark.parametrize("size", [(2, 3, 128, 128, 32), (1, 2, 50, 700, 64)], ids=str)
def test_how_far_it_is_from_float64(size: tuple[int, ...], products: str) -> None:
    q, k, v = inputs(*size)
    wanted = exact(q, k, v)
    noise = wanted - attention_native.attention(q, k, v)
    sqnr = float(20 * torch.log10(torch.linalg.norm(wanted) / torch.linalg.norm(noise)))
    assert sqnr > {"float32": 120, "bfloat16": 48}[products]


def test_sums_of_weights_are_of_the_weights_that_are_used(products: str) -> None:
    q, k, v = inputs(2, 2, 20, 77, 17)
    rounded = v.bfloat16().float() if products == "bfloat16" else v
    same = rounded[:, :, :1].expand_as(v)
    torch.testing.assert_close(
        attention_native.attention(q, k, v[:, :, :1].expand_as(v)),
        same[:, :, :20], rtol=1e-6, atol=0,
    )  # fmt: skip
    one = torch.arange(77) == torch.tensor(40)
    found = attention_native.attention(q, k, v, one.expand(20, 77))
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
        found = attention_native.attention(q, k, v, given)
        close(products, found, q, k, v, attn_mask=given)


def test_heads_that_share_keys(products: str) -> None:
    q, k, v = inputs(2, 6, 14, 20, 8)
    found = attention_native.attention(q, k[:, :2], v[:, :2], causal=True)
    close(products, found, q, k[:, :2], v[:, :2], is_causal=True)


def test_large_scores(products: str) -> None:
    q, k, v = inputs(1, 2, 20, 600, 16)
    # integers times powers of two, and a scale that makes scores powers of two: exact in bfloat16
    q, k, scale = (q * 4).round() * 2.0**12, (k * 4).round(), math.log(2)
    k[:, :, 3] *= 16  # a large score, of either sign
    found = attention_native.attention(q, k, v, scale=scale)
    tolerance = {"float32": 1e-3, "bfloat16": 2.0**-8}[products]
    wanted = exact(q, k, v, scale=scale)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-3)
    assert attention_native.attention(q * 1e30, k, v).isfinite().all()


def test_rows_without_keys(products: str) -> None:
    q, k, v = inputs(1, 2, 20, 600, 16)
    mask = torch.ones(1, 1, 20, 600, dtype=torch.bool)
    mask[..., 3, :] = False
    mask[..., 4, :550] = False  # the first block of keys has none
    found = attention_native.attention(q, k, v, mask)
    assert (found[:, :, 3] == 0).all()
    close(products, found, q, k, v, attn_mask=mask)
    # transformers hides keys by the lowest float: with all of them hidden, they are all the same
    lowest = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found = attention_native.attention(q, k, v, lowest)
    close(products, found, q, k, v, attn_mask=lowest)
    assert float((found[:, :, 3] - v.mean(2)).abs().max()) < 1e-3
    never = torch.where(mask, 0.0, -torch.inf)
    assert torch.equal(
        attention_native.attention(q, k, v, never), attention_native.attention(q, k, v, mask)
    )


def test_nan_stays_where_it_belongs() -> None:
    q, k, v = inputs(1, 2, 20, 40, 16)
    q[0, 0, 5] = torch.nan
    found = attention_native.attention(q, k, v)
    assert found[0, 0, 5].isnan().all()
    assert int(found.isnan().sum()) == 16


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    q, k, v = inputs(3, 4, 250, 130, 32)
    most = torch.get_num_threads()
    one = attention_native.attention(q, k, v)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(attention_native.attention(q, k, v), one)
    finally:
        torch.set_num_threads(most)


def test_what_it_leaves_to_torch() -> None:
    q, k, v = inputs(1, 2, 8, 8, 16)

    def why(*given: torch.Tensor) -> str:
        return attention_native.why_not(*given)

    assert why(q, k, v) == ""
    assert why(q.half(), k, v) == "it computes in float32"
    assert why(q[:, :, :3], k, v) == "there are no keys, or fewer than 6 queries"
    assert why(q, k, v[:, :, 1:]) == "queries, keys and values are of different sizes"
    assert why(q, k[:, :, :0], v[:, :, :0]) == why(q[:, :, :3], k, v)
    assert why(q[:, :1], k, v) == "heads cannot share their keys, or have more than 256 features"
    assert why(q, k, v, torch.zeros(8, 8, dtype=torch.float64)) == "the mask is torch.float64"
    assert why(q, k, v.to("meta")) == "not all tensors are on the CPU"
    assert why(q, k, v.detach().requires_grad_()) == "a gradient is wanted, which it has not"
    with use_backend("reference"):
        assert why(q, k, v) == "another backend or dtype is asked for"
    with torch.autocast("cpu", torch.bfloat16):
        assert why(q, k, v) == "another backend or dtype is asked for"


def test_the_operator_is_sound() -> None:
    q, k, v = inputs(2, 2, 9, 20, 8)
    mask = torch.rand(2, 1, 1, 20) < 0.5
    for given in (None, mask, mask.float()):
        torch.library.opcheck(torch.ops.octavo.attention, (q, k, v, given, 0.5, False))


@pytest.mark.parametrize("padded", [False, True])
def test_multihead_attention_uses_it(
    padded: bool, products: str, count_calls: Callable[[Any, str], list[int]]
) -> None:
    torch.manual_seed(0)
    one = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, padding = torch.randn(2, 10, 32), None
    if padded:
        padding = torch.arange(10).expand(2, 10) > torch.tensor([[9], [6]])
    calls = count_calls(attention_native, "_attend")
    with torch.no_grad():
        found, _ = MultiheadAttention(one)(x, x, x, padding, need_weights=False)
        wanted, _ = one(x, x, x, padding, need_weights=True)
    assert calls == [1]
    tolerance = {"float32": 1e-6, "bfloat16": 2e-3}[products]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=tolerance)


def test_the_operator_runs_where_the_c_does_not(without_native: None) -> None:
    q, k, v = inputs(2, 4, 14, 20, 8)
    given = (q, k[:, :2], v[:, :2], torch.rand(2, 1, 1, 20) < 0.8, 0.3)
    found = torch.ops.octavo.attention(*given, False)
    close("float32", found, *given[:3], attn_mask=given[3], scale=0.3)
    assert found.transpose(1, 2).is_contiguous()


def test_gradients_are_torchs_and_the_operator_has_none() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 8, 8, 16))
    assert attention_native.why_not(q, k, v)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.ops.octavo.attention(q, k, v, None, 0.3, False).sum().backward()

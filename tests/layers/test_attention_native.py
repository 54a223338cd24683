"""Softmax attention in C beside torch's and float64's, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from octavo.kernels import use_backend
from octavo.layers import attention_native
from octavo.layers.attention import MultiheadAttention

pytestmark = pytest.mark.skipif(
    bool(attention_native.LIBRARY.why_not()), reason=attention_native.LIBRARY.why_not()
)


def inputs(b: int, h: int, t: int, s: int, d: int) -> tuple[torch.Tensor, ...]:
    """As a model has them: heads are a view of features."""
    random = torch.Generator().manual_seed(t + s + d)
    sizes = (t, s, s)
    return tuple(torch.randn(b, n, h, d, generator=random).transpose(1, 2) for n in sizes)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, **options
    )


SIZES = [
    (1, 1, 6, 1, 1), (2, 3, 12, 16, 8), (1, 2, 13, 33, 17), (2, 2, 25, 31, 32), (1, 2, 193, 70, 40),
    (1, 1, 7, 1100, 64), (2, 1, 200, 520, 128), (1, 1, 30, 300, 256),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "pairs", "added", "causal"])
def test_it_is_softmax_attention(size: tuple[int, ...], mask: str) -> None:
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
    wanted = exact(q, k, v, attn_mask=given, is_causal=causal)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(20, 1), (1, 1), (2, 1, 1, 33), (3, 20, 1), (2, 3, 20, 33)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_any_shape_and_strides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 3, 20, 33, 16)
    random = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=random)
    mask = mask < 0.8 if dtype == torch.bool else mask * 3
    for given in (mask, mask.transpose(-1, -2).contiguous().transpose(-1, -2)):
        found = attention_native.attention(q, k, v, given)
        wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
        torch.testing.assert_close(found, wanted.nan_to_num(0), rtol=3e-6, atol=2e-6)


def test_heads_that_share_keys() -> None:
    q, k, v = inputs(2, 6, 14, 20, 8)
    found = attention_native.attention(q, k[:, :2], v[:, :2], causal=True)
    many = (x[:, :2].repeat_interleave(3, 1) for x in (k, v))
    torch.testing.assert_close(
        found.double(), exact(q, *many, is_causal=True), rtol=3e-6, atol=2e-6
    )


def test_large_scores_rows_without_keys_and_scales() -> None:
    q, k, v = inputs(1, 2, 20, 600, 16)
    found = attention_native.attention(q * 1e4, k, v, scale=0.3)
    torch.testing.assert_close(
        found.double(), exact(q * 1e4, k, v, scale=0.3), rtol=1e-3, atol=1e-3
    )
    mask = torch.ones(1, 1, 20, 600, dtype=torch.bool)
    mask[..., 3, :] = False
    mask[..., 4, :550] = False  # the first block of keys has none
    found = attention_native.attention(q, k, v, mask)
    assert (found[:, :, 3] == 0).all()
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=3e-6, atol=2e-6)


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
def test_multihead_attention_uses_it(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, padding = torch.randn(2, 10, 32), None
    if padded:
        padding = torch.arange(10).expand(2, 10) > torch.tensor([[9], [6]])
    calls = []
    run = attention_native._attend
    monkeypatch.setattr(attention_native, "_attend", lambda *a: calls.append(1) or run(*a))
    with torch.no_grad():
        found, _ = MultiheadAttention(one)(x, x, x, padding, need_weights=False)
        wanted, _ = one(x, x, x, padding, need_weights=True)
    assert calls == [1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_operator_runs_where_the_c_does_not(without_native: None) -> None:
    q, k, v = inputs(2, 4, 14, 20, 8)
    given = (q, k[:, :2], v[:, :2], torch.rand(2, 1, 1, 20) < 0.8, 0.3)
    found = torch.ops.octavo.attention(*given, False)
    many = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    wanted = exact(q, *many, attn_mask=given[3], scale=0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=2e-6)
    assert found.transpose(1, 2).is_contiguous()


def test_gradients_are_torchs_and_the_operator_has_none() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 8, 8, 16))
    assert attention_native.why_not(q, k, v)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.ops.octavo.attention(q, k, v, None, 0.3, False).sum().backward()

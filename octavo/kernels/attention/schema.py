"""Softmax attention of float32 tensors in C, for CPUs with AVX-512.

Torch multiplies the small matrices of a head one by one with a library that is made for large
ones; around INT8 layers that takes a quarter of an encoder's time. Where the processor has
AVX512_BF16 (and the compiler knows it), products are of bfloat16 with sums in float32, twice as
many at a time: an SQNR of about 50 dB on normally distributed inputs. Elsewhere they are of
float32. The softmax is computed in float32 either way.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.dispatch.select import asked_backend, is_plain_call
from octavo.kernels.native.library import FLOAT, INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.native.memory import new_result

__all__ = ["attention", "why_not"]

FEWEST_QUERIES = 6
"""Tiles are 12 queries high; with fewer than half of them torch is faster."""
MOST_SIZE = 256
LANES = 16
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_attention": [*[POINTER] * 7, *[SIZE] * 6, FLOAT, INT, INT]},
)


def why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> str:
    """Why `attention` cannot or should not take these, or nothing.

    Args:
        q: [B, H, T, D].
        k: [B, G, S, D].
        v: of the shape of k.
        mask: as `attention` takes it.
    """
    given = (q, k, v) if mask is None else (q, k, v, mask)
    if any(one.device.type != "cpu" for one in given):
        return "not all tensors are on the CPU"
    if any(one.dtype != torch.float32 for one in (q, k, v)):
        return "it computes in float32"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        return f"the mask is {mask.dtype}"
    if q.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        return "queries, keys and values are of different sizes"
    if q.shape[1] % k.shape[1] or q.shape[3] > MOST_SIZE:
        return f"heads cannot share their keys, or have more than {MOST_SIZE} features"
    # the operator asks for itself: a compiler should not make this a property of its program
    if not torch.compiler.is_compiling() and (not k.numel() or q.shape[2] < FEWEST_QUERIES):
        return f"there are no keys, or fewer than {FEWEST_QUERIES} queries"
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        return "a gradient is wanted, which it has not"
    # torch.compile cannot look into a context, and says so only when it runs
    asked = "auto" if torch.compiler.is_compiling() else asked_backend()
    if asked != "auto" or torch.is_autocast_enabled("cpu"):
        return "another backend or dtype is asked for"
    return LIBRARY.why_not()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(q @ k.T * scale + mask) @ v, for what `why_not` says nothing about.

    Args:
        q: float32 [B, H, T, D].
        k: float32 [B, G, S, D]; each of its heads serves H / G of q (arXiv 2305.13245).
        v: float32 [B, G, S, D].
        mask: bool, True where a key is attended to, or float32 that is added; it broadcasts to
            [B, H, T, S].
        scale: of the scores; None: 1 / sqrt(D).
        causal: hides the keys behind a query; both begin at the same token.

    Returns:
        float32 [B, H, T, D], laid out as [B, T, H, D]; 0 for a query that sees no key.

    Where the processor multiplies bfloat16, queries, keys, weights and values are rounded to it,
    each by at most 2**-8 of itself. A score is off by at most 2**-7 * scale * sum(|q * k|), so
    that errors grow with scores; weights add up to 1, and the output for a single key is its value
    in bfloat16. For products in float32 set OCTAVO_NATIVE=0, or call within
    `octavo.kernels.use_backend("reference")`: both leave attention to torch.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    looked_into = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if looked_into and mask is not None:
        # Inductor would compute it anew for each layer; a tensor seen by its strides it writes once
        mask = mask.as_strided(mask.shape, mask.stride())
    call = _attend if is_plain_call(q, k, v, mask) else torch.ops.octavo.attention
    result: torch.Tensor = call(q, k, v, mask, factor, causal)
    return result


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    out = new_result(batch, queries, heads, size).transpose(1, 2)
    kept = added = None
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()  # keys lie side by side
        kept, added = (mask, None) if mask.dtype == torch.bool else (None, mask)
    strides = [s for x in (q, k, v, out, mask) if x is not None for s in x.stride()[:3]]
    steps = (ctypes.c_ssize_t * 15)(*strides)
    LIBRARY.octavo_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        pointer(kept),
        pointer(added),
        out.data_ptr(),
        ctypes.addressof(steps),
        batch,
        heads,
        queries,
        keys,
        size,
        heads // k.shape[1],
        scale,
        causal,
        threads_for(batch * heads * queries * keys * size // LANES),
    )
    return out


def _room(q: torch.Tensor) -> torch.Tensor:
    batch, heads, queries, size = q.shape
    return q.new_empty(batch, queries, heads, size).transpose(1, 2)


def _run(*given: Any) -> torch.Tensor:
    """The operator, which also runs where a program that was exported is loaded."""
    q, k, v, mask, scale, causal = given
    if not why_not(q, k, v, mask):
        return _attend(*given)
    shared = q.shape[1] != k.shape[1]
    y = functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return _room(q).copy_(y)


_operator = torch.library.custom_op(
    "octavo::attention",
    _run,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor",
)


@_operator.register_fake
def _fake(q: torch.Tensor, *_: object) -> torch.Tensor:
    return _room(q)

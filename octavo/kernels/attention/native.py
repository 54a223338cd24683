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

import torch

from octavo.kernels.native.library import (
    FLOAT,
    INT,
    POINTER,
    SIZE,
    Library,
    pointer,
    threads_for,
)
from octavo.kernels.native.memory import new_result

__all__ = ["LIBRARY", "attention", "reason"]

FEWEST_QUERIES = 6
"""Tiles are 12 queries high; with fewer than half of them torch is faster."""
MOST_SIZE = 256
LANES = 16
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_attention": [*[POINTER] * 7, *[SIZE] * 6, FLOAT, INT, INT]},
)


def reason(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,  # noqa: ARG001 - of the shape and dtype of k
    mask: torch.Tensor | None = None,
    *_: object,
) -> str:
    """Why the C cannot or should not take these, or nothing."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype != torch.float32:
        return "it computes in float32"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        return f"the mask is {mask.dtype}"
    if q.shape[3] > MOST_SIZE:
        return f"heads have more than {MOST_SIZE} features"
    # the operator asks for itself: a compiler should not make this a property of its program
    if not torch.compiler.is_compiling() and (not k.numel() or q.shape[2] < FEWEST_QUERIES):
        return f"there are no keys, or fewer than {FEWEST_QUERIES} queries"
    return LIBRARY.reason()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """See `schema.attention`."""
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

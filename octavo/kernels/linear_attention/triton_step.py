"""Kernels of a decoding step: the state once in and once out.

A program takes a head, or where there are too few of them to fill a GPU a block of its values. The
normaliser, which all blocks of a head read, is then updated by a kernel after them.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.linear_attention.triton_features import divide, key_features, query_features

__all__ = ["normalizer_kernel", "step_kernel"]


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, z_ptr, out_ptr, H, eps,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
    FEATURE_MAP: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Adds phi(k) v^T to kv [B, H, D, E]; then the result [B, H, E].

    SPLIT: of one block of E; else of a head, and phi(k) is added to z [B, H, D] too. All of it in
    float32 and without tensor cores: the state is what takes time.
    """
    blocks = tl.cdiv(E, BLOCK_E) if SPLIT else 1
    pid = tl.program_id(0)
    begin = pid % blocks * BLOCK_E
    place = (pid // blocks).to(tl.int64)
    batch, head = place // H, place % H
    # [1, BLOCK_D]
    ds = tl.arange(0, BLOCK_D)[None, :]
    there = ds < D
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + ds, mask=there, other=0.0)
    k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + ds, mask=there, other=0.0)
    queries = query_features(q, there, FEATURE_MAP)
    keys = key_features(k, there, FEATURE_MAP)
    z = tl.load(z_ptr + place * D + ds, mask=there, other=0.0) + keys
    if not SPLIT:
        tl.store(z_ptr + place * D + ds, z, mask=there)
    normalizer = tl.sum(queries * z)
    queries, keys = tl.trans(queries), tl.trans(keys)
    v_row = v_ptr + batch * stride_vb + head * stride_vh
    in_column = kv_ptr + place * D * E + tl.trans(ds) * E
    for first in range(begin, begin + BLOCK_E if SPLIT else E, BLOCK_E):
        es = first + tl.arange(0, BLOCK_E)[None, :]
        inside = tl.trans(there) & (es < E)
        # [BLOCK_D, BLOCK_E]
        v = tl.load(v_row + es, mask=es < E, other=0.0).to(tl.float32)
        kv = tl.load(in_column + es, mask=inside, other=0.0) + keys * v
        tl.store(in_column + es, kv, mask=inside)
        sums = tl.sum(queries * kv, axis=0)[None, :]
        out = divide(sums, normalizer, eps).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place * E + es, out, mask=es < E)


@triton.jit
def normalizer_kernel(
    k_ptr, z_ptr, H, stride_kb, stride_kh,
    FEATURE_MAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds phi(k) of a head to z [B, H, D]."""
    place = tl.program_id(0).to(tl.int64)
    ds = tl.arange(0, BLOCK_D)
    there = ds < D
    k_row = k_ptr + place // H * stride_kb + place % H * stride_kh
    k = tl.load(k_row + ds, mask=there, other=0.0)
    z = tl.load(z_ptr + place * D + ds, mask=there, other=0.0)
    tl.store(z_ptr + place * D + ds, z + key_features(k, there, FEATURE_MAP), mask=there)

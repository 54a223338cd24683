"""Causal results from pairs of tokens within a chunk, for heads whose state registers do not hold.

A program takes a block of queries and goes through the keys up to its own in the chunk; what came
before the chunk is its state, which is read and not carried on. Queries, keys and state are taken a
slice of D at a time, so that D does not show in registers.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.linear_attention.triton_features import (
    divide,
    features_below,
    key_features,
    operand,
    product,
    query_peak,
)
from octavo.kernels.linear_attention.triton_tokens import chunk_of, columns, kept, offsets

__all__ = ["pairs_kernel"]


@triton.jit(do_not_specialize=["T", "chunk", "sequences"])
def pairs_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, kv_ptr, z_ptr, out_ptr,
    T, H, chunk, sequences, eps,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_kv, stride_z,
    FEATURE_MAP: tl.constexpr, KIND: tl.constexpr, INITIAL: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Result [B, T, H, E] of a block of rows of a chunk, a head and a block of E.

    INITIAL: kv and z, times the strides, hold the state before each slot.
    """
    blocks, parts = tl.cdiv(E, BLOCK_E), tl.cdiv(chunk, BLOCK_T)
    pid = tl.program_id(0)
    block, part, place = pid % blocks, pid // blocks % parts, pid // (blocks * parts)
    head, slot = place % H, place // H
    _, batch, at, count, begin, end = chunk_of(slot, cu_ptr, T, chunk, sequences, PACKED)
    own = begin + part * BLOCK_T
    if (at < count) & (own < end):
        wide_head = head.to(tl.int64)
        inner, some = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        es = block * BLOCK_E + tl.arange(0, BLOCK_E)
        of_e = columns(es, E, BLOCK_E)
        wide = tl.cast(own, tl.int64)
        inside = own + inner < end
        q_rows = q_ptr + batch * stride_qb + wide_head * stride_qh + wide * stride_qt
        in_q, in_k = offsets(inner, stride_qt, some), offsets(inner, stride_kt, some)
        in_v = offsets(inner, stride_vt, es)
        # of a slice no more than a query's largest feature is kept
        peak = tl.full((BLOCK_T, 1), float("-inf"), dtype=tl.float32)
        for first in range(0, D, BLOCK_K):
            of_d = columns(first + some, D, BLOCK_K)
            q = tl.load(q_rows + first + in_q, mask=inside[:, None] & of_d, other=0.0)
            peak = tl.maximum(peak, query_peak(q, of_d, FEATURE_MAP))
        normalizer = tl.zeros((BLOCK_T,), dtype=tl.float32)
        sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
        if INITIAL:
            kv_head = kv_ptr + place.to(tl.int64) * stride_kv + es[None, :]
            z_head = z_ptr + place.to(tl.int64) * stride_z
            for first in range(0, D, BLOCK_K):
                ds = first + some
                of_d = columns(ds, D, BLOCK_K)
                q = tl.load(q_rows + first + in_q, mask=inside[:, None] & of_d, other=0.0)
                queries = operand(features_below(q, of_d, peak, FEATURE_MAP), KIND)
                # [BLOCK_K, BLOCK_E] and [BLOCK_K]
                kv = tl.load(kv_head + ds[:, None] * E, mask=(ds < D)[:, None] & of_e, other=0.0)
                z = tl.load(z_head + ds, mask=ds < D, other=0.0)
                sums = product(queries, operand(kv, KIND), sums, KIND)
                normalizer += tl.sum(queries.to(tl.float32) * z[None, :], axis=1)
        for row in range(begin, own + 1, BLOCK_T):
            wide_row = tl.cast(row, tl.int64)
            there = kept(mask_ptr + batch * T + wide_row, inner, row + inner < end, MASKED)
            k_rows = k_ptr + batch * stride_kb + wide_head * stride_kh + wide_row * stride_kt
            v_rows = v_ptr + batch * stride_vb + wide_head * stride_vh + wide_row * stride_vt
            weights = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
            for first in range(0, D, BLOCK_K):
                of_d = columns(first + some, D, BLOCK_K)
                q = tl.load(q_rows + first + in_q, mask=inside[:, None] & of_d, other=0.0)
                k = tl.load(k_rows + first + in_k, mask=there & of_d, other=0.0)
                queries = operand(features_below(q, of_d, peak, FEATURE_MAP), KIND)
                keys = operand(key_features(k, there & of_d, FEATURE_MAP), KIND)
                weights = product(queries, tl.trans(keys), weights, KIND)
            weights = tl.where((own + inner)[:, None] >= (row + inner)[None, :], weights, 0.0)
            normalizer += tl.sum(weights, axis=1)
            v = tl.load(v_rows + in_v, mask=there & of_e, other=0.0)
            weights = operand(weights, KIND)
            sums = product(weights, v.to(weights.dtype), sums, KIND)
        out = divide(sums, normalizer[:, None], eps).to(out_ptr.dtype.element_ty)
        out_rows = out_ptr + ((batch * T + wide) * H + wide_head) * E
        tl.store(out_rows + offsets(inner, H * E, es), out, mask=inside[:, None] & of_e)

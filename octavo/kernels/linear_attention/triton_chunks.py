"""Kernels over chunks of tokens: their states, the sums of states, and the results."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.linear_attention.triton_features import (
    divide,
    key_features,
    operand,
    product,
    query_features,
)
from octavo.kernels.linear_attention.triton_tokens import (
    chunk_of,
    columns,
    kept,
    offsets,
    sequence,
)

__all__ = ["outputs_kernel", "scan_kernel", "states_kernel"]


@triton.jit(do_not_specialize=["T", "chunk", "sequences"])
def states_kernel(
    k_ptr, v_ptr, mask_ptr, cu_ptr, kv_ptr, z_ptr,
    T, H, chunk, sequences,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_kv, stride_z,
    FEATURE_MAP: tl.constexpr, KIND: tl.constexpr, FINAL: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of a chunk, a head and a block of E: kv = sum phi(k)^T v and z = sum phi(k), float32.

    They go to slot * H + head, times the strides. The last chunk of a sequence, which nothing
    follows, is left out unless FINAL asks for the sum of all.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    pid = tl.program_id(0)
    block, place = pid % blocks, pid // blocks
    head, slot = place % H, place // H
    _, batch, at, count, begin, end = chunk_of(slot, cu_ptr, T, chunk, sequences, PACKED)
    if at < (count if FINAL else count - 1):
        inner, ds = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
        es = block * BLOCK_E + tl.arange(0, BLOCK_E)
        of_d, of_e = columns(ds, D, BLOCK_D), columns(es, E, BLOCK_E)
        k_head = k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh
        v_head = v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh
        in_k, in_v = offsets(inner, stride_kt, ds), offsets(inner, stride_vt, es)
        kv = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
        z = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for row in range(begin, end, BLOCK_T):
            wide = tl.cast(row, tl.int64)
            there = kept(mask_ptr + batch * T + wide, inner, row + inner < end, MASKED)
            # [BLOCK_T, BLOCK_D] and [BLOCK_T, BLOCK_E]
            k = tl.load(k_head + wide * stride_kt + in_k, mask=there & of_d, other=0.0)
            v = tl.load(v_head + wide * stride_vt + in_v, mask=there & of_e, other=0.0)
            features = operand(key_features(k, there & of_d, FEATURE_MAP), KIND)
            kv = product(tl.trans(features), v.to(features.dtype), kv, KIND)
            z += tl.sum(features.to(tl.float32), axis=0)
        kv_tile = kv_ptr + place.to(tl.int64) * stride_kv + ds[:, None] * E + es[None, :]
        tl.store(kv_tile, kv, mask=(ds < D)[:, None] & (es < E)[None, :])
        tl.store(z_ptr + place.to(tl.int64) * stride_z + ds, z, mask=(ds < D) & (block == 0))


@triton.jit(do_not_specialize=["T", "chunk"])
def scan_kernel(
    states_ptr, kv_ptr, z_ptr, kv_out_ptr, z_out_ptr, cu_ptr, T, H, chunk,
    D: tl.constexpr, E: tl.constexpr, INITIAL: tl.constexpr, CAUSAL: tl.constexpr,
    FINAL: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the states [slots, H, D * E + D] of a sequence and a head, in order, and the initial.

    CAUSAL: each slot gets what came before it. FINAL: the sum of all goes to the two outputs.
    """
    size = D * E + D
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    place = pid // blocks
    head, number = place % H, place // H
    cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    of_kv = cols < D * E
    of_z = inside & (cols >= D * E)
    kv_at = place.to(tl.int64) * D * E + cols
    z_at = place.to(tl.int64) * D + cols - D * E
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    if INITIAL:
        sums += tl.load(kv_ptr + kv_at, mask=of_kv, other=0.0)
        sums += tl.load(z_ptr + z_at, mask=of_z, other=0.0)
    _, _, first, count = sequence(number, cu_ptr, T, chunk, PACKED)
    known = count if FINAL else count - 1
    for at in range(count):
        there = states_ptr + ((first + at).to(tl.int64) * H + head) * size + cols
        own = tl.load(there, mask=inside & (at < known), other=0.0)
        if CAUSAL:
            tl.store(there, sums, mask=inside)
        sums += own
    if FINAL:
        tl.store(kv_out_ptr + kv_at, sums, mask=of_kv)
        tl.store(z_out_ptr + z_at, sums, mask=of_z)


@triton.jit(do_not_specialize=["T", "chunk", "sequences"])
def outputs_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, kv_ptr, z_ptr, kv_out_ptr, z_out_ptr, out_ptr,
    T, H, chunk, sequences, eps,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_kv, stride_z,
    FEATURE_MAP: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, INITIAL: tl.constexpr,
    FINAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Result [B, T, H, E] of a chunk, a head and a block of E.

    The state comes from kv and z, with CAUSAL those before the slot, else those of the sequence,
    times the strides; INITIAL: there is one. CAUSAL: the chunk is taken block by block, each on
    the state that those before it have left; FINAL: the last one's goes to the two outputs.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    pid = tl.program_id(0)
    block, place = pid % blocks, pid // blocks
    head, slot = place % H, place // H
    number, batch, at, count, begin, end = chunk_of(slot, cu_ptr, T, chunk, sequences, PACKED)
    if at < count:
        wide_head = head.to(tl.int64)
        inner, ds = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
        es = block * BLOCK_E + tl.arange(0, BLOCK_E)
        of_d, of_e = columns(ds, D, BLOCK_D), columns(es, E, BLOCK_E)
        q_head = q_ptr + batch * stride_qb + wide_head * stride_qh
        k_head = k_ptr + batch * stride_kb + wide_head * stride_kh
        v_head = v_ptr + batch * stride_vb + wide_head * stride_vh
        out_head = out_ptr + (batch * T * H + wide_head) * E
        in_q, in_k = offsets(inner, stride_qt, ds), offsets(inner, stride_kt, ds)
        in_v, in_out = offsets(inner, stride_vt, es), offsets(inner, H * E, es)
        in_kv, of_state = ds[:, None] * E + es[None, :], (ds < D)[:, None] & of_e
        if INITIAL:
            from_place = place.to(tl.int64) if CAUSAL else number.to(tl.int64) * H + head
            kv = tl.load(kv_ptr + from_place * stride_kv + in_kv, mask=of_state, other=0.0)
            z = tl.load(z_ptr + from_place * stride_z + ds, mask=ds < D, other=0.0)
        else:
            kv = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
            z = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for row in range(begin, end, BLOCK_T):
            wide = tl.cast(row, tl.int64)
            inside = row + inner < end
            q = tl.load(q_head + wide * stride_qt + in_q, mask=inside[:, None] & of_d, other=0.0)
            queries = operand(query_features(q, of_d, FEATURE_MAP), KIND)
            normalizer = tl.sum(queries.to(tl.float32) * z[None, :], axis=1)
            sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
            sums = product(queries, operand(kv, KIND), sums, KIND)
            if CAUSAL:
                there = kept(mask_ptr + batch * T + wide, inner, inside, MASKED)
                k = tl.load(k_head + wide * stride_kt + in_k, mask=there & of_d, other=0.0)
                v = tl.load(v_head + wide * stride_vt + in_v, mask=there & of_e, other=0.0)
                keys = operand(key_features(k, there & of_d, FEATURE_MAP), KIND)
                v = v.to(keys.dtype)
                weights = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
                weights = product(queries, tl.trans(keys), weights, KIND)
                weights = tl.where(inner[:, None] >= inner[None, :], weights, 0.0)
                normalizer += tl.sum(weights, axis=1)
                sums = product(operand(weights, KIND), v, sums, KIND)
                kv = product(tl.trans(keys), v, kv, KIND)
                z += tl.sum(keys.to(tl.float32), axis=0)
            out = divide(sums, normalizer[:, None], eps).to(out_ptr.dtype.element_ty)
            tl.store(out_head + wide * H * E + in_out, out, mask=inside[:, None] & of_e)
        if CAUSAL and FINAL:
            last = at == count - 1
            to_place = number.to(tl.int64) * H + head
            tl.store(kv_out_ptr + to_place * D * E + in_kv, kv, mask=of_state & last)
            tl.store(z_out_ptr + to_place * D + ds, z, mask=(ds < D) & (block == 0) & last)

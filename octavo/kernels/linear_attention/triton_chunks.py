"""Kernels over chunks of tokens: their states, the sums of states, and the results.

A slot is a chunk of a sequence. Sequences of a batch have as many chunks each; those packed by
cu_seqlens find theirs on the device, sequence n from slot cu_seqlens[n] // chunk + n on, which
leaves room for every length.
"""

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

__all__ = ["outputs_kernel", "scan_kernel", "states_kernel"]


@triton.jit
def _sequence(number, cu_ptr, T, chunk, PACKED: tl.constexpr):
    """First row, row after the last, first slot and count of chunks (at least 1) of a sequence."""
    if PACKED:
        start = tl.load(cu_ptr + number)
        stop = tl.load(cu_ptr + number + 1)
    else:
        start = 0
        stop = T
    count = tl.maximum(tl.cdiv(stop - start, chunk), 1)
    if PACKED:
        slot = start // chunk + number
    else:
        slot = number * count
    return start, stop, slot, count


@triton.jit
def _of_slot(slot, cu_ptr, T, chunk, sequences, PACKED: tl.constexpr):
    """The sequence of a slot."""
    if PACKED:
        low = slot * 0
        high = low + sequences
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) // chunk + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    else:
        low = slot // tl.maximum(tl.cdiv(T, chunk), 1)
    return low


@triton.jit
def _kept(mask_ptr, rows, inside, MASKED: tl.constexpr):
    """Which of some rows have a key that counts, [rows, 1]."""
    if MASKED:
        inside = inside & (tl.load(mask_ptr + rows, mask=inside, other=0) != 0)
    return inside[:, None]


@triton.jit
def _columns(cols, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns of a block there are, [1, cols] or, where all are, [1, 1]."""
    if SIZE % BLOCK == 0:
        there = tl.full((1, 1), 1, dtype=tl.int1)
    else:
        there = (cols < SIZE)[None, :]
    return there


@triton.jit
def _offsets(rows, stride, cols):
    """Offsets in a tile, 32 bits each: the launcher sees to it that they are enough."""
    return rows[:, None] * stride + cols[None, :]


@triton.jit(do_not_specialize=["T", "chunk", "sequences"])
def states_kernel(
    k_ptr, v_ptr, mask_ptr, cu_ptr, kv_ptr, z_ptr,
    T, H, chunk, sequences,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_kv, stride_z,
    FEATURE_MAP: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PACKED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of a chunk, a head and a block of E: kv = sum phi(k)^T v and z = sum phi(k), float32.

    They go to slot * H + head, times the strides. CAUSAL: the last chunk of a sequence, which
    nothing follows, is left out.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    pid = tl.program_id(0)
    block, place = pid % blocks, pid // blocks
    head, slot = place % H, place // H
    number = _of_slot(slot, cu_ptr, T, chunk, sequences, PACKED)
    start, stop, first, count = _sequence(number, cu_ptr, T, chunk, PACKED)
    at = slot - first
    if at < (count - 1 if CAUSAL else count):
        batch = (0 * number if PACKED else number).to(tl.int64)
        inner, ds = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
        es = block * BLOCK_E + tl.arange(0, BLOCK_E)
        of_d, of_e = _columns(ds, D, BLOCK_D), _columns(es, E, BLOCK_E)
        k_head = k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh
        v_head = v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh
        in_k, in_v = _offsets(inner, stride_kt, ds), _offsets(inner, stride_vt, es)
        kv = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
        z = tl.zeros((BLOCK_D,), dtype=tl.float32)
        begin = start + at * chunk
        end = tl.minimum(begin + chunk, stop)
        for row in range(begin, end, BLOCK_T):
            wide = tl.cast(row, tl.int64)
            kept = _kept(mask_ptr + batch * T + wide, inner, row + inner < end, MASKED)
            # [BLOCK_T, BLOCK_D] and [BLOCK_T, BLOCK_E]
            k = tl.load(k_head + wide * stride_kt + in_k, mask=kept & of_d, other=0.0)
            v = tl.load(v_head + wide * stride_vt + in_v, mask=kept & of_e, other=0.0)
            features = operand(key_features(k, kept & of_d, FEATURE_MAP), KIND)
            kv = product(tl.trans(features), v.to(features.dtype), kv, KIND)
            z += tl.sum(features.to(tl.float32), axis=0)
        kv_tile = kv_ptr + place.to(tl.int64) * stride_kv + ds[:, None] * E + es[None, :]
        tl.store(kv_tile, kv, mask=(ds < D)[:, None] & (es < E)[None, :])
        tl.store(z_ptr + place.to(tl.int64) * stride_z + ds, z, mask=(ds < D) & (block == 0))


@triton.jit(do_not_specialize=["T", "chunk"])
def scan_kernel(
    states_ptr, kv_ptr, z_ptr, kv_out_ptr, z_out_ptr, cu_ptr, T, H, chunk,
    D: tl.constexpr, E: tl.constexpr, INITIAL: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the states [slots, H, D * E + D] of a sequence and a head, in order, and the initial.

    CAUSAL: each slot gets what came before it. Else the sum goes to the two outputs.
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
    _, _, first, count = _sequence(number, cu_ptr, T, chunk, PACKED)
    for at in range(count):
        there = states_ptr + ((first + at).to(tl.int64) * H + head) * size + cols
        if CAUSAL:
            own = tl.load(there, mask=inside & (at < count - 1), other=0.0)
            tl.store(there, sums, mask=inside)
        else:
            own = tl.load(there, mask=inside, other=0.0)
        sums += own
    if not CAUSAL:
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
    number = _of_slot(slot, cu_ptr, T, chunk, sequences, PACKED)
    start, stop, first, count = _sequence(number, cu_ptr, T, chunk, PACKED)
    at = slot - first
    if at < count:
        wide_head = head.to(tl.int64)
        batch = (0 * number if PACKED else number).to(tl.int64)
        inner, ds = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
        es = block * BLOCK_E + tl.arange(0, BLOCK_E)
        of_d, of_e = _columns(ds, D, BLOCK_D), _columns(es, E, BLOCK_E)
        q_head = q_ptr + batch * stride_qb + wide_head * stride_qh
        k_head = k_ptr + batch * stride_kb + wide_head * stride_kh
        v_head = v_ptr + batch * stride_vb + wide_head * stride_vh
        out_head = out_ptr + (batch * T * H + wide_head) * E
        in_q, in_k = _offsets(inner, stride_qt, ds), _offsets(inner, stride_kt, ds)
        in_v, in_out = _offsets(inner, stride_vt, es), _offsets(inner, H * E, es)
        in_kv, of_state = ds[:, None] * E + es[None, :], (ds < D)[:, None] & of_e
        if INITIAL:
            from_place = place.to(tl.int64) if CAUSAL else number.to(tl.int64) * H + head
            kv = tl.load(kv_ptr + from_place * stride_kv + in_kv, mask=of_state, other=0.0)
            z = tl.load(z_ptr + from_place * stride_z + ds, mask=ds < D, other=0.0)
        else:
            kv = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
            z = tl.zeros((BLOCK_D,), dtype=tl.float32)
        begin = start + at * chunk
        end = tl.minimum(begin + chunk, stop)
        for row in range(begin, end, BLOCK_T):
            wide = tl.cast(row, tl.int64)
            inside = row + inner < end
            q = tl.load(q_head + wide * stride_qt + in_q, mask=inside[:, None] & of_d, other=0.0)
            queries = operand(query_features(q, of_d, FEATURE_MAP), KIND)
            normalizer = tl.sum(queries.to(tl.float32) * z[None, :], axis=1)
            sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
            sums = product(queries, operand(kv, KIND), sums, KIND)
            if CAUSAL:
                kept = _kept(mask_ptr + batch * T + wide, inner, inside, MASKED)
                k = tl.load(k_head + wide * stride_kt + in_k, mask=kept & of_d, other=0.0)
                v = tl.load(v_head + wide * stride_vt + in_v, mask=kept & of_e, other=0.0)
                keys = operand(key_features(k, kept & of_d, FEATURE_MAP), KIND)
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

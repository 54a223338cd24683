"""Several rows of activations: tensor cores, with codes turned into floats in registers."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.weight_only_gemm.triton_codes import code_of_byte, dot, finish

__all__ = ["gather_kernel", "gemm_kernel"]


@triton.jit
def _code_at(w_row, ks, left, stride_wk, BITS: tl.constexpr, FLIP: tl.constexpr):
    """Codes of any width, read one by one: int32, unsigned."""
    bit = ks * BITS
    byte = (bit // 8).to(tl.int64)
    word = tl.load(w_row + byte * stride_wk, mask=ks < left, other=0).to(tl.int32)
    if 8 % BITS:
        # the code may end in the next byte, which is there if it does
        shared = (ks < left) & (bit % 8 + BITS > 8)
        word |= tl.load(w_row + (byte + 1) * stride_wk, mask=shared, other=0).to(tl.int32) << 8
    return ((word >> (bit % 8)) & ((1 << BITS) - 1)) ^ FLIP


@triton.jit
def _split(pairs, kind: tl.constexpr):
    """The first and the second float of each pair that an integer holds."""
    if kind == tl.float32:
        first, second = pairs.to(tl.int32), (pairs >> 32).to(tl.int32)
    else:
        first, second = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    return first.to(kind, bitcast=True), second.to(kind, bitcast=True)


@triton.jit
def _group(
    scale_ptr, zero_ptr, rows, k, GROUPS,
    GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Scale float32 and zero point int32 of the group that k lies in, [rows, 1].

    The scale of a channel without groups is applied at the end, and is 1 here. Beyond the last
    group it is the last one's.
    """
    place = rows * GROUPS
    if GROUP:
        place += tl.minimum(k // GROUP, GROUPS - 1)
        scale = tl.load(scale_ptr + place).to(tl.float32)[:, None]
    else:
        scale = tl.full((1, 1), 1.0, tl.float32)
    if ASYMMETRIC:
        zero = tl.load(zero_ptr + place).to(tl.int32)[:, None]
    else:
        zero = tl.full((1, 1), FLIP, tl.int32)
    return scale, zero


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr,
    M, N, K, GROUPS, stride_xm, stride_xk, stride_wn, stride_wk,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, KIND: tl.constexpr,
    FAST: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile of the output; with SPLIT_K > 1, of partial sums float32 [SPLIT_K, M, N].

    The product is computed transposed, [N, K] x [K, M], so that the codes are the operand that
    tensor cores take from registers. A block of K lies in one group, whose scale is applied to
    the block's sum.

    x is [M, K] of the type KIND; for FAST 4-bit codes it comes as pairs, integers [M, K / 2]. w is
    the bytes of the codes, read in vectors if FAST (8 and 4 bits only), else code by code. GROUP
    is the codes in a group, a multiple of BLOCK_K, or 0 where the channel has one scale.
    """
    pack: tl.constexpr = 2 if FAST and BITS == 4 else 1
    step: tl.constexpr = BLOCK_K // pack
    flip: tl.constexpr = 0 if ASYMMETRIC else 1 << (BITS - 1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # a column of GROUP_M tiles shares its weights in the L2 cache
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    rows = (group * GROUP_M + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    ks = part * step + tl.arange(0, step)
    # rows and columns beyond the end read the first ones; their results are not stored
    x_rows = tl.where(rows < M, rows, 0).to(tl.int64)
    w_rows = tl.where(cols < N, cols, 0).to(tl.int64)
    x_tile = x_ptr + x_rows[:, None] * stride_xm + ks[None, :].to(tl.int64) * stride_xk
    w_row = w_ptr + w_rows[:, None] * stride_wn
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # few rows wait for memory: the next block's scales are fetched while this one is computed;
    # many rows need the registers
    ahead: tl.constexpr = BLOCK_M <= 64
    at = part * BLOCK_K
    scale, zero = _group(scale_ptr, zero_ptr, w_rows, at, GROUPS, GROUP, ASYMMETRIC, flip)
    for start in range(0, K // pack, step * SPLIT_K):
        left = K // pack - start
        at = start * pack + part * BLOCK_K + (BLOCK_K * SPLIT_K if ahead else 0)
        fetched_scale, fetched_zero = _group(
            scale_ptr, zero_ptr, w_rows, at, GROUPS, GROUP, ASYMMETRIC, flip
        )
        if not ahead:
            scale, zero = fetched_scale, fetched_zero
        if EVEN_K:
            x = tl.load(x_tile)
        else:
            x = tl.load(x_tile, mask=ks[None, :] < left, other=0)
        total = tl.zeros_like(acc) if GROUP else acc
        if FAST:
            if EVEN_K:
                w = tl.load(w_row + (start + ks)[None, :])
            else:
                w = tl.load(w_row + (start + ks)[None, :], mask=ks[None, :] < left, other=0)
            if pack == 2:
                first, second = _split(x, KIND)
                low = code_of_byte(w, False, BITS, flip, zero, KIND)
                high = code_of_byte(w, True, BITS, flip, zero, KIND)
                total = dot(low, first.T, total)
                total = dot(high, second.T, total)
            else:
                codes = code_of_byte(w, False, BITS, flip, zero, KIND)
                total = dot(codes, x.T, total)
        else:
            w = _code_at(w_row, (start + ks)[None, :], K, stride_wk, BITS, flip)
            total = dot((w - zero).to(tl.float32).to(KIND), x.T, total)
        if GROUP:
            acc += total * scale
        else:
            acc = total
        scale, zero = fetched_scale, fetched_zero
        x_tile += step * SPLIT_K * stride_xk
    y = acc.T
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        there = (part * M + rows.to(tl.int64)[:, None]) * N + cols[None, :]
        tl.store(out_ptr + there, y, mask=inside)
    else:
        there = rows.to(tl.int64)[:, None] * N + cols[None, :]
        finish(
            y, there, cols[None, :], inside, N,
            out_ptr, scale_ptr, bias_ptr, residual_ptr, GROUP == 0, BIAS, RESIDUAL, ACTIVATION,
        )  # fmt: skip


@triton.jit
def gather_kernel(
    partial_ptr, out_ptr, scale_ptr, bias_ptr, residual_ptr, M, N,
    CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums in the order of K, and finishes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    there = rows.to(tl.int64)[:, None] * N + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(SPLIT_K):
        at = (part * M + rows.to(tl.int64)[:, None]) * N + cols[None, :]
        acc += tl.load(partial_ptr + at, mask=inside, other=0.0)
    finish(
        acc, there, cols[None, :], inside, N,
        out_ptr, scale_ptr, bias_ptr, residual_ptr, CHANNEL, BIAS, RESIDUAL, ACTIVATION,
    )  # fmt: skip

"""A program a tile, or K split among several whose exact int32 sums the last one adds up."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import add_to_sums, finish_pieces, tile_of

__all__ = ["tiles_kernel"]


@triton.jit
def _product(x, w, acc, SWAP: tl.constexpr):
    """Adds x [BLOCK_M, BLOCK_K] times w [BLOCK_N, BLOCK_K]; SWAP keeps the sums transposed."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["M", "residual_zero_point", "out_zero_point"])
def tiles_kernel(
    x_ptr, w_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr,
    residual_scale_ptr, out_scale_ptr, residual_zero_point, out_zero_point,
    partial_ptr, arrived_ptr, M, N, K, stride_xm, stride_wn,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    FEW: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A tile of the output.

    SPLIT_K > 1: program (tile, part) sums the steps part, part + SPLIT_K, ... of K and stores the
    sums, int32 [tiles, SPLIT_K, BLOCK_M, BLOCK_N]. The program that arrives last at the tile's
    counter, int32 [tiles], adds all parts up, which is exact in any order, and sets the counter
    back to zero.

    SWAP: weights are the left operand, whose side of the instruction holds 64 or 16 rows, and
    tokens the right one, whose side holds as few as 8. FEW: fewer rows than BLOCK_M; the missing
    ones are not read, where else they read the first row.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    tile_m, tile_n = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = part * BLOCK_K + tl.arange(0, BLOCK_K)
    # rows and columns beyond the end read the first ones; their results are not stored
    x_rows = tl.where(rows < M, rows, 0).to(tl.int64)
    w_rows = tl.where(cols < N, cols, 0).to(tl.int64)
    x_tile = x_ptr + x_rows[:, None] * stride_xm + ks[None, :]
    w_tile = w_ptr + w_rows[:, None] * stride_wn + ks[None, :]
    present = (rows < M)[:, None]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(part, tl.cdiv(K, BLOCK_K), SPLIT_K):
        if EVEN_K:
            w = tl.load(w_tile)
            if FEW:
                x = tl.load(x_tile, mask=present, other=0)
            else:
                x = tl.load(x_tile)
        else:
            left = (ks < K - (step - part) * BLOCK_K)[None, :]
            w = tl.load(w_tile, mask=left, other=0)
            x = tl.load(x_tile, mask=left & present if FEW else left, other=0)
        acc = _product(x, w, acc, SWAP)
        x_tile += BLOCK_K * SPLIT_K
        w_tile += BLOCK_K * SPLIT_K
    if SWAP:
        acc = tl.trans(acc)
    if SPLIT_K == 1:
        acc = add_to_sums(acc, cols, N, bias_ptr, BIAS)
        finish_pieces(
            acc, rows, tile_n * BLOCK_N, M, N, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
            out_scale_ptr, residual_zero_point, out_zero_point,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION, BLOCK_M, BLOCK_N, PIECES,
        )  # fmt: skip
    else:
        inside = present & (cols < N)[None, :]
        in_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        sums = partial_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + in_tile
        tl.store(sums + part * (BLOCK_M * BLOCK_N), acc, mask=inside)
        # all threads have stored before one of them says so, to programs on other processors too
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            tl.store(arrived_ptr + tile, 0)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
            for other in range(SPLIT_K):
                acc += tl.load(sums + other * (BLOCK_M * BLOCK_N), mask=inside, other=0)
            acc = add_to_sums(acc, cols, N, bias_ptr, BIAS)
            finish_pieces(
                acc, rows, tile_n * BLOCK_N, M, N, N,
                out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
                out_scale_ptr, residual_zero_point, out_zero_point,
                TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
                BLOCK_M, BLOCK_N, PIECES,
            )  # fmt: skip

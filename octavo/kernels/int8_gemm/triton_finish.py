"""What a Triton kernel does with a tile of accumulators: scales, bias, activation, residual."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton_epilogue import activate
from octavo.kernels.triton_rounding import to_int8

__all__ = ["add_to_sums", "finish", "finish_pieces"]


@triton.jit
def add_to_sums(acc, cols, end, bias_ptr, BIAS: tl.constexpr):
    """Sums [rows, cols] with a bias of int32, where there is one; `finish` adds one of floats.

    To a whole tile, before `finish` takes it by pieces: within them it made ptxas spill registers.
    """
    if BIAS:
        if bias_ptr.dtype.element_ty == tl.int32:
            acc += tl.load(bias_ptr + cols, mask=cols < end, other=0)[None, :]
    return acc


@triton.jit
def finish(
    acc, rows, cols, M, end, N,
    out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr, out_scale_ptr,
    residual_zero_point, out_zero_point,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Epilogue of accumulators [rows, cols], and its store; see `reference.Epilogue`.

    Int32 accumulators have scales, float32 ones have none. A bias of int32 has been added already.

    Rows from M on and columns from `end` on are not stored; N is the length of a row.
    """
    inside = (rows < M)[:, None] & (cols < end)[None, :]
    there = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if RAW:
        tl.store(out_ptr + there, acc, mask=inside)
    else:
        y = acc.to(tl.float32)
        if acc.dtype == tl.int32:
            if TOKEN:
                scale_x = tl.load(scale_x_ptr + rows, mask=rows < M, other=0.0)
            else:
                scale_x = tl.load(scale_x_ptr + tl.zeros_like(rows))
            if CHANNEL:
                scale_w = tl.load(scale_w_ptr + cols, mask=cols < end, other=0.0)
            else:
                scale_w = tl.load(scale_w_ptr + tl.zeros_like(cols))
            y = y * scale_x[:, None] * scale_w[None, :]
        if BIAS:
            if bias_ptr.dtype.element_ty != tl.int32:
                y += tl.load(bias_ptr + cols, mask=cols < end, other=0).to(tl.float32)[None, :]
        y = activate(y, ACTIVATION)
        if RESIDUAL:
            other = tl.load(residual_ptr + there, mask=inside, other=0).to(tl.float32)
            if residual_ptr.dtype.element_ty == tl.int8:
                other = (other - residual_zero_point) * tl.load(residual_scale_ptr)
            y += other
        if REQUANTIZE:
            y = to_int8(y, tl.load(out_scale_ptr), out_zero_point)
        tl.store(out_ptr + there, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_pieces(
    acc, rows, first_col, M, end, N,
    out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr, out_scale_ptr,
    residual_zero_point, out_zero_point,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The epilogue of a wide tile by halves or quarters, which need fewer registers at a time."""
    if PIECES == 1:
        finish(
            acc, rows, first_col + tl.arange(0, BLOCK_N), M, end, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
            out_scale_ptr, residual_zero_point, out_zero_point,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
        )  # fmt: skip
    else:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        finish_pieces(
            left, rows, first_col, M, end, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
            out_scale_ptr, residual_zero_point, out_zero_point,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
            BLOCK_M, BLOCK_N // 2, PIECES // 2,
        )  # fmt: skip
        finish_pieces(
            right, rows, first_col + BLOCK_N // 2, M, end, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
            out_scale_ptr, residual_zero_point, out_zero_point,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
            BLOCK_M, BLOCK_N // 2, PIECES // 2,
        )  # fmt: skip

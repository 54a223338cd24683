"""What Triton kernels share: activations, rounding to int8, the epilogue, the order of tiles.

Activations are as `torch` computes them, and NaN passes each of them; quantized values have the
bits of `codes`.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "activate",
    "add_to_sums",
    "codes_of",
    "finish",
    "finish_pieces",
    "magnitude",
    "scale_of",
    "tile_of",
    "to_int8",
]

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation of float32 y: none, relu, relu6, gelu, gelu-tanh, silu, hardswish."""
    if ACTIVATION == "relu":
        # without being asked to keep NaN, a GPU's maximum gives the other operand
        y = tl.maximum(y, 0.0, propagate_nan=ALL)
    elif ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(y, 0.0, propagate_nan=ALL), 6.0, propagate_nan=ALL)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "hardswish":
        # NaN needs no care in the bounds: it is also the other factor
        y = y * tl.minimum(tl.maximum(y + 3.0, 0.0), 6.0) * 0.16666666666666666
    return y


@triton.jit
def to_int8(x, scale, zero_point=0):
    """saturate(round_half_even(x / scale) + zero_point); NaN gives the smallest code.

    zero_point: int32 scalar, from -128 to 127.
    """
    # saturation comes first, where the zero point is on the other side
    low, high = -128.0 - zero_point, 127.0 - zero_point
    ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    # NaN first: comparisons with it are false, and what the conversion makes of it is not defined
    ratio = tl.where(ratio == ratio, ratio, low)
    ratio = tl.minimum(tl.maximum(ratio, low), high)
    # adding 1.5 * 2**23 leaves no bits behind the point: the sum is rounded half to even, and the
    # code is the lowest byte of its bits
    return ((ratio + 12582912.0).to(tl.int32, bitcast=True) + zero_point).to(tl.int8)


@triton.jit
def magnitude(x):
    """|x| as an integer: bits order as floats do, and NaN, which a GPU's maximum drops, is top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(top):
    """Scale whose largest code is `top`, the greatest magnitude of each row."""
    peak = top.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak == 0.0, 1.0, peak), tl.zeros_like(peak) + 127.0)


@triton.jit
def codes_of(y, scale, FMA: tl.constexpr):
    """int8 codes, those of to_int8 bit for bit.

    Where every scale is ordinary, nothing is NaN and nothing rounds beyond 127. A product with
    1 / scale and one correction then give the rounded quotient (P. Markstein, IBM Journal of
    Research and Development 34, 1990) in far fewer instructions, which would otherwise take about
    as long as the bytes. The correction needs a product and a sum that are rounded once together,
    which Triton's interpreter does not have.
    """
    if FMA:
        ordinary = (scale > 1e-20) & (scale < 1e20)
        if tl.min(ordinary.to(tl.int32)) > 0:
            inverse = tl.zeros_like(y) + tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
            ratio = y * inverse
            left = tl.fma(-ratio, tl.zeros_like(y) + scale, y)
            # the sum is rounded half to even, and the code is the lowest byte of its bits
            shifted = tl.fma(left, inverse, ratio) + 12582912.0
            codes = shifted.to(tl.int32, bitcast=True).to(tl.int8)
        else:
            codes = to_int8(y, scale)
    else:
        codes = to_int8(y, scale)
    return codes


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


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: a column of GROUP_M tiles shares its weights in the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + in_group % height, in_group // height

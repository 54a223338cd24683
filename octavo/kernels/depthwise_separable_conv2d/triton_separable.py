"""A tile of pixels a program: depthwise sums by blocks of channels, each multiplied at once."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import activate, add_to_sums, finish_pieces, to_int8
from octavo.kernels.depthwise_conv2d.triton_window import known_multiple, tile_pixels, window_sums
from octavo.kernels.weight_only_gemm.triton_codes import dot

__all__ = ["separable_kernel"]


@triton.jit
def _middle(
    sums, cols, C, scale_x_ptr, scale_w_ptr, bias_ptr, mid_scale_ptr, mid_zero_point,
    kind: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What the depthwise half gives [pixels, channels], of the dtype of x."""
    sums = add_to_sums(sums, cols, C, bias_ptr, BIAS)
    y = sums.to(tl.float32)
    if kind == tl.int8:
        if CHANNEL:
            scale_w = tl.load(scale_w_ptr + cols, mask=cols < C, other=0.0)
        else:
            scale_w = tl.load(scale_w_ptr + tl.zeros_like(cols))
        y = y * tl.load(scale_x_ptr) * scale_w[None, :]
    if BIAS:
        if bias_ptr.dtype.element_ty != tl.int32:
            y += tl.load(bias_ptr + cols, mask=cols < C, other=0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if kind == tl.int8:
        y = to_int8(y, tl.load(mid_scale_ptr), mid_zero_point)
    return y.to(kind)


@triton.jit
def _product(middle, w, acc):
    """Adds middle [pixels, channels] times w [outputs, channels]."""
    if acc.dtype == tl.int32:
        acc = tl.dot(middle, tl.trans(w), acc, out_dtype=tl.int32)
    else:
        acc = dot(middle, tl.trans(w), acc)
    return acc


@triton.jit(
    do_not_specialize=[
        "M", "zero_point", "mid_zero_point", "residual_zero_point", "out_zero_point",
    ]
)  # fmt: skip
def separable_kernel(
    x_ptr, dw_ptr, pw_ptr, out_ptr,
    dw_scale_x_ptr, dw_scale_ptr, dw_bias_ptr, mid_scale_ptr, zero_point, mid_zero_point,
    scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr, out_scale_ptr,
    residual_zero_point, out_zero_point,
    M, N, H, W, C, OUT_H, OUT_W, TOP, LEFT, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W,
    DW_CHANNEL: tl.constexpr, DW_BIAS: tl.constexpr, DW_ACTIVATION: tl.constexpr,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, ROW: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    UNIT: tl.constexpr, UNIT_N: tl.constexpr,
):  # fmt: skip
    """Images [B, H, W, C] to results [B, OUT_H, OUT_W, N], which have M pixels.

    dw_ptr: depthwise weights [KH, KW, C]; pw_ptr: pointwise weights [N, C]. The programs of a
    tile's blocks of outputs stand beside each other, for the tile's pixels are in the L2 cache
    then; each computes the depthwise half anew.
    """
    C, N = known_multiple(C, UNIT), known_multiple(N, UNIT_N)
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first_n = program % blocks * BLOCK_N
    image, out_h, out_w = tile_pixels(program // blocks, OUT_H, OUT_W, BLOCK_H, BLOCK_W)
    first_h, first_w = out_h * STRIDE_H - TOP, out_w * STRIDE_W - LEFT
    kind: tl.constexpr = x_ptr.dtype.element_ty
    if kind == tl.int8:
        acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), dtype=tl.int32)
    else:
        acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_N), dtype=tl.float32)
    ns = first_n + tl.arange(0, BLOCK_N)
    for first_c in range(0, C, BLOCK_C):
        cols = first_c + tl.arange(0, BLOCK_C)
        sums = window_sums(
            x_ptr, dw_ptr, image, first_h, first_w, cols, zero_point,
            H, W, C, DILATION_H, DILATION_W, KH, KW, ROW,
        )  # fmt: skip
        middle = _middle(
            sums, cols, C, dw_scale_x_ptr, dw_scale_ptr, dw_bias_ptr, mid_scale_ptr,
            mid_zero_point, kind, DW_CHANNEL, DW_BIAS, DW_ACTIVATION,
        )  # fmt: skip
        # channels from C on have weights 0, whatever the depthwise half gives there
        there = pw_ptr + ns.to(tl.int64)[:, None] * C + cols[None, :]
        w = tl.load(there, mask=(ns < N)[:, None] & (cols < C)[None, :], other=0)
        acc = _product(middle, w, acc)
    rows = (image.to(tl.int64) * OUT_H + out_h) * OUT_W + out_w
    rows = tl.where((out_h < OUT_H) & (out_w < OUT_W), rows, M)
    acc = add_to_sums(acc, ns, N, bias_ptr, BIAS)
    finish_pieces(
        acc, rows, first_n, M, N, N,
        out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
        out_scale_ptr, residual_zero_point, out_zero_point,
        TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
        BLOCK_H * BLOCK_W, BLOCK_N, PIECES,
    )  # fmt: skip

"""A block of channels of a tile of pixels a program."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import add_to_sums, finish
from octavo.kernels.depthwise_conv2d.triton_window import known_multiple, tile_pixels, window_sums

__all__ = ["depthwise_kernel"]


@triton.jit(do_not_specialize=["M", "zero_point", "residual_zero_point", "out_zero_point"])
def depthwise_kernel(
    x_ptr, w_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr,
    residual_scale_ptr, out_scale_ptr, residual_zero_point, out_zero_point, zero_point,
    M, H, W, C, OUT_H, OUT_W, TOP, LEFT, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, ROW: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Images [B, H, W, C] to results [B, OUT_H, OUT_W, C], which have M pixels."""
    C = known_multiple(C, UNIT)
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    cols = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image, out_h, out_w = tile_pixels(program // blocks, OUT_H, OUT_W, BLOCK_H, BLOCK_W)
    acc = window_sums(
        x_ptr, w_ptr, image, out_h * STRIDE_H - TOP, out_w * STRIDE_W - LEFT, cols, zero_point,
        H, W, C, DILATION_H, DILATION_W, KH, KW, ROW,
    )  # fmt: skip
    rows = (image.to(tl.int64) * OUT_H + out_h) * OUT_W + out_w
    rows = tl.where((out_h < OUT_H) & (out_w < OUT_W), rows, M)
    acc = add_to_sums(acc, cols, C, bias_ptr, BIAS)
    finish(
        acc, rows, cols, M, C, C,
        out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
        out_scale_ptr, residual_zero_point, out_zero_point,
        TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
    )  # fmt: skip

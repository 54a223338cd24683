"""The implicit product: patches are read where they lie, and never written to memory."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import add_to_sums, finish_pieces, tile_of

__all__ = ["conv_kernel"]


@triton.jit
def _codes_of_one_tap(
    images, border_ptr, rows_y, rows_x, step, H, W, C, pixel,
    KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BORDER: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of a tap and BLOCK_K channels for each row: int8 [rows, BLOCK_K]."""
    blocks = tl.cdiv(C, BLOCK_K)
    tap = step // blocks
    cs = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    ys = rows_y + tap // KERNEL_W * DILATION_H
    xs = rows_x + tap % KERNEL_W * DILATION_W
    there = images + (ys.to(tl.int64) * W + xs) * pixel
    pointers = there[:, None] + cs[None, :]
    present = (cs < C)[None, :]
    if BORDER == "none":
        if EVEN_C:
            codes = tl.load(pointers)
        else:
            codes = tl.load(pointers, mask=present, other=0)
    else:
        inside = ((ys >= 0) & (ys < H) & (xs >= 0) & (xs < W))[:, None]
        if BORDER == "zeros":
            codes = tl.load(pointers, mask=inside if EVEN_C else inside & present, other=0)
        else:
            # a load cannot fill in another code than zero on its way to shared memory
            pointers = tl.where(inside, pointers, border_ptr + cs[None, :])
            if EVEN_C:
                codes = tl.load(pointers)
            else:
                codes = tl.load(pointers, mask=present, other=0)
    return codes


@triton.jit
def _codes_of_any_taps(
    images, rows_y, rows_x, ks, zero_point, H, W, C, pixel, K,
    KERNEL_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BORDER: tl.constexpr,
):  # fmt: skip
    """Codes at places `ks` of the axis of all taps and channels: int8 [rows, ks]."""
    tap, cs = ks // C, ks % C
    ys = rows_y[:, None] + (tap // KERNEL_W * DILATION_H)[None, :]
    xs = rows_x[:, None] + (tap % KERNEL_W * DILATION_W)[None, :]
    inside = (ks < K)[None, :]
    if BORDER != "none":
        inside = inside & (ys >= 0) & (ys < H) & (xs >= 0) & (xs < W)
    pointers = images[:, None] + (ys * W + xs).to(tl.int64) * pixel + cs[None, :]
    return tl.load(pointers, mask=inside, other=zero_point)


@triton.jit(do_not_specialize=["M", "zero_point", "residual_zero_point", "out_zero_point"])
def conv_kernel(
    x_ptr, w_ptr, border_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr,
    residual_scale_ptr, out_scale_ptr, residual_zero_point, out_zero_point,
    zero_point, M, N, H, W, C, OUT_H, OUT_W, GROUPS,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, BORDER: tl.constexpr,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FOLD: tl.constexpr, EVEN_C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A tile of the output: BLOCK_M of its M = B * OUT_H * OUT_W pixels, BLOCK_N channels.

    Codes x [B, H, W, GROUPS * C], weights [GROUPS * N, KERNEL_H, KERNEL_W, C], out
    [M, GROUPS * N]; a row of border_ptr is C codes of the zero point. The sum runs over taps and
    blocks of channels, or, FOLD, over both as one axis.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns beyond the end read the first ones; their results are not stored
    pixels = tl.where(rows < M, rows, 0)
    w_rows = (group * N + tl.where(cols < N, cols, 0)).to(tl.int64)
    pixel = GROUPS * C
    rows_y = pixels // OUT_W % OUT_H * STRIDE_H - TOP
    rows_x = pixels % OUT_W * STRIDE_W - LEFT
    image = pixels // (OUT_W * OUT_H)
    images = x_ptr + image.to(tl.int64) * H * W * pixel + group * C
    K = KERNEL_H * KERNEL_W * C
    weights = w_ptr + w_rows * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if FOLD:
        for step in range(tl.cdiv(K, BLOCK_K)):
            ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
            codes = _codes_of_any_taps(
                images, rows_y, rows_x, ks, zero_point, H, W, C, pixel, K,
                KERNEL_W, DILATION_H, DILATION_W, BORDER,
            )  # fmt: skip
            w = tl.load(weights[:, None] + ks[None, :], mask=(ks < K)[None, :], other=0)
            acc = tl.dot(codes, tl.trans(w), acc, out_dtype=tl.int32)
    else:
        blocks = tl.cdiv(C, BLOCK_K)
        for step in range(KERNEL_H * KERNEL_W * blocks):
            codes = _codes_of_one_tap(
                images, border_ptr, rows_y, rows_x, step, H, W, C, pixel,
                KERNEL_W, DILATION_H, DILATION_W, BORDER, EVEN_C, BLOCK_K,
            )  # fmt: skip
            cs = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            places = weights[:, None] + (step // blocks * C + cs)[None, :]
            if EVEN_C:
                w = tl.load(places)
            else:
                w = tl.load(places, mask=(cs < C)[None, :], other=0)
            acc = tl.dot(codes, tl.trans(w), acc, out_dtype=tl.int32)
    acc = add_to_sums(acc, group * N + cols, (group + 1) * N, bias_ptr, BIAS)
    finish_pieces(
        acc, rows, group * N + tile_n * BLOCK_N, M, (group + 1) * N, GROUPS * N,
        out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
        out_scale_ptr, residual_zero_point, out_zero_point,
        TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION, BLOCK_M, BLOCK_N, PIECES,
    )  # fmt: skip

"""Where the pixels of a tile are, and the sums of their windows, inside a Triton kernel."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["known_multiple", "tile_pixels", "window_sums"]


@triton.jit
def known_multiple(size, UNIT: tl.constexpr):
    """The same size, of which the compiler knows that it is a multiple of UNIT."""
    if UNIT > 1:
        size = size // UNIT * UNIT
    return size


@triton.jit
def tile_pixels(tile, OUT_H, OUT_W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image of a tile, and rows and columns [BLOCK_H * BLOCK_W] of its pixels in the result.

    The tiles of an image come one after another, row by row; the last ones stand over the edge.
    """
    across, down = tl.cdiv(OUT_W, BLOCK_W), tl.cdiv(OUT_H, BLOCK_H)
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    out_h = tile // across % down * BLOCK_H + pixel // BLOCK_W
    out_w = tile % across * BLOCK_W + pixel % BLOCK_W
    return tile // (across * down), out_h, out_w


@triton.jit
def _tap(acc, x_tile, w_tile, h, w, present, around, H, W):
    """Adds the products of one tap, which lies at rows h and columns w [pixels]."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(x_tile, mask=inside[:, None] & present[None, :], other=around)
    k = tl.load(w_tile, mask=present, other=0)
    return acc + x.to(acc.dtype) * k.to(acc.dtype)[None, :]


@triton.jit
def window_sums(
    x_ptr, w_ptr, image, first_h, first_w, cols, zero_point, H, W, C, DILATION_H, DILATION_W,
    KH: tl.constexpr, KW: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Sums of the products of a window and its weights [pixels, channels]; int32 of codes.

    Args:
        x_ptr: images [B, H, W, C].
        w_ptr: weights [KH, KW, C].
        image: number of the image.
        first_h: row of each pixel's first tap, before the image where it is negative [pixels].
        first_w: its column [pixels].
        cols: channels; the sums of those from C on are 0.
        zero_point: code around the image, int32.
        H: height of an image.
        W: width.
        C: channels.
        DILATION_H: rows from a tap to the next.
        DILATION_W: columns.
        KH: taps down.
        KW: taps across.
        ROW: whether the taps of a row are loaded at once, for which registers must suffice.
    """
    if x_ptr.dtype.element_ty == tl.int8:
        around = zero_point.to(tl.int8)
        acc = tl.zeros((first_h.shape[0], cols.shape[0]), dtype=tl.int32)
    else:
        around = 0.0
        acc = tl.zeros((first_h.shape[0], cols.shape[0]), dtype=tl.float32)
    present = cols < C
    # of the first tap; the others lie as far from it for every pixel
    first = (image.to(tl.int64) * H + first_h) * W + first_w
    x_tile = x_ptr + (first * C)[:, None] + cols[None, :]
    w_tile = w_ptr + cols
    pixel = tl.cast(C, tl.int64)  # C is a number where it is 1
    down, across = pixel * W * DILATION_H, pixel * DILATION_W
    for i in range(KH):
        h = first_h + i * DILATION_H
        if ROW:
            for j in tl.static_range(KW):
                x_tap, w_tap = x_tile + j * across, w_tile + j * C
                w = first_w + j * DILATION_W
                acc = _tap(acc, x_tap, w_tap, h, w, present, around, H, W)
        else:
            for j in range(KW):
                x_tap, w_tap = x_tile + j * across, w_tile + j * C
                w = first_w + j * DILATION_W
                acc = _tap(acc, x_tap, w_tap, h, w, present, around, H, W)
        x_tile += down
        w_tile += KW * C
    return acc

"""A program takes whole rows, from their peaks to the codes."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import codes_of, magnitude, scale_of

__all__ = ["long_row_kernel", "rows_kernel"]


@triton.jit
def _read(x_rows, smooth_ptr, cols, inside, stride_k, K, SMOOTH: tl.constexpr):
    """float32 [ROWS, BLOCK] over the divisor; 0 outside."""
    x = tl.load(x_rows + cols.to(tl.int64) * stride_k, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        smooth = tl.load(smooth_ptr + cols, mask=cols < K, other=1.0).to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + smooth)
    return x


@triton.jit
def _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS: tl.constexpr):
    """The tensor's scale from the peaks [parts]; the first program stores it."""
    part = tl.arange(0, PARTS)[None, :]
    peaks = tl.load(peaks_ptr + part, mask=part < parts, other=0.0)
    scale = scale_of(tl.max(magnitude(peaks), axis=1, keep_dims=True))
    tl.store(scale_ptr + tl.zeros_like(scale).to(tl.int32), scale, mask=tl.program_id(0) == 0)
    return scale


@triton.jit
def rows_kernel(
    x_ptr, smooth_ptr, peaks_ptr, scale_ptr, codes_ptr,
    M, K, parts, inner, stride_outer, stride_inner, stride_k,
    SMOOTH: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr,
    FMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes round(y / scale) of y = x / smooth.

    ROWS whole rows, read once. MODE "token": one scale per row, and codes. "peak": the program's
    max|y| to peaks [programs]. "tensor": the scale from peaks [parts], and codes.
    """
    # [ROWS, 1]; rows of the last program beyond M are neither read nor stored
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (cols < K)
    x_rows = x_ptr + (rows // inner) * stride_outer + (rows % inner) * stride_inner
    y = _read(x_rows, smooth_ptr, cols, inside, stride_k, K, SMOOTH)
    if MODE == "tensor":
        scale = _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS)
    else:
        top = tl.max(magnitude(y), axis=1, keep_dims=True)
        if MODE == "peak":
            tl.store(peaks_ptr + tl.program_id(0), tl.max(top).to(tl.float32, bitcast=True))
        else:
            scale = scale_of(top)
            tl.store(scale_ptr + rows, scale, mask=rows < M)
    if MODE != "peak":
        tl.store(codes_ptr + rows * K + cols, codes_of(y, scale, FMA), mask=inside)


@triton.jit
def long_row_kernel(
    x_ptr, smooth_ptr, peaks_ptr, scale_ptr, codes_ptr,
    M, K, parts, inner, stride_outer, stride_inner, stride_k,  # noqa: ARG001 - one launch
    SMOOTH: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr,
    FMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `rows_kernel`, for one row that registers do not hold: read in blocks, twice."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), dtype=tl.int64)
    x_row = x_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    block = tl.arange(0, BLOCK)[None, :]
    if MODE == "tensor":
        scale = _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS)
    else:
        tops = tl.zeros((1, BLOCK), dtype=tl.int32)
        for start in range(0, K, BLOCK):
            cols = start + block
            y = _read(x_row, smooth_ptr, cols, cols < K, stride_k, K, SMOOTH)
            tops = tl.maximum(tops, magnitude(y))
        top = tl.max(tops, axis=1, keep_dims=True)
        if MODE == "peak":
            tl.store(peaks_ptr + row, top.to(tl.float32, bitcast=True))
        else:
            scale = scale_of(top)
            tl.store(scale_ptr + row, scale)
    if MODE != "peak":
        for start in range(0, K, BLOCK):
            cols = start + block
            y = _read(x_row, smooth_ptr, cols, cols < K, stride_k, K, SMOOTH)
            tl.store(codes_ptr + row * K + cols, codes_of(y, scale, FMA), mask=cols < K)

"""A program takes whole rows, from the norm or activation to the codes."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import activate, to_int8

__all__ = ["long_row_kernel", "rows_kernel"]


@triton.jit
def _read(
    x_rows, residual_rows, cols, inside, stride_k, up, ACTIVATION: tl.constexpr, ADD: tl.constexpr
):
    """float32 [ROWS, BLOCK] after the activation or the residual; 0 outside."""
    there = x_rows + cols.to(tl.int64) * stride_k
    x = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu-mul":
        x = activate(x, "silu") * tl.load(there + up, mask=inside, other=0.0).to(tl.float32)
    else:
        x = activate(x, ACTIVATION)
    if ADD:
        residual = tl.load(residual_rows + cols, mask=inside, other=0.0)
        x = (x + residual.to(tl.float32)).to(residual.dtype).to(tl.float32)
    return x


@triton.jit
def _mean(sums, K):
    """[ROWS, 1] of [ROWS, BLOCK]."""
    total = tl.sum(sums, axis=1, keep_dims=True)
    return tl.div_rn(total, tl.zeros_like(total) + K)


@triton.jit
def _inverse_root(x):
    """1 / sqrt(x), each step rounded as on a CPU."""
    return tl.div_rn(tl.zeros_like(x) + 1.0, tl.sqrt_rn(x))


@triton.jit
def _finish(
    x, mean, inverse, cols, inside, weight_ptr, bias_ptr, smooth_ptr, K,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The norm with the statistics of its rows, and the divisor; 0 outside."""
    if NORM != "none":
        x = (x - mean) * inverse
        if WEIGHT:
            x *= tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        x = tl.where(inside, x, 0.0)
    if SMOOTH:
        smooth = tl.load(smooth_ptr + cols, mask=cols < K, other=1.0).to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + smooth)
    return x


@triton.jit
def _magnitude(x):
    """|x| as an integer: bits order as floats do, and NaN, which a GPU's maximum drops, is top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(top):
    """Scale whose largest code is `top`, the greatest _magnitude of each row."""
    peak = top.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak == 0.0, 1.0, peak), tl.zeros_like(peak) + 127.0)


@triton.jit
def _codes(y, scale, FMA: tl.constexpr):
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
def _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS: tl.constexpr):
    """The tensor's scale from the peaks [parts]; the first program stores it."""
    part = tl.arange(0, PARTS)[None, :]
    peaks = tl.load(peaks_ptr + part, mask=part < parts, other=0.0)
    scale = _scale_of(tl.max(_magnitude(peaks), axis=1, keep_dims=True))
    tl.store(scale_ptr + tl.zeros_like(scale).to(tl.int32), scale, mask=tl.program_id(0) == 0)
    return scale


@triton.jit
def rows_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, bias_ptr, smooth_ptr,
    peaks_ptr, scale_ptr, codes_ptr,
    M, K, parts, inner, stride_outer, stride_inner, stride_k, up, eps,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SMOOTH: tl.constexpr, ADD: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr,
    FMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes round(y / scale) of y = norm(x + residual) or activation(x), over smooth.

    ROWS whole rows, read once. MODE "token": a scale a row, and codes. "peak": the program's
    max|y| to peaks [programs]. "tensor": the scale from peaks [parts], and codes.
    """
    # [ROWS, 1]; rows of the last program beyond M are neither read nor stored
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (cols < K)
    x_rows = x_ptr + (rows // inner) * stride_outer + (rows % inner) * stride_inner
    x = _read(x_rows, residual_ptr + rows * K, cols, inside, stride_k, up, ACTIVATION, ADD)
    if ADD:
        tl.store(total_ptr + rows * K + cols, x, mask=inside)
    mean = tl.zeros((ROWS, 1), dtype=tl.float32)
    inverse = mean
    if NORM == "layer":
        mean = _mean(x, K)
    if NORM != "none":
        centred = tl.where(inside, x - mean, 0.0)
        inverse = _inverse_root(_mean(centred * centred, K) + eps)
    y = _finish(
        x, mean, inverse, cols, inside, weight_ptr, bias_ptr, smooth_ptr, K,
        NORM, WEIGHT, BIAS, SMOOTH,
    )  # fmt: skip
    if MODE == "tensor":
        scale = _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS)
    else:
        top = tl.max(_magnitude(y), axis=1, keep_dims=True)
        if MODE == "peak":
            tl.store(peaks_ptr + tl.program_id(0), tl.max(top).to(tl.float32, bitcast=True))
        else:
            scale = _scale_of(top)
            tl.store(scale_ptr + rows, scale, mask=rows < M)
    if MODE != "peak":
        tl.store(codes_ptr + rows * K + cols, _codes(y, scale, FMA), mask=inside)


@triton.jit
def long_row_kernel(
    x_ptr, residual_ptr, total_ptr, weight_ptr, bias_ptr, smooth_ptr,
    peaks_ptr, scale_ptr, codes_ptr,
    M, K, parts, inner, stride_outer, stride_inner, stride_k, up, eps,  # noqa: ARG001 - one launch
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SMOOTH: tl.constexpr, ADD: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr,
    FMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `rows_kernel`, for one row that registers do not hold: read in blocks, several times."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), dtype=tl.int64)
    x_row = x_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    residual_row = residual_ptr + row * K
    block = tl.arange(0, BLOCK)[None, :]
    zeros = tl.zeros((1, BLOCK), dtype=tl.float32)
    mean = tl.zeros((1, 1), dtype=tl.float32)
    inverse = mean
    if ADD or NORM == "layer":
        sums = zeros
        for start in range(0, K, BLOCK):
            cols = start + block
            x = _read(x_row, residual_row, cols, cols < K, stride_k, up, ACTIVATION, ADD)
            sums += x
            if ADD:
                tl.store(total_ptr + row * K + cols, x, mask=cols < K)
        if NORM == "layer":
            mean = _mean(sums, K)
    if NORM != "none":
        sums = zeros
        for start in range(0, K, BLOCK):
            cols = start + block
            x = _read(x_row, residual_row, cols, cols < K, stride_k, up, ACTIVATION, ADD)
            centred = tl.where(cols < K, x - mean, 0.0)
            sums += centred * centred
        inverse = _inverse_root(_mean(sums, K) + eps)
    if MODE == "tensor":
        scale = _scale_of_parts(peaks_ptr, scale_ptr, parts, PARTS)
    else:
        tops = tl.zeros((1, BLOCK), dtype=tl.int32)
        for start in range(0, K, BLOCK):
            cols = start + block
            x = _read(x_row, residual_row, cols, cols < K, stride_k, up, ACTIVATION, ADD)
            y = _finish(
                x, mean, inverse, cols, cols < K, weight_ptr, bias_ptr, smooth_ptr, K,
                NORM, WEIGHT, BIAS, SMOOTH,
            )  # fmt: skip
            tops = tl.maximum(tops, _magnitude(y))
        top = tl.max(tops, axis=1, keep_dims=True)
        if MODE == "peak":
            tl.store(peaks_ptr + row, top.to(tl.float32, bitcast=True))
        else:
            scale = _scale_of(top)
            tl.store(scale_ptr + row, scale)
    if MODE != "peak":
        for start in range(0, K, BLOCK):
            cols = start + block
            x = _read(x_row, residual_row, cols, cols < K, stride_k, up, ACTIVATION, ADD)
            y = _finish(
                x, mean, inverse, cols, cols < K, weight_ptr, bias_ptr, smooth_ptr, K,
                NORM, WEIGHT, BIAS, SMOOTH,
            )  # fmt: skip
            tl.store(codes_ptr + row * K + cols, _codes(y, scale, FMA), mask=cols < K)

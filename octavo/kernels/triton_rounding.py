"""Reals to symmetric int8 codes inside a Triton kernel, bit for bit as `rounding` does it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["to_int8"]


@triton.jit
def to_int8(x, scale):
    """saturate(round_half_even(x / scale)); NaN gives the smallest code."""
    ratio = tl.div_rn(x, tl.zeros_like(x) + scale)
    # NaN first: comparisons with it are false, and what the conversion makes of it is not defined
    ratio = tl.where(ratio == ratio, ratio, -128.0)
    ratio = tl.minimum(tl.maximum(ratio, -128.0), 127.0)
    # adding 1.5 * 2**23 leaves no bits behind the point: the sum is rounded half to even, and the
    # code is the lowest byte of its bits
    return (ratio + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)

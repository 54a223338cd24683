"""Reals to int8 codes inside a Triton kernel, bit for bit as `rounding` does it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["to_int8"]


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

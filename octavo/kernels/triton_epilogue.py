"""Activations inside a Triton kernel, as `torch` computes them; NaN passes each of them."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate"]

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

"""What kernels of linear attention share: features, products on tensor cores, the division.

KIND is the dtype of q, k and v, and decides what the tensor cores multiply: bfloat16 for bf16;
TF32 for fp16, which has the bits of float16 and the range that exp(-50) needs; and three products
of TF32 for fp32. Sums are float32 throughout.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = [
    "divide",
    "features_below",
    "key_features",
    "operand",
    "product",
    "query_features",
    "query_peak",
]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter has no products in bfloat16, and rounds to it by cutting bits off."""


@triton.jit
def _features(x, FEATURE_MAP: tl.constexpr):
    """phi(x) of float32 x; NaN stays."""
    if FEATURE_MAP == "elu+1":
        x = tl.where(x >= 0, x + 1, tl.exp(x))
    elif FEATURE_MAP == "relu":
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def key_features(k, kept, FEATURE_MAP: tl.constexpr):
    """Features of keys, float32; 0 where they are not kept."""
    return tl.where(kept, _features(k.to(tl.float32), FEATURE_MAP), 0.0)


@triton.jit
def query_features(q, there, FEATURE_MAP: tl.constexpr):
    """Features of queries [T, D], 0 outside, over the largest of each row; float32.

    The divisor cancels when the result is divided by its normaliser.

    Args:
        q: the queries; 0 outside.
        there: which columns are there, [1, D].
        FEATURE_MAP: phi.
    """
    return features_below(q, there, query_peak(q, there, FEATURE_MAP), FEATURE_MAP)


@triton.jit
def query_peak(q, there, FEATURE_MAP: tl.constexpr):
    """What decides by how much the features of queries are divided: the largest of each, [T, 1]."""
    x = q.to(tl.float32)
    if FEATURE_MAP == "elu+1":
        x = tl.where(there, x, float("-inf"))
    else:
        x = tl.abs(_features(x, FEATURE_MAP))
    return tl.max(x, axis=1, keep_dims=True)


@triton.jit
def features_below(q, there, peak, FEATURE_MAP: tl.constexpr):
    """Features of some columns of queries, the `query_peak` of all columns being known."""
    x = q.to(tl.float32)
    if FEATURE_MAP == "elu+1":
        y = tl.where(x >= 0, x + 1, tl.exp(x - tl.minimum(peak, 0.0)))
        peak = tl.maximum(peak + 1, 1.0)
    else:
        y = _features(x, FEATURE_MAP)
        peak = tl.where(peak == 0, 1.0, peak)
    return tl.where(there, y / peak, 0.0)


@triton.jit
def _rounded(x, BITS: tl.constexpr):
    """float32 x without its last BITS bits, rounded to nearest; NaN, which has others, stays."""
    bits = (x.to(tl.int32, bitcast=True) + (1 << (BITS - 1))) & -(1 << BITS)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, KIND: tl.constexpr):
    """float32 x as the tensor cores take it, rounded to nearest."""
    if KIND == "bf16":
        if INTERPRETED:
            x = _rounded(x, 16)
        else:
            x = x.to(tl.bfloat16)
    elif KIND == "fp16":
        # they would cut these bits off, which makes every sum too small
        x = _rounded(x, 13)
    return x


@triton.jit
def product(a, b, sums, KIND: tl.constexpr):
    """Sums + a b, float32."""
    if KIND == "bf16":
        sums = tl.dot(a, b, sums)
    elif KIND == "fp16":
        sums = tl.dot(a, b, sums, input_precision="tf32")
    else:
        sums = tl.dot(a, b, sums, input_precision="tf32x3")
    return sums


@triton.jit
def divide(sums, normalizer, eps):
    """Sums / normalizer; 0 where that is eps or less."""
    vanished = tl.abs(normalizer) <= eps
    return tl.where(vanished, 0.0, sums / tl.where(vanished, 1.0, normalizer))

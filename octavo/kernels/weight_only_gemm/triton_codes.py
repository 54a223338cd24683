"""Codes to the numbers they stand for, and the end of every kernel of this operator.

A code becomes a float without a conversion instruction, of which a GPU starts few: its bits go
into the low bits of the mantissa of a power of two, and subtracting that power leaves the code.
"""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import os

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import activate

__all__ = ["code_of_byte", "code_of_word", "dot", "finish"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter has no arithmetic in bfloat16; float32 gives the same where it is exact."""


@triton.jit
def code_of_word(word, AT: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, magic, zero):
    """float32 of the code at bit AT of an int32, minus the zero point.

    AT + BITS is at most 23. FLIP turns a signed code into an unsigned one by its sign bit.
    `magic` is 2.0**23 as an integer. It comes at run time, because the compiler makes one
    instruction of the mask and the exponent only if it does not know both.
    """
    mask: tl.constexpr = ((1 << BITS) - 1) << AT
    bits = (word & mask) ^ (magic - (AT << 23) + (FLIP << AT))
    return bits.to(tl.float32, bitcast=True) - (zero + (8388608 >> AT))


@triton.jit
def code_of_byte(
    byte, HIGH: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, zero, kind: tl.constexpr
):
    """Code minus zero point, in the type kind, which holds it exactly.

    Args:
        byte: uint8; of 4-bit codes, two.
        HIGH: take the high half of the byte.
        BITS: 8 or 4.
        FLIP: what turns a signed code into an unsigned one.
        zero: the zero point, int32, broadcast to `byte`.
        kind: float16, bfloat16 or float32.
    """
    if kind == tl.float16:
        # 1024 and 64 + code
        half = byte.to(tl.int16)
        if BITS == 8:
            value = (half ^ (0x6400 + FLIP)).to(kind, bitcast=True) - (zero + 1024).to(kind)
        elif HIGH:
            value = ((half & 240) ^ (0x5400 + FLIP * 16)).to(kind, bitcast=True) - (zero + 64).to(
                kind
            )
        else:
            value = ((half & 15) ^ (0x6400 + FLIP)).to(kind, bitcast=True) - (zero + 1024).to(kind)
    elif kind == tl.bfloat16 and BITS == 4:
        half = byte.to(tl.int16)
        half = (half >> 4) if HIGH else (half & 15)
        value = (half ^ (0x4300 + FLIP)).to(kind, bitcast=True)
        if INTERPRETED:
            value = (value.to(tl.float32) - (zero + 128)).to(kind)
        else:
            value -= (zero + 128).to(kind)
    else:
        word = byte.to(tl.int32)
        if BITS == 4:
            word = (word >> 4) if HIGH else (word & 15)
        word = word ^ (0x4B000000 + FLIP)
        value = (word.to(tl.float32, bitcast=True) - (zero + 8388608).to(tl.float32)).to(kind)
    return value


@triton.jit
def dot(a, b, acc):
    """A product added to acc in float32; of float32 operands, by three products of TF32."""
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def finish(
    y, there, cols, inside, N, out_ptr, scale_ptr, bias_ptr, residual_ptr,
    CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Scale of the channel, bias, activation and residual, and the store.

    `cols` (output channels), `there` (places in the output) and `inside` have the shape of y or
    are broadcast to it.
    """
    if CHANNEL:
        y *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if RESIDUAL:
        y += tl.load(residual_ptr + there, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + there, y.to(out_ptr.dtype.element_ty), mask=inside)

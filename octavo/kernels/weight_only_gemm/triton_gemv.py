"""One row of activations: float32 products on ordinary cores, limited by reading the weights."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.weight_only_gemm.triton_codes import code_of_word, finish

__all__ = ["gemv_kernel"]


@triton.jit
def _number(packed, AT: tl.constexpr, KIND: tl.constexpr):
    """float32 of the float at the place AT in an int64."""
    if KIND == "fp16":
        value = (packed >> (16 * AT)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "bf16":
        word = (packed >> (32 * (AT // 2))).to(tl.int32)
        word = (word & -65536) if AT % 2 else (word << 16)
        value = word.to(tl.float32, bitcast=True)
    else:
        value = (packed >> (32 * AT)).to(tl.int32).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0)
    return values


@triton.jit
def _four(x_ptr, at, inside, KIND: tl.constexpr, EVEN: tl.constexpr):
    """Activations 4 * at to 4 * at + 3 in float32."""
    if KIND == "fp32":
        low = _load(x_ptr + 2 * at, inside, EVEN)
        high = _load(x_ptr + 2 * at + 1, inside, EVEN)
        a, b = _number(low, 0, KIND), _number(low, 1, KIND)
        c, d = _number(high, 0, KIND), _number(high, 1, KIND)
    else:
        all_four = _load(x_ptr + at, inside, EVEN)
        a, b = _number(all_four, 0, KIND), _number(all_four, 1, KIND)
        c, d = _number(all_four, 2, KIND), _number(all_four, 3, KIND)
    return a, b, c, d


@triton.jit
def gemv_kernel(
    x_ptr, w_ptr, out_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr,
    N, CHUNKS, GROUPS, stride_xm, stride_wn, magic,
    BITS: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, KIND: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] * (code[n, k] - zero[n, g(k)]) * scale[n, g(k)].

    A thread takes chunks of 16 bytes, which lie in one group each. With SPLIT_K > 1 the result is
    a partial sum float32 [SPLIT_K, M, N].

    Activations of the type KIND (fp16, bf16, fp32) come as int64 [M, stride_xm], codes as int32
    [N, 4 * stride_wn]. GROUP is the codes in a group, or 0 where the channel has one scale.
    """
    codes: tl.constexpr = 128 // BITS
    flip: tl.constexpr = 0 if ASYMMETRIC else 1 << (BITS - 1)
    row = tl.program_id(2)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    chunks = part * BLOCK_C + tl.arange(0, BLOCK_C)
    words = chunks[:, None] * 4 + tl.arange(0, 4)[None, :]
    # channels beyond the end read the first one; their results are not stored
    w_rows = tl.where(cols < N, cols, 0).to(tl.int64)
    w_tile = w_ptr + w_rows[:, None, None] * (stride_wn * 4) + words[None, :, :]
    x_row = x_ptr + row.to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, CHUNKS, BLOCK_C * SPLIT_K):
        # [BLOCK_N, BLOCK_C, 4] words
        inside = words < (CHUNKS - start) * 4
        w = _load(w_tile + start * 4, inside[None, :, :], EVEN)
        # [BLOCK_N, BLOCK_C] groups; where a channel is one group, GROUPS is 1
        group = tl.minimum(start + chunks, CHUNKS - 1) * codes // GROUP if GROUP else chunks * 0
        place = w_rows[:, None] * GROUPS + group[None, :]
        if ASYMMETRIC:
            zero = tl.load(zero_ptr + place).to(tl.float32)[:, :, None]
        else:
            zero = flip + 0.0
        # [1, BLOCK_C, 4] of each activation that a word meets
        at = start * 4 + words
        if BITS == 8:
            a, b, c, d = _four(x_row, at, inside, KIND, EVEN)
            top = w >> 16
            y = code_of_word(w, 0, BITS, flip, magic, zero) * a[None, :, :]
            y += code_of_word(w, 8, BITS, flip, magic, zero) * b[None, :, :]
            y += code_of_word(top, 0, BITS, flip, magic, zero) * c[None, :, :]
            y += code_of_word(top, 8, BITS, flip, magic, zero) * d[None, :, :]
        else:
            a, b, c, d = _four(x_row, at * 2, inside, KIND, EVEN)
            top = w >> 12
            y = code_of_word(w, 0, BITS, flip, magic, zero) * a[None, :, :]
            y += code_of_word(w, 4, BITS, flip, magic, zero) * b[None, :, :]
            y += code_of_word(w, 8, BITS, flip, magic, zero) * c[None, :, :]
            y += code_of_word(w, 12, BITS, flip, magic, zero) * d[None, :, :]
            a, b, c, d = _four(x_row, at * 2 + 1, inside, KIND, EVEN)
            y += code_of_word(w, 16, BITS, flip, magic, zero) * a[None, :, :]
            y += code_of_word(top, 8, BITS, flip, magic, zero) * b[None, :, :]
            y += code_of_word(top, 12, BITS, flip, magic, zero) * c[None, :, :]
            y += code_of_word(top, 16, BITS, flip, magic, zero) * d[None, :, :]
        y = tl.sum(y, axis=2)
        if GROUP:
            y *= tl.load(scale_ptr + place).to(tl.float32)
        acc += y
    total = tl.sum(acc, axis=1)
    if SPLIT_K > 1:
        there = (part * tl.num_programs(2) + row).to(tl.int64) * N + cols
        tl.store(out_ptr + there, total, mask=cols < N)
    else:
        finish(
            total, row.to(tl.int64) * N + cols, cols, cols < N, N,
            out_ptr, scale_ptr, bias_ptr, residual_ptr, GROUP == 0, BIAS, RESIDUAL, ACTIVATION,
        )  # fmt: skip

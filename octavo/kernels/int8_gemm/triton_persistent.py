"""The persistent kernel: a program a processor, tiles in turn, operands through TMA (sm_90 on)."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.common.triton_epilogue import add_to_sums, finish_pieces, tile_of

__all__ = ["persistent_kernel"]


@triton.jit(do_not_specialize=["M", "residual_zero_point", "out_zero_point"])
def persistent_kernel(
    x_desc, w_desc, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr,
    residual_scale_ptr, out_scale_ptr, residual_zero_point, out_zero_point,
    M, N, K,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Tiles i, i + programs, i + 2 * programs, ... of the output.

    Descriptors give zeros beyond the end of a matrix, so that no load has a mask.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for step in range(steps):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w = w_desc.load([tile_n * BLOCK_N, step * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = add_to_sums(acc, cols, N, bias_ptr, BIAS)
        finish_pieces(
            acc, tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N, M, N, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, residual_scale_ptr,
            out_scale_ptr, residual_zero_point, out_zero_point,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
            BLOCK_M, BLOCK_N, PIECES,
        )  # fmt: skip

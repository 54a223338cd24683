"""Triton kernels: one pass with the epilogue fused, or K split into exact int32 partial sums."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from octavo.kernels.int8_gemm.reference import Epilogue
from octavo.kernels.triton_rounding import to_int8

__all__ = ["config", "int8_gemm"]

SLICES = 108
"""Programs that fill a small GPU; below that, K is split."""


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(y, 0.0), 6.0)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _finish(
    acc, rows, cols, inside, M, N,
    out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile of accumulators, and its store."""
    there = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if RAW:
        tl.store(out_ptr + there, acc, mask=inside)
    else:
        if TOKEN:
            scale_x = tl.load(scale_x_ptr + rows, mask=rows < M, other=0.0)
        else:
            scale_x = tl.load(scale_x_ptr + tl.zeros_like(rows))
        if CHANNEL:
            scale_w = tl.load(scale_w_ptr + cols, mask=cols < N, other=0.0)
        else:
            scale_w = tl.load(scale_w_ptr + tl.zeros_like(cols))
        y = acc.to(tl.float32) * (scale_x[:, None] * scale_w[None, :])
        if BIAS:
            y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        y = _activate(y, ACTIVATION)
        if RESIDUAL:
            y += tl.load(residual_ptr + there, mask=inside, other=0.0).to(tl.float32)
        if REQUANTIZE:
            y = to_int8(y, tl.load(out_scale_ptr))
        tl.store(out_ptr + there, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gemm_kernel(
    x_ptr, w_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A tile of the output; with SPLIT_K > 1, a partial sum int32 [SPLIT_K, M, N]."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # a column of GROUP_M tiles shares its weights in the L2 cache
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    rows = (group * GROUP_M + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (in_group // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    ks = part * BLOCK_K + tl.arange(0, BLOCK_K)
    # rows and columns beyond the end read the first ones; their results are not stored
    x_rows = tl.where(rows < M, rows, 0).to(tl.int64)
    w_rows = tl.where(cols < N, cols, 0).to(tl.int64)
    x_tile = x_ptr + x_rows[:, None] * stride_xm + ks[None, :].to(tl.int64) * stride_xk
    w_tile = w_ptr + w_rows[None, :] * stride_wn + ks[:, None].to(tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K * SPLIT_K):
        if EVEN_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            left = K - start
            x = tl.load(x_tile, mask=ks[None, :] < left, other=0)
            w = tl.load(w_tile, mask=ks[:, None] < left, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_tile += BLOCK_K * SPLIT_K * stride_xk
        w_tile += BLOCK_K * SPLIT_K * stride_wk
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        there = (part * M + rows.to(tl.int64)[:, None]) * N + cols[None, :]
        tl.store(out_ptr + there, acc, mask=inside)
    else:
        _finish(
            acc, rows, cols, inside, M, N,
            out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, out_scale_ptr,
            TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
        )  # fmt: skip


@triton.jit
def _gather_kernel(
    partial_ptr, out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, out_scale_ptr, M, N,
    TOKEN: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    REQUANTIZE: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums, which is exact in any order, and finishes."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for part in range(SPLIT_K):
        there = (part * M + rows.to(tl.int64)[:, None]) * N + cols[None, :]
        acc += tl.load(partial_ptr + there, mask=inside, other=0)
    _finish(
        acc, rows, cols, inside, M, N,
        out_ptr, scale_x_ptr, scale_w_ptr, bias_ptr, residual_ptr, out_scale_ptr,
        TOKEN, CHANNEL, BIAS, RESIDUAL, REQUANTIZE, RAW, ACTIVATION,
    )  # fmt: skip


def config(m: int, n: int, k: int, *, heavy: bool = False) -> dict[str, int]:
    """Tile sizes for a shape, by rule: nothing has been tuned on a GPU yet.

    Args:
        m: rows of the activations.
        n: output channels.
        k: length of a row.
        heavy: the epilogue reads a residual or computes an activation of several steps; with
            four warps a tile of 128 x 128 would then spill registers.
    """
    block_m = max(16, min(128, triton.next_power_of_2(m)))
    block_n, block_k = (64, 128) if block_m <= 64 else (128, 64)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    steps = triton.cdiv(k, block_k)
    split = 1
    while tiles * split < SLICES and split < 16 and steps >= 8 * split:
        split *= 2
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "SPLIT_K": split,
        "num_warps": 8 if heavy and block_m * block_n >= 128 * 128 else 4,
        "num_stages": 3,
    }


def int8_gemm(
    x: torch.Tensor, w: torch.Tensor, epilogue: Epilogue, tiles: dict[str, int] | None = None
) -> torch.Tensor:
    """See `schema.int8_gemm`; `tiles` replaces `config`, for tests and tuning."""
    out = torch.empty(*x.shape[:-1], w.shape[0], dtype=epilogue.out_dtype, device=x.device)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    (m, k), n = rows.shape, w.shape[0]
    if not out.numel():
        return out
    if not k:
        return epilogue(torch.zeros(out.shape, dtype=torch.int32, device=x.device))
    e = epilogue
    heavy = e.residual is not None or e.activation not in ("none", "relu", "relu6")
    chosen = tiles or config(m, n, k, heavy=heavy)
    block_m, block_n, split = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["SPLIT_K"]
    # an argument that is not there still needs a pointer, which is never read
    extras = [
        x if value is None else value.contiguous()
        for value in (e.scale_x, e.scale_w, e.bias, e.residual, e.out_scale)
    ]
    flags = {
        "TOKEN": e.scale_x is not None and e.scale_x.ndim > 0,
        "CHANNEL": e.scale_w is not None and e.scale_w.ndim > 0,
        "BIAS": e.bias is not None,
        "RESIDUAL": e.residual is not None,
        "REQUANTIZE": e.out_scale is not None,
        "RAW": e.scale_x is None,
        "ACTIVATION": e.activation,
    }
    partial = out if split == 1 else torch.empty(split, m, n, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _gemm_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), split)](
            rows, w, partial, *extras,
            m, n, k, rows.stride(0), rows.stride(1), w.stride(0), w.stride(1),
            EVEN_K=k % (chosen["BLOCK_K"] * split) == 0, **flags, **chosen,
        )  # fmt: skip
        if split > 1:
            _gather_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 128))](
                partial, out, *extras, m, n, BLOCK_M=16, BLOCK_N=128, SPLIT_K=split, **flags
            )
    return out

"""Triton kernel: a program takes some whole rows, from the sum to the codes."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from octavo.kernels.add_norm.reference import Norm, Result
from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.triton_epilogue import codes_of, magnitude, scale_of
from octavo.kernels.common.triton_launch import pointers
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.dynamic_quantize.configs import candidates, default_config

__all__ = ["add_norm", "add_norm_kernel"]


@triton.jit
def _mean(x, N):
    """[ROWS, 1] of [ROWS, BLOCK], which is 0 outside."""
    total = tl.sum(x, axis=1, keep_dims=True)
    return tl.div_rn(total, tl.zeros_like(total) + N)


@triton.jit
def add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, codes_ptr, scale_ptr, M, N, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, QUANTIZE: tl.constexpr, FMA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias, z = x + residual; codes of y."""
    # [ROWS, 1]; rows of the last program beyond M are neither read nor stored
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (cols < N)
    there = rows * N + cols
    x = tl.load(x_ptr + there, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + there, mask=inside, other=0.0)
    # the sum is a tensor of its own in torch, and so rounded
    z = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype).to(tl.float32)
    centred = tl.where(inside, z - _mean(z, N), 0.0)
    variance = _mean(centred * centred, N)
    y = centred * tl.div_rn(tl.zeros_like(variance) + 1.0, tl.sqrt_rn(variance + eps))
    if WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    rounded = tl.where(inside, y, 0.0).to(x.dtype)
    tl.store(y_ptr + there, rounded, mask=inside)
    if QUANTIZE:
        y = rounded.to(tl.float32)
        scale = scale_of(tl.max(magnitude(y), axis=1, keep_dims=True))
        tl.store(scale_ptr + rows, scale, mask=rows < M)
        tl.store(codes_ptr + there, codes_of(y, scale, FMA), mask=inside)


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: Norm,
    quantize: bool,
    chosen: Mapping[str, int] | None = None,
) -> Result:
    """See `schema.add_norm`; `chosen` replaces what `default_config` says."""
    x, residual = x.detach().contiguous(), residual.detach().contiguous()
    y = torch.empty_like(x)
    codes = x.new_empty(x.shape if quantize else 0, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1] if quantize else 0, dtype=torch.float32)
    if not x.numel():
        return y, codes, scale
    n, m = x.shape[-1], x.numel() // x.shape[-1]
    chosen = chosen or _choose(x, residual, norm, quantize)
    with torch.cuda.device_of(x):
        add_norm_kernel[(triton.cdiv(m, chosen["ROWS"]),)](
            x, residual, *pointers(x, norm.weight, norm.bias), y, codes, scale, m, n, norm.eps,
            WEIGHT=norm.weight is not None, BIAS=norm.bias is not None, QUANTIZE=quantize,
            **{"FMA": x.is_cuda, **chosen},
        )  # fmt: skip
    return y, codes, scale


def _choose(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool
) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule: rows are read as `dynamic_quantize` does."""
    n = x.shape[-1]
    m = power_of_two(x.numel() // n)
    return best_config(
        "add_norm",
        f"{m}x{n} {x.element_size()}" + (" codes" if quantize else ""),
        x.device,
        default_config(m, n),
        functools.partial(candidates, m, n),
        functools.partial(add_norm, x, residual, norm, quantize),
    )

"""Launches the Triton kernels: chooses how rows are read, and finds them in strided tensors."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton

from octavo.kernels.common.configs import power_of_two
from octavo.kernels.common.triton_launch import pointers
from octavo.kernels.dispatch.autotune import best_config
from octavo.kernels.dynamic_quantize.configs import candidates, default_config
from octavo.kernels.dynamic_quantize.triton_rows import long_row_kernel, rows_kernel

__all__ = ["dynamic_quantize"]

PARTS = 1024
"""Peaks that the second launch of a tensor's scale reduces by itself."""


def dynamic_quantize(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    per_token: bool,
    chosen: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`; `chosen` replaces what `default_config` says."""
    K = x.shape[-1]
    M = x.numel() // K
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1] if per_token else (), dtype=torch.float32, device=x.device)
    if not M:
        return codes, scale if per_token else scale.fill_(1.0).div_(127.0)
    chosen = chosen or _choose(x, smooth, per_token)
    programs = triton.cdiv(M, chosen.get("ROWS", 1))
    kernel = rows_kernel if "ROWS" in chosen else long_row_kernel
    rows, inner, stride_outer, stride_inner = _rows(x.detach())

    def launch(peaks: torch.Tensor, mode: str) -> None:
        with torch.cuda.device_of(x):
            kernel[(programs,)](
                rows, *pointers(x, smooth), peaks, scale, codes, M, K, peaks.numel(),
                inner, stride_outer, stride_inner, rows.stride(-1),
                SMOOTH=smooth is not None, MODE=mode, PARTS=PARTS, **{"FMA": x.is_cuda, **chosen},
            )  # fmt: skip

    if per_token:
        launch(scale, "token")
        return codes, scale
    peaks = torch.empty(programs, dtype=torch.float32, device=x.device)
    launch(peaks, "peak")
    launch(peaks.amax().reshape(1) if programs > PARTS else peaks, "tensor")
    return codes, scale


def _choose(x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool) -> Mapping[str, int]:
    """The tuned configuration, or that of the rule."""
    k = x.shape[-1]
    m = power_of_two(x.numel() // k)
    words = ["token" if per_token else "tensor"] + ["smooth"] * (smooth is not None)
    return best_config(
        "dynamic_quantize",
        f"{m}x{k} {x.element_size()} {' '.join(words)}",
        x.device,
        default_config(m, k),
        functools.partial(candidates, m, k),
        functools.partial(dynamic_quantize, x, smooth, per_token),
    )


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x, and row r at r // inner * stride_outer + r % inner * stride_inner in it.

    Axes whose strides allow it count as one; x is copied where more than two remain.
    """
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return _rows(x.contiguous())
    if len(axes) == 2:
        return x, axes[1][0], axes[0][1], axes[1][1]
    return x, 1, axes[0][1] if axes else 0, 0

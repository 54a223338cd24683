"""Launches the Triton kernels: chooses how rows are read, and finds them in strided tensors."""

# Triton's language only looks like Python:
# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs
# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
import triton

from octavo.kernels.dispatch.tuning import best, size_bucket
from octavo.kernels.dynamic_quantize.configs import candidates, config
from octavo.kernels.dynamic_quantize.prologue import Prologue
from octavo.kernels.dynamic_quantize.triton_rows import long_row_kernel, rows_kernel

__all__ = ["add_dynamic_quantize", "dynamic_quantize"]

PARTS = 1024
"""Peaks that the second launch of a tensor's scale reduces by itself."""


def dynamic_quantize(
    x: torch.Tensor,
    prologue: Prologue,
    per_token: bool,
    chosen: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`; `chosen` replaces what `config` says."""
    codes, scale, _ = _quantize(x, None, prologue, per_token, chosen)
    return codes, scale


def add_dynamic_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    prologue: Prologue,
    per_token: bool,
    chosen: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.add_dynamic_quantize`; `chosen` replaces what `config` says."""
    return _quantize(x, residual.detach().contiguous(), prologue, per_token, chosen)


def _quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    prologue: Prologue,
    per_token: bool,
    chosen: Mapping[str, int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the sum with the residual (without one, the codes again)."""
    K = prologue.width(x.shape[-1])
    M = x.numel() // x.shape[-1]
    codes = torch.empty((*x.shape[:-1], K), dtype=torch.int8, device=x.device)
    total = codes if residual is None else torch.empty_like(residual)
    scale = torch.empty(x.shape[:-1] if per_token else (), dtype=torch.float32, device=x.device)
    if not M:
        return codes, scale if per_token else scale.fill_(1.0).div_(127.0), total
    if chosen is None:
        chosen = _choose(x, residual, prologue, per_token, M, K)
    programs = triton.cdiv(M, chosen.get("ROWS", 1))
    kernel = rows_kernel if "ROWS" in chosen else long_row_kernel

    def launch(x: torch.Tensor, peaks: torch.Tensor, mode: str, add: bool) -> None:
        rows, inner, stride_outer, stride_inner = _rows(x.detach())
        stride_k = rows.stride(-1)
        vectors = [
            x if value is None else value.contiguous()  # never read where there is none
            for value in (prologue.weight, prologue.bias, prologue.smooth)
        ]
        with torch.cuda.device_of(x):
            kernel[(programs,)](
                rows, total if residual is None else residual, total, *vectors,
                peaks, scale, codes, M, K, peaks.numel(), inner, stride_outer, stride_inner,
                stride_k, K * stride_k, prologue.eps,
                NORM=prologue.norm, WEIGHT=prologue.weight is not None,
                BIAS=prologue.bias is not None, ACTIVATION=prologue.activation,
                SMOOTH=prologue.smooth is not None, ADD=add, MODE=mode, PARTS=PARTS,
                **{"FMA": x.is_cuda, **chosen},
            )  # fmt: skip

    add = residual is not None
    if per_token:
        launch(x, scale, "token", add)
        return codes, scale, total
    peaks = torch.empty(programs, dtype=torch.float32, device=x.device)
    launch(x, peaks, "peak", add)
    if programs > PARTS:
        peaks = peaks.amax().reshape(1)
    launch(total if add else x, peaks, "tensor", False)
    return codes, scale, total


def _choose(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    prologue: Prologue,
    per_token: bool,
    m: int,
    k: int,
) -> Mapping[str, int]:
    """The tuned configuration for m rows of length k, or that of the rule."""
    m = size_bucket(m)
    words = ["token" if per_token else "tensor", prologue.norm, prologue.activation]
    words += ["smooth"] * (prologue.smooth is not None) + ["add"] * (residual is not None)
    key = f"{m}x{k} {x.element_size()} {' '.join(words)}"

    def others() -> Iterator[Mapping[str, int]]:
        return candidates(m, k)

    def run(tiles: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        return _quantize(x, residual, prologue, per_token, tiles)

    return best("dynamic_quantize", key, x.device, _rule(m, k), others, run)


@functools.lru_cache(maxsize=4096)
def _rule(m: int, k: int) -> Mapping[str, int]:
    return config(m, k)


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

"""Ends of a transformer encoder's blocks: a residual sum, its norm, and the next layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.add_norm.schema import add_norm
from octavo.kernels.cases import SHORT, Call, Case, Shapes, by_importance, seeded

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxN"
BACKENDS = ("triton", "reference")
ROWS = (4096, 128, 1, 1024, 16, 256, 8192)
COLUMNS = ((768,), (384,), (1024,), (4096,))
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OFF_BY_ONE = 0.02
"""Error that quantized values may have which torch rounds another way, here and there."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Alone, and with the quantized result; M x N."""
    chosen = shapes or by_importance(ROWS, COLUMNS)
    return [_case(m, n, dtype, quantize) for m, n in chosen for quantize in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Rows of a small transformer."""
    return [(1, 384), (128, 384)]


def _case(m: int, n: int, dtype: torch.dtype, quantize: bool) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, m + n)
        x, residual = torch.randn(2, m, n, **options).to(dtype)
        norm = dict(zip(("weight", "bias"), torch.randn(2, n, **options).to(dtype), strict=True))
        return {"x": x, "residual": residual, **norm, "quantize": quantize}

    return Case(
        operator="add_norm",
        name=f"{m}x{n} {SHORT[dtype]}" + (" quantized" if quantize else ""),
        shape=(m, n),
        dtype=dtype,
        bytes=(3 * m * n + 2 * n) * dtype.itemsize + (m * n + 4 * m) * quantize,
        operations=0,  # memory is the limit, by far
        rate="",
        tolerance=OFF_BY_ONE if quantize else TOLERANCES[dtype],
        make=make,
        run=_run,
        by_row=("x", "residual"),
    )


def _run(*, quantize: bool, **arguments: Any) -> Any:
    """What is asked for; the operator's other results are empty."""
    y, codes, scale = add_norm(quantize=quantize, **arguments)
    return (y, codes, scale) if quantize else y


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """The same operations in torch, as people write them."""
    x, residual, weight, bias, quantize = arguments.values()

    def run() -> Any:
        y = functional.layer_norm(x + residual, x.shape[-1:], weight, bias)
        if not quantize:
            return y
        scale = y.float().abs().amax(-1) / 127
        return y, torch.round(y.float() / scale[:, None]).to(torch.int8), scale

    return [Call("torch eager", run, 2 * case.tolerance)]

"""Activations worth quantizing with calibrated scales: those of `dynamic_quantize`'s cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from octavo.kernels.cases import SHORT, Call, Case, Shapes, by_importance, seeded
from octavo.kernels.dynamic_quantize.cases import COLUMNS, OFF_BY_ONE, ROWS, small_shapes
from octavo.kernels.static_quantize.schema import static_quantize

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxK"
BACKENDS = ("triton", "reference")


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """One scale, and a scale for each channel; M x K."""
    chosen = shapes or by_importance(ROWS, COLUMNS)
    return [_case(m, k, dtype, channels) for m, k in chosen for channels in (0, k)]


def _case(m: int, k: int, dtype: torch.dtype, channels: int) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, m + k)
        x = torch.randn(m, k, **options).to(dtype)
        scale = torch.rand((channels,) if channels else (), **options) * 0.01 + 0.02
        return {"x": x, "scale": scale}

    return Case(
        operator="static_quantize",
        name=f"{m}x{k} {SHORT[dtype]}" + (" channels" if channels else ""),
        shape=(m, k),
        dtype=dtype,
        bytes=m * k * (dtype.itemsize + 1) + 4 * max(1, channels),
        operations=0,  # memory is the limit, by far
        rate="",
        tolerance=0.0,
        make=make,
        run=static_quantize,
        by_row=("x",),
    )


def baselines(_: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """The same steps in torch."""
    x, scale = arguments["x"], arguments["scale"]

    def quantize() -> torch.Tensor:
        return torch.round(x / scale).clamp(-128, 127).to(torch.int8)

    return [Call("torch eager", quantize, OFF_BY_ONE)]

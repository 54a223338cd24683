"""Activations worth quantizing with calibrated scales: those of `dynamic_quantize`'s cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from octavo.kernels.cases import SHORT, Call, Case, by_importance, inductor
from octavo.kernels.dynamic_quantize.cases import COLUMNS, OFF_BY_ONE, ROWS, small_shapes
from octavo.kernels.static_quantize.schema import static_quantize

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxK"
BACKENDS = ("triton", "reference")


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """One scale, and a scale for each channel; M x K."""
    chosen = shapes or [(m, k) for m, (k,) in by_importance(ROWS, COLUMNS)]
    return [
        _case(m, k, dtype or torch.bfloat16, channels) for m, k in chosen for channels in (0, k)
    ]


def _case(m: int, k: int, dtype: torch.dtype, channels: int) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(m + k)
        x = torch.randn(m, k, generator=random, device=device).to(dtype)
        shape = (channels,) if channels else ()
        scale = torch.rand(shape, generator=random, device=device) * 0.01 + 0.02
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


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:  # noqa: ARG001 - protocol
    """The same steps in torch, by themselves and fused by Inductor."""
    x, scale = arguments["x"], arguments["scale"]
    steps = _steps(x, scale)
    found = [Call("torch eager", steps, OFF_BY_ONE)]
    if compiled:
        found.append(Call("torch Inductor", inductor(steps, x.device), OFF_BY_ONE))
    return found


def _steps(x: torch.Tensor, scale: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.round(x / scale).clamp(-128, 127).to(torch.int8)

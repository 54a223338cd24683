"""Activations worth quantizing: rows as wide as the layers that `int8_gemm` is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from octavo.kernels.cases import SHORT, Call, Case, Shapes, by_importance, seeded
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxK"
BACKENDS = ("triton", "reference")
ROWS = (16, 4096, 1, 256, 1024, 64, 8192)
COLUMNS = ((4096,), (8192,), (14336,), (768,), (28672,), (3072,))
OFF_BY_ONE = 0.02
"""Error that codes may have which torch rounds another way, here and there."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Scales per token, without and with a SmoothQuant divisor; M x K."""
    chosen = shapes or by_importance(ROWS, COLUMNS)
    return [_case(m, k, dtype, smooth) for m, k in chosen for smooth in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Activations of a small transformer."""
    return [(1, 768), (128, 768), (128, 3072)]


def _case(m: int, k: int, dtype: torch.dtype, smooth: bool) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, m + k)
        x = torch.randn(m, k, **options).to(dtype)
        return {"x": x, "smooth": torch.rand(k, **options) + 0.5} if smooth else {"x": x}

    return Case(
        operator="dynamic_quantize",
        name=f"{m}x{k} {SHORT[dtype]}" + (" smooth" if smooth else ""),
        shape=(m, k),
        dtype=dtype,
        bytes=m * k * (dtype.itemsize + 1) + 4 * m + 4 * k * smooth,
        operations=0,  # memory is the limit, by far
        rate="",
        tolerance=0.0,
        make=make,
        run=dynamic_quantize,
        by_row=("x",),
    )


def baselines(_: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """The same steps in torch, as people write them."""
    x, smooth = arguments["x"], arguments.get("smooth")

    def quantize() -> tuple[torch.Tensor, torch.Tensor]:
        values = x.float() if smooth is None else x.float() / smooth
        scale = values.abs().amax(-1) / 127
        return torch.round(values / scale[:, None]).to(torch.int8), scale

    return [Call("torch eager", quantize, OFF_BY_ONE)]

"""Activations worth quantizing: rows as wide as the layers that `int8_gemm` is measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from octavo.kernels.cases import SHORT, Call, Case, by_importance, inductor
from octavo.kernels.dynamic_quantize.schema import dynamic_quantize

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxK"
BACKENDS = ("triton", "reference")
ROWS = (16, 4096, 1, 256, 1024, 64, 8192)
COLUMNS = ((4096,), (8192,), (14336,), (768,), (28672,), (3072,))
OFF_BY_ONE = 0.02
"""Error that codes may have which torch rounds another way, here and there."""


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """Scales per token, without and with a SmoothQuant divisor; M x K."""
    chosen = shapes or [(m, k) for m, (k,) in by_importance(ROWS, COLUMNS)]
    return [
        _case(m, k, dtype or torch.bfloat16, smooth) for m, k in chosen for smooth in (False, True)
    ]


def small_shapes() -> list[tuple[int, ...]]:
    """Activations of a small transformer."""
    return [(1, 768), (128, 768), (128, 3072)]


def _case(m: int, k: int, dtype: torch.dtype, smooth: bool) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(m + k)
        arguments = {"x": torch.randn(m, k, generator=random, device=device).to(dtype)}
        if smooth:
            arguments["smooth"] = torch.rand(k, generator=random, device=device) + 0.5
        return arguments

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


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:  # noqa: ARG001 - protocol
    """The same steps in torch, as people write them; by themselves and fused by Inductor."""
    steps, device = _steps(arguments), arguments["x"].device
    found = [Call("torch eager", steps, OFF_BY_ONE)]
    if compiled:
        found.append(Call("torch Inductor", inductor(steps, device), OFF_BY_ONE))
    return found


def _steps(arguments: Mapping[str, Any]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    x, smooth = arguments["x"], arguments.get("smooth")

    def quantize() -> tuple[torch.Tensor, torch.Tensor]:
        values = x.float() if smooth is None else x.float() / smooth
        scale = values.abs().amax(-1) / 127
        return torch.round(values / scale[:, None]).to(torch.int8), scale

    return quantize

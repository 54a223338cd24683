"""INT8 matrix products worth measuring: layers of BERT, Llama and larger, at batches 1 to 8192."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import (
    LINEAR_LAYERS,
    ROUNDED_ONCE,
    SHORT,
    Call,
    Case,
    Shapes,
    by_importance,
    dtype_name,
    random_codes,
    seeded,
)
from octavo.kernels.common.epilogue import ACTIVATIONS, Epilogue
from octavo.kernels.int8_gemm import int_mm
from octavo.kernels.int8_gemm.schema import int8_gemm

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes"]

AXES = "MxNxK"
BACKENDS = ("triton", "int_mm", "dequantize")
ROWS = (16, 4096, 1, 256, 1024, 64, 8192, 32, 128, 2048, 512, 17)
HALF_PRODUCT = 1e-2
"""Error of a product of bfloat16 values, each rounded from what the codes stand for."""


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Bare ones (scales alone), then those with bias and GELU; M x N x K."""
    chosen = shapes or by_importance(ROWS, LINEAR_LAYERS)
    return [_case(tuple(shape), dtype, fused) for shape in chosen for fused in (False, True)]


def small_shapes() -> list[tuple[int, ...]]:
    """Layers of a small transformer."""
    return [(1, 768, 768), (17, 768, 768), (128, 768, 3072), (128, 3072, 768)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, fused: bool) -> Case:
    m, n, k = shape

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, m + n + k)
        arguments: dict[str, Any] = {
            "x_q": random_codes(m, k, **options),
            "w_q": random_codes(n, k, **options),
            "scale_x": torch.rand(m, **options) * 0.01 + 0.01,
            "scale_w": (torch.rand(n, **options) + 1) / (100 * k**0.5),
            "out_dtype": dtype,
        }
        if fused:
            arguments["bias"] = torch.randn(n, **options)
            arguments["activation"] = "gelu"
        return arguments

    moved = m * k + n * k + m * n * dtype.itemsize + 4 * (m + n + n * fused)
    return Case(
        operator="int8_gemm",
        name=f"{m}x{n}x{k} {SHORT[dtype]}" + (" bias gelu" if fused else ""),
        shape=shape,
        dtype=dtype,
        bytes=moved,
        operations=2 * m * n * k,
        rate="int8",
        tolerance=ROUNDED_ONCE[dtype],
        make=make,
        run=int8_gemm,
        by_row=("x_q", "scale_x", "residual"),
    )


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Float linear layers on what the codes stand for, and torch._int_mm with torch's epilogue."""
    (m, n, k), x_q, w_q = case.shape, arguments["x_q"], arguments["w_q"]
    scale_x, scale_w, bias = arguments["scale_x"], arguments["scale_w"], arguments.get("bias")
    activation = arguments.get("activation", "none")
    values = (x_q * scale_x[:, None], w_q * scale_w[:, None], bias)
    found = []
    for dtype in dict.fromkeys((torch.float32, case.dtype)):
        operands = (None if one is None else one.to(dtype) for one in values)
        linear = functools.partial(_linear, activation, *operands)
        tolerance = max(1e-5 if dtype == torch.float32 else HALF_PRODUCT, case.tolerance)
        moved = (m * k + n * k + m * n) * dtype.itemsize
        found.append(Call(f"F.linear {SHORT[dtype]}", linear, tolerance, moved, dtype_name(dtype)))
    if not int_mm.reason(x_q, w_q):
        e = Epilogue(scale_x, scale_w, bias, None, None, activation, case.dtype)
        found.append(Call("torch int_mm", lambda: e(torch._int_mm(x_q, w_q.T)), case.tolerance))
    return found


def _linear(activation: str, *operands: Any) -> torch.Tensor:
    return ACTIVATIONS[activation](functional.linear(*operands))

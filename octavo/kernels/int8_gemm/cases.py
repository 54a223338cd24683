"""INT8 matrix products worth measuring: layers of BERT, Llama and larger, at batches 1 to 8192."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import (
    LINEAR_LAYERS,
    ROUNDED_ONCE,
    SHORT,
    Call,
    Case,
    by_importance,
    inductor,
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


def cases(
    shapes: Sequence[tuple[int, ...]] | None = None, dtype: torch.dtype | None = None
) -> list[Case]:
    """Bare ones (scales alone), then those with bias and GELU; M x N x K."""
    chosen = shapes or [(m, n, k) for m, (n, k) in by_importance(ROWS, LINEAR_LAYERS)]
    return [
        _case(m, n, k, dtype or torch.bfloat16, fused)
        for m, n, k in chosen
        for fused in (False, True)
    ]


def small_shapes() -> list[tuple[int, ...]]:
    """Layers of a small transformer."""
    return [(1, 768, 768), (17, 768, 768), (128, 768, 3072), (128, 3072, 768)]


def _case(m: int, n: int, k: int, dtype: torch.dtype, fused: bool) -> Case:
    def make(device: torch.device) -> dict[str, Any]:
        random = torch.Generator(device).manual_seed(m + n + k)
        options: dict[str, Any] = {"generator": random, "device": device}
        arguments: dict[str, Any] = {
            "x_q": torch.randint(-128, 128, (m, k), dtype=torch.int8, **options),
            "w_q": torch.randint(-128, 128, (n, k), dtype=torch.int8, **options),
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
        shape=(m, n, k),
        dtype=dtype,
        bytes=moved,
        operations=2 * m * n * k,
        rate="int8",
        tolerance=ROUNDED_ONCE[dtype],
        make=make,
        run=int8_gemm,
        by_row=("x_q", "scale_x", "residual"),
    )


def _epilogue(arguments: Mapping[str, Any]) -> Epilogue:
    return Epilogue(
        arguments["scale_x"],
        arguments["scale_w"],
        arguments.get("bias"),
        arguments.get("residual"),
        None,
        arguments.get("activation", "none"),
        arguments["out_dtype"],
    )


def baselines(case: Case, arguments: Mapping[str, Any], compiled: bool) -> list[Call]:
    """Float linear layers on what the codes stand for, and torch._int_mm with torch's epilogue."""
    m, n, k = case.shape
    x = arguments["x_q"] * arguments["scale_x"][:, None]
    w = arguments["w_q"] * arguments["scale_w"][:, None]
    found = []
    for dtype in dict.fromkeys((torch.float32, case.dtype)):
        linear = _linear(x.to(dtype), w.to(dtype), arguments)
        tolerance = 1e-5 if dtype == torch.float32 else HALF_PRODUCT
        tolerance = max(tolerance, case.tolerance)
        moved = (m * k + n * k + m * n) * dtype.itemsize
        title, rate = f"F.linear {SHORT[dtype]}", str(dtype).removeprefix("torch.")
        found.append(Call(title, linear, tolerance, moved, rate))
        if compiled:
            found.append(
                Call(f"{title} Inductor", inductor(linear, x.device), tolerance, moved, rate)
            )
    if not int_mm.reason(arguments["x_q"], arguments["w_q"]):
        product = _product(arguments)
        found.append(Call("torch int_mm", product, case.tolerance))
        if compiled:
            found.append(Call("torch int_mm Inductor", inductor(product, x.device), case.tolerance))
    return found


def _linear(
    x: torch.Tensor, w: torch.Tensor, arguments: Mapping[str, Any]
) -> Callable[[], torch.Tensor]:
    bias = arguments.get("bias")
    bias = None if bias is None else bias.to(x.dtype)
    activate = ACTIVATIONS[arguments.get("activation", "none")]
    return lambda: activate(functional.linear(x, w, bias))


def _product(arguments: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    x, w, epilogue = arguments["x_q"], arguments["w_q"], _epilogue(arguments)
    return lambda: epilogue(torch._int_mm(x, w.T))

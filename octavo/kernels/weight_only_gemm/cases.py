"""Weight-only products worth measuring: decoding with few rows, where weights set the pace."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from octavo.kernels.cases import (
    LINEAR_LAYERS,
    SHORT,
    Call,
    Case,
    Shapes,
    by_importance,
    dtype_name,
    seeded,
)
from octavo.kernels.weight_only_gemm.schema import weight_only_gemm
from octavo.quant.weights import QuantizedWeight

__all__ = ["AXES", "BACKENDS", "baselines", "cases", "small_shapes", "weight_of"]

AXES = "MxNxK"
BACKENDS = ("triton", "dequantize")
ROWS = (1, 16, 64, 4, 256, 8, 32, 128, 2)
FORMS = ((4, 128, False), (8, None, False), (4, 32, False), (4, 64, True))
"""Bits, group size, and whether there are zero points."""
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def cases(shapes: Shapes | None = None, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Every shape with the forms that its K allows; M x N x K."""
    chosen = shapes or by_importance(ROWS, LINEAR_LAYERS)
    return [
        _case(tuple(shape), dtype, *form)
        for form in FORMS
        for shape in chosen
        if shape[2] % (form[1] or 1) == 0
    ]


def small_shapes() -> list[tuple[int, ...]]:
    """Layers of a small transformer."""
    return [(1, 768, 768), (16, 768, 768), (16, 3072, 768)]


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, group: int | None, asymmetric: bool
) -> Case:
    m, n, k = shape

    def make(device: torch.device) -> dict[str, Any]:
        options = seeded(device, m + n + k)
        width = (k * bits + 7) // 8
        packed = torch.randint(0, 256, (n, width), dtype=torch.uint8, **options)
        scales = (n,) if group is None else (n, k // group)
        arguments: dict[str, Any] = {
            "x": torch.randn(m, k, **options).to(dtype),
            "w_packed": packed.view(torch.int8) if bits == 8 and not asymmetric else packed,
            "scale": ((torch.rand(scales, **options) + 1) / (2**bits * k**0.5)).to(dtype),
            "bits": bits,
            "group_size": group,
        }
        if asymmetric:
            arguments["zero_point"] = torch.randint(
                0, 2**bits, scales, dtype=torch.uint8, **options
            )
        return arguments

    groups = 1 if group is None else k // group
    weights = n * k * bits // 8 + n * groups * (dtype.itemsize + asymmetric)
    title = f"int{bits}" + ("" if group is None else f" g{group}") + (" zero" * asymmetric)
    return Case(
        operator="weight_only_gemm",
        name=f"{m}x{n}x{k} {SHORT[dtype]} {title}",
        shape=shape,
        dtype=dtype,
        bytes=weights + (m * k + m * n) * dtype.itemsize,
        operations=2 * m * n * k,
        rate=dtype_name(dtype),
        tolerance=TOLERANCES[dtype],
        make=make,
        run=weight_only_gemm,
        by_row=("x", "residual"),
    )


def weight_of(arguments: Mapping[str, Any], k: int) -> QuantizedWeight:
    """The weight [N, k] that a case multiplies with, its values not packed."""
    weight = QuantizedWeight(
        arguments["w_packed"],
        arguments["scale"],
        arguments.get("zero_point"),
        bits=arguments["bits"],
        group_size=arguments["group_size"],
    )
    return weight.unpacked(k)


def baselines(case: Case, arguments: Mapping[str, Any]) -> list[Call]:
    """Float linear layers with the weights that the codes stand for."""
    m, n, k = case.shape
    w = weight_of(arguments, k).dequantize().to(case.dtype)
    linear = functools.partial(functional.linear, arguments["x"], w)
    moved = (m * k + n * k + m * n) * case.dtype.itemsize
    return [Call(f"F.linear {SHORT[case.dtype]}", linear, 2 * TOLERANCES[case.dtype], moved)]

"""Sum, norm and quantization of rows in C, in one pass over memory that caches hold."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.kernels.add_norm.reference import Norm, Result
from octavo.kernels.native.library import (
    FLOAT,
    INT,
    POINTER,
    SIZE,
    Library,
    pointer,
    threads_for,
)
from octavo.kernels.native.memory import new_result

__all__ = ["LIBRARY", "add_norm", "reason"]

LANES = 16
"""Values in an iteration of the C's loops."""
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_add_norm": [*[POINTER] * 4, FLOAT, *[POINTER] * 3, SIZE, SIZE, INT]},
)


def reason(x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool) -> str:  # noqa: ARG001
    """Why the C cannot take these, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    floats = (x, residual, norm.weight, norm.bias)
    if any(one is not None and one.dtype != torch.float32 for one in floats):
        return "it computes in float32"
    if not x.numel():
        return "there is nothing to add"
    return LIBRARY.reason()


def add_norm(x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool) -> Result:
    """See `schema.add_norm`."""
    n = x.shape[-1]
    y = new_result(*x.shape)
    codes = torch.empty(x.shape if quantize else 0, dtype=torch.int8, device="cpu")
    scale = torch.empty(x.shape[:-1] if quantize else 0, dtype=torch.float32, device="cpu")
    weight, bias = (None if one is None else one.contiguous() for one in (norm.weight, norm.bias))
    x, residual = x.contiguous(), residual.contiguous()
    LIBRARY.octavo_add_norm(
        x.data_ptr(),
        residual.data_ptr(),
        pointer(weight),
        pointer(bias),
        norm.eps,
        y.data_ptr(),
        codes.data_ptr() if quantize else None,
        scale.data_ptr() if quantize else None,
        x.numel() // n,
        n,
        threads_for(x.numel() // LANES),
    )
    return y, codes, scale

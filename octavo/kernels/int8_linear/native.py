"""Quantization and product in one call of C, for inputs of few values."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from octavo.kernels.int8_gemm.native import ACTIVATIONS, WORK, panels
from octavo.kernels.native.library import INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.quant.weights import QuantizedWeight

__all__ = ["LIBRARY", "int8_linear", "reason"]

MOST = 1 << 15
"""Values of an input that is quantized and multiplied in one call; more are worth two threads."""
_C = Path(__file__).parents[1] / "int8_gemm" / "native.c"
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {"octavo_int8_linear": [*[POINTER] * 2, *[SIZE] * 3, *[POINTER] * 2, INT, *[POINTER] * 3, INT]},
    includes=(_C,),
)
_scratch = threading.local()


def reason(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> str:  # noqa: ARG001
    """Why one call of C cannot or should not do it, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    bias = weight.bias
    if x.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return "it takes float32 input and bias"
    if not x.numel() or not weight.values.numel():
        return "there is nothing to multiply"
    if x.numel() > MOST:
        return f"inputs of more than {MOST} values are worth two calls"
    return LIBRARY.reason()


def int8_linear(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> torch.Tensor:
    """See `schema.int8_linear`."""
    values, scale, bias = weight.values, weight.scale, weight.bias
    n, k = values.shape
    m = x.numel() // k
    rows = x if x.is_contiguous() else x.contiguous()
    if not (scale.is_contiguous() and (bias is None or bias.is_contiguous())):
        scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=torch.float32, device="cpu")
    codes, scales = _memory()
    packing = panels(values)  # a name keeps what is not remembered alive
    LIBRARY.octavo_int8_linear(
        rows.data_ptr(),
        packing.data_ptr(),
        m,
        n,
        k,
        scale.data_ptr(),
        pointer(bias),
        ACTIVATIONS.index(activation),
        codes,
        scales,
        out.data_ptr(),
        threads_for(m * n * k // WORK),
    )
    return out


def _memory() -> tuple[int, int]:
    """Where this thread's codes and scales go while it computes."""
    if not hasattr(_scratch, "codes"):
        _scratch.codes = torch.empty(MOST, dtype=torch.int8, device="cpu")
        _scratch.scales = torch.empty(MOST, dtype=torch.float32, device="cpu")
    return _scratch.codes.data_ptr(), _scratch.scales.data_ptr()

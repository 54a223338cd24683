"""Quantization and product in one call of C."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from octavo.kernels.int8_gemm.native import ACTIVATIONS, WORK, panels
from octavo.kernels.native.library import INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.native.memory import new_result
from octavo.quant.weights import QuantizedWeight

__all__ = ["LIBRARY", "int8_linear", "reason"]

FEW = 1 << 15
"""Values of an input whose codes go where those of the call before were."""
LANES = 16
"""Values in a step of the loop that quantizes."""
_C = Path(__file__).parents[1] / "int8_gemm" / "native.c"
LIBRARY = Library(
    Path(__file__).with_name("native.c"),
    {
        "octavo_int8_linear": [
            *[POINTER] * 2,
            *[SIZE] * 3,
            *[POINTER] * 2,
            INT,
            *[POINTER] * 3,
            INT,
            INT,
        ]
    },
    includes=(_C,),
)
_scratch = threading.local()


def reason(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> str:  # noqa: ARG001
    """Why the C cannot do it, or nothing."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    bias = weight.bias
    if x.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        return "it takes float32 input and bias"
    if not x.numel() or not weight.values.numel():
        return "there is nothing to multiply"
    return LIBRARY.reason()


def int8_linear(x: torch.Tensor, weight: QuantizedWeight, activation: str) -> torch.Tensor:
    """See `schema.int8_linear`."""
    values, scale, bias = weight.values, weight.scale, weight.bias
    n, k = values.shape
    m = x.numel() // k
    rows = x if x.is_contiguous() else x.contiguous()
    if not (scale.is_contiguous() and (bias is None or bias.is_contiguous())):
        scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    out = new_result(*x.shape[:-1], n)
    codes, scales = _memory(m, m * k)
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
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        threads_for(m * k // LANES),
        threads_for(m * n * k // WORK),
    )
    return out


def _memory(rows: int, values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where codes and scales go while this thread computes."""
    if values > FEW:
        codes = torch.empty(values, dtype=torch.int8, device="cpu")
        return codes, torch.empty(rows, dtype=torch.float32, device="cpu")
    if not hasattr(_scratch, "codes"):
        _scratch.codes = torch.empty(FEW, dtype=torch.int8, device="cpu")
        _scratch.scales = torch.empty(FEW, dtype=torch.float32, device="cpu")
    return _scratch.codes, _scratch.scales

"""The oracle: weights dequantized in float32, a float32 product, and the epilogue in float32."""

from __future__ import annotations

import math

import torch

from octavo.kernels.common.epilogue import Epilogue
from octavo.quant.weights import QuantizedWeight

__all__ = ["weight_only_gemm"]

AT_ONCE = 1 << 20
"""Weights dequantized at a time, so that they are multiplied while still in the cache."""


def weight_only_gemm(x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.weight_only_gemm`."""
    n, k = len(weight.values), x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), k).float()
    y = torch.empty(n, len(rows), dtype=torch.float32, device=x.device)
    step = max(16, AT_ONCE // max(k, 1))
    for start in range(0, n, step):
        part = weight.rows(start, start + step).unpacked(k).dequantize()
        torch.mm(part, rows.T, out=y[start : start + step])
    return epilogue(y.T.reshape(*x.shape[:-1], n).contiguous())

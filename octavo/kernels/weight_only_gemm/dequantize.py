"""All weights as floats and a float matrix product, for many rows, where arithmetic sets the pace.

The weights take the type of the activations, which holds code - zero_point exactly. The scale of a
whole channel is applied to the float32 sum; that of a group to the weights, which are rounded
then. So `auto` takes this only where it was measured and won.
"""

from __future__ import annotations

import math

import torch

from octavo.kernels.common.epilogue import Epilogue
from octavo.quant.weights import QuantizedWeight

__all__ = ["reason", "weight_only_gemm"]


def reason(x: torch.Tensor, weight: QuantizedWeight, *_: object) -> str:
    """Why these cannot be multiplied as floats, or nothing."""
    if not x.numel() or not weight.values.numel():
        return "there is nothing to multiply"
    if x.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {x.device.type}"
    return ""


def weight_only_gemm(x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue) -> torch.Tensor:
    """See `schema.weight_only_gemm`."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    w = _floats(weight, rows)
    if x.device.type == "cuda" and x.dtype != torch.float32:
        y = torch.mm(rows, w.T, out_dtype=torch.float32)
    else:
        y = rows.float() @ w.float().T
    if weight.group_size is None:
        y.mul_(weight.scale)
    return epilogue(y.reshape(*x.shape[:-1], len(w)))


def _floats(weight: QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
    """[N, K] of the type of the rows, without the scale where a channel has a single one."""
    k, n = rows.shape[1], len(weight.values)
    groups = weight.scale.numel() // n
    w = weight.unpacked(k).values.to(rows.dtype).reshape(n, groups, k // groups)
    if weight.zero_point is not None:
        w.sub_(weight.zero_point.to(rows.dtype).reshape(n, groups, 1))
    if weight.group_size is not None:
        torch.mul(w, weight.scale.float().reshape(n, groups, 1), out=w)
    return w.reshape(n, k)

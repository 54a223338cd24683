"""The oracle: exact accumulators by float64, and the epilogue step by step in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

__all__ = ["ACTIVATIONS", "epilogue", "int8_gemm"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: y.clamp(0, 6),
    "gelu": functional.gelu,
    "gelu-tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


def int8_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `schema.int8_gemm`."""
    # float64 holds every sum of products of codes that int32 does
    accumulator = (x.double() @ w.double().T).to(torch.int32)
    return epilogue(accumulator, scale_x, scale_w, bias, residual, out_scale, activation, out_dtype)


def epilogue(
    accumulator: torch.Tensor,
    scale_x: torch.Tensor | None,
    scale_w: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """From accumulators int32 [..., N] to the result."""
    if scale_x is None or scale_w is None:
        return accumulator
    scale = (scale_x.unsqueeze(-1) if scale_x.ndim else scale_x) * scale_w
    y = accumulator.float() * scale
    if bias is not None:
        y = y + bias.float()
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.float()
    if out_scale is None:
        return y.to(out_dtype)
    return torch.round(y / out_scale).nan_to_num(nan=-128).clamp(-128, 127).to(torch.int8)

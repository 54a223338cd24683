"""torch's own convolution: what CPUs run, and a candidate on a GPU.

Codes become float32 numbers, whose sums are exact as long as they stay below 2**24.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.depthwise_conv2d.reference import Convolution
from octavo.kernels.int8_gemm.reference import IN_PLACE

__all__ = ["depthwise_conv2d", "why_not"]

MOST_TAPS = 2**24 // (128 * (255 + 128))
"""Products of a code and a shifted code, and the sum of the weights times the zero point."""


def why_not(x: torch.Tensor, _weight: torch.Tensor, c: Convolution) -> str:
    """Why torch's convolution cannot take these, or nothing."""
    if x.is_floating_point():
        return ""
    if x.device.type != "cpu":
        return "its sums of codes are exact on a CPU only, where no faster algorithm rounds them"
    if c.window.taps > MOST_TAPS:
        return f"sums over {c.window.taps} taps are not exact in float32, only up to {MOST_TAPS}"
    return ""


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.depthwise_conv2d`."""
    padding = (c.window.padding[2], c.window.padding[0])
    if not c.window.symmetric:
        x, padding = functional.pad(x, c.window.padding, value=c.zero_point), (0, 0)
    codes = not x.is_floating_point()
    # a GPU adds halves up in float32, and rounds twice where an activation follows
    dtype = x.dtype if x.is_cuda else torch.float32
    values = x.to(dtype, memory_format=torch.channels_last)
    weights, bias = weight.to(dtype), None
    if codes and c.zero_point:
        # zeros around shifted codes are the zero point around codes
        values = values - c.zero_point
        bias = weights.sum((1, 2, 3)) * c.zero_point
    elif c.bias is not None and not codes:
        bias = c.bias.to(dtype)
    y = functional.conv2d(
        values, weights, bias, c.window.stride, padding, c.window.dilation, weight.shape[0]
    )
    if codes:
        y = c.finish(y.to(torch.int32) if c.out_dtype == torch.int32 else y)
    else:
        y = c.round(IN_PLACE[c.activation](y))
    return y.contiguous(memory_format=torch.channels_last)

"""torch's own convolution: what CPUs run, and a candidate on a GPU.

Codes become float32 numbers, whose sums are exact as long as they stay below 2**24.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.convolution import Convolution

__all__ = ["depthwise_conv2d", "reason"]

MOST_TAPS = 2**24 // (128 * (255 + 128))
"""Taps of a code that the zero point was taken from, and of the zero point itself."""


def reason(x: torch.Tensor, _weight: torch.Tensor, c: Convolution) -> str:
    """Why torch's convolution cannot take these, or nothing."""
    if x.is_floating_point():
        return ""
    if x.device.type != "cpu":
        return "sums of codes are exact on a CPU only; elsewhere an algorithm may round them"
    if c.window.taps > MOST_TAPS:
        return f"sums over {c.window.taps} taps are not exact in float32, only up to {MOST_TAPS}"
    return ""


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.depthwise_conv2d`."""
    window, epilogue, padding = c.window, c.epilogue, (c.window.padding[2], c.window.padding[0])
    if not window.symmetric:
        x, padding = functional.pad(x, window.padding, value=c.zero_point), (0, 0)
    # a GPU multiplies halves, which rounds once more where an activation follows
    dtype = x.dtype if x.is_cuda else torch.float32
    values = x.to(dtype, memory_format=torch.channels_last)
    weights, bias = weight.to(dtype), None
    if x.is_floating_point() and epilogue.bias is not None:
        bias = epilogue.bias.to(dtype)
    elif c.zero_point:
        # zeros around shifted codes are the zero point around codes
        values = values - c.zero_point
        bias = weights.sum((1, 2, 3)) * c.zero_point
    sums = functional.conv2d(
        values, weights, bias, window.stride, padding, window.dilation, weight.shape[0]
    )
    if x.is_floating_point():
        y = epilogue.after_bias(sums.float())
        return y.contiguous(memory_format=torch.channels_last)
    return c.finish(sums.to(torch.int32) if epilogue.out_dtype == torch.int32 else sums)

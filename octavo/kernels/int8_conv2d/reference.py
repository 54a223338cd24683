"""The oracle: exact accumulators by a float64 convolution, and the epilogue of `int8_gemm`."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.convolution import Convolution

__all__ = ["int8_conv2d", "is_pointwise"]


def int8_conv2d(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.int8_conv2d`; the residual of the epilogue is [B, H', W', N]."""
    window, groups = c.window, x.shape[1] // w.shape[1]
    padded = functional.pad(x.double(), window.padding, value=c.zero_point)
    # float64 holds every sum of products of codes that int32 does
    sums = functional.conv2d(padded, w.double(), None, window.stride, 0, window.dilation, groups)
    return c.finish(sums.round().to(torch.int32))


def is_pointwise(x: torch.Tensor, w: torch.Tensor, c: Convolution) -> bool:
    """Whether this is a matrix product: one tap, every pixel, no groups."""
    one = c.window.taps == 1 and c.window.stride == (1, 1) and not any(c.window.padding)
    return one and x.shape[1] == w.shape[1]

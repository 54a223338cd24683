"""The oracle: sums in float64, which are exact for codes, and the rest step by step in float32."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.convolution import Convolution

__all__ = ["depthwise_conv2d"]


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.depthwise_conv2d`."""
    padded = functional.pad(x.double(), c.window.padding, value=c.zero_point)
    sums = functional.conv2d(
        padded, weight.double(), None, c.window.stride, 0, c.window.dilation, weight.shape[0]
    )
    return c.finish(sums.float() if x.is_floating_point() else sums.to(torch.int32))

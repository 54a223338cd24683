"""The oracle: one half after the other, each with sums in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from octavo.kernels.common.convolution import Convolution
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.depthwise_conv2d.reference import depthwise_conv2d

__all__ = ["Separable", "depthwise_separable_conv2d"]


class Separable(NamedTuple):
    """What is done with images and both weights.

    Attributes:
        depthwise: the first half; its result has x's dtype.
        pointwise: what happens to the second half's sums; its residual is [B, H', W', N].
    """

    depthwise: Convolution
    pointwise: Epilogue


def depthwise_separable_conv2d(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> torch.Tensor:
    """See `schema.depthwise_separable_conv2d`."""
    middle = depthwise_conv2d(x, dw_weight, s.depthwise).permute(0, 2, 3, 1)
    sums = middle.double() @ pw_weight.double().T
    y = s.pointwise(sums.float() if x.is_floating_point() else sums.to(torch.int32))
    return y.permute(0, 3, 1, 2)

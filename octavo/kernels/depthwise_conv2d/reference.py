"""The oracle: sums in float64, which are exact for codes, and the rest step by step in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo.kernels.int8_gemm.reference import IN_PLACE
from octavo.kernels.rounding import to_int8
from octavo.kernels.window import Window

__all__ = ["Convolution", "depthwise_conv2d"]


@dataclass(frozen=True)
class Convolution:
    """What is done with images beside their weights; see `schema.depthwise_conv2d`.

    Sums of codes without scales are the result.
    """

    window: Window
    bias: torch.Tensor | None
    scale_x: torch.Tensor | None
    scale_w: torch.Tensor | None
    out_scale: torch.Tensor | None
    activation: str
    zero_point: int
    out_zero_point: int
    out_dtype: torch.dtype

    def finish(self, sums: torch.Tensor) -> torch.Tensor:
        """From sums [B, C, H, W], int32 or float32 and no longer needed, to the result."""
        if self.out_dtype == torch.int32:
            return sums
        y = sums.float()
        # in place: on a CPU new memory costs as much as the arithmetic
        if self.scale_x is not None and self.scale_w is not None:
            y.mul_((self.scale_x * self.scale_w).reshape(-1, 1, 1))
        if self.bias is not None:
            y.add_(self.bias.float().reshape(-1, 1, 1))
        return self.round(IN_PLACE[self.activation](y))

    def round(self, y: torch.Tensor) -> torch.Tensor:
        """From float32 to codes, or to the dtype of the result."""
        if self.out_scale is None:
            return y.to(self.out_dtype)
        return to_int8(y, self.out_scale, self.out_zero_point)


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.depthwise_conv2d`."""
    padded = functional.pad(x.double(), c.window.padding, value=c.zero_point)
    sums = functional.conv2d(
        padded, weight.double(), None, c.window.stride, 0, c.window.dilation, weight.shape[0]
    )
    y = c.finish(sums.float() if x.is_floating_point() else sums.to(torch.int32))
    return y.contiguous(memory_format=torch.channels_last)

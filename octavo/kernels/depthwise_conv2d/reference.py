"""The oracle: sums in float64, which are exact for codes, and the rest step by step in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo.kernels.int8_gemm.reference import Epilogue
from octavo.kernels.window import Window

__all__ = ["Convolution", "depthwise_conv2d"]


@dataclass(frozen=True)
class Convolution:
    """What is done with images and weights.

    Attributes:
        window: where the taps are.
        zero_point: code that padding holds; 0 for floats.
        epilogue: what happens to the sums.
    """

    window: Window
    zero_point: int
    epilogue: Epilogue

    def finish(self, sums: torch.Tensor) -> torch.Tensor:
        """From sums [B, C, H, W], no longer needed, to the result, channels_last."""
        last = sums.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return self.epilogue(last).permute(0, 3, 1, 2)


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    """See `schema.depthwise_conv2d`."""
    padded = functional.pad(x.double(), c.window.padding, value=c.zero_point)
    sums = functional.conv2d(
        padded, weight.double(), None, c.window.stride, 0, c.window.dilation, weight.shape[0]
    )
    return c.finish(sums.float() if x.is_floating_point() else sums.to(torch.int32))

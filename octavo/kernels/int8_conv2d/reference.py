"""The oracle: exact accumulators by a float64 convolution, and the epilogue of `int8_gemm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo.kernels.int8_gemm.reference import Epilogue

__all__ = ["Window", "int8_conv2d"]


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image; see `schema.int8_conv2d` for the fields.

    Attributes:
        stride: along height and width.
        padding: left, right, top, bottom.
        dilation: along height and width.
        groups: into which channels are split.
        zero_point: the code that padding holds.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    zero_point: int

    def output(self, x: torch.Tensor, w: torch.Tensor) -> tuple[int, int]:
        """Height and width of the output for x [B, C, H, W] and w [N, C / groups, kh, kw]."""
        left, right, top, bottom = self.padding
        sizes = (x.shape[2] + top + bottom, x.shape[3] + left + right)
        high, wide = (
            (size - by * (taps - 1) - 1) // step + 1
            for size, taps, by, step in zip(
                sizes, w.shape[2:], self.dilation, self.stride, strict=True
            )
        )
        return high, wide

    def is_pointwise(self, w: torch.Tensor) -> bool:
        """Whether this is a matrix product: one tap, every pixel, no groups."""
        one = w.shape[2:] == (1, 1) and self.stride == (1, 1)
        return one and self.groups == 1 and not any(self.padding)


def int8_conv2d(
    x: torch.Tensor, w: torch.Tensor, window: Window, epilogue: Epilogue
) -> torch.Tensor:
    """See `schema.int8_conv2d`; the residual and the result are [B, H, W, N]."""
    padded = functional.pad(x.double(), window.padding, value=window.zero_point)
    # float64 holds every sum of products of codes that int32 does
    sums = functional.conv2d(
        padded, w.double(), None, window.stride, 0, window.dilation, window.groups
    )
    return epilogue(sums.round().to(torch.int32).permute(0, 2, 3, 1).contiguous())

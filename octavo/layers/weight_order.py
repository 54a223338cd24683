"""The order in memory in which convolutions' kernels read weights without a copy."""

from __future__ import annotations

import torch

__all__ = ["in_kernel_order"]


def in_kernel_order(weight: torch.Tensor, *, depthwise: bool) -> torch.Tensor:
    """The same weights, copied where they lie in another order.

    Args:
        weight: [N, C / groups, kh, kw].
        depthwise: whether each channel has a kernel of its own, which `depthwise_conv2d` reads.

    Returns:
        of the same shape and values; in memory [kh, kw, N] of a depthwise convolution, else
        [N, kh, kw, C / groups], which is channels_last.
    """
    if depthwise:
        return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

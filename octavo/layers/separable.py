"""Depthwise-separable convolutions to train; `fused` is their form for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.layers.geometry import pair

__all__ = ["DepthwiseSeparableConv2d", "MobileNetBlock"]

Pair: TypeAlias = "int | tuple[int, int]"

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


class DepthwiseSeparableConv2d(nn.Module):
    """A depthwise and a pointwise convolution, each with BatchNorm and activation.

    The block of MobileNet (arXiv 1704.04861).

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: of the depthwise convolution.
        stride: of the depthwise convolution.
        padding: zeros on both sides: a number or (height, width); None for as many outputs as
            inputs, divided by the stride and rounded up, which needs an odd kernel.
        dilation: of the depthwise convolution.
        activation: "none", "relu", "relu6", "gelu", "gelu-tanh", "silu" or "hardswish".
        eps: of the BatchNorms.
        momentum: of the BatchNorms.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: an unknown activation, or an even kernel without a padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        *,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"activation {activation!r} is unknown; use one of {known}")
        around = _same(kernel_size, dilation) if padding is None else padding
        self.depthwise = nn.Conv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            around,
            dilation,
            groups=in_channels,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.depthwise_norm = nn.BatchNorm2d(in_channels, eps, momentum, device=device, dtype=dtype)
        self.depthwise_activation = ACTIVATIONS[activation]()
        self.pointwise = nn.Conv2d(
            in_channels, out_channels, 1, bias=False, device=device, dtype=dtype
        )
        self.pointwise_norm = nn.BatchNorm2d(
            out_channels, eps, momentum, device=device, dtype=dtype
        )
        self.pointwise_activation = ACTIVATIONS[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']."""
        x = self.depthwise_activation(self.depthwise_norm(self.depthwise(x)))
        y: torch.Tensor = self.pointwise_activation(self.pointwise_norm(self.pointwise(x)))
        return y

    def fused(self) -> nn.Module:
        """The same block for inference, as one `FusedSeparableConv2d`; this one stays as it is."""
        from octavo.layers.fuse import fuse_model  # which is not needed for training

        return fuse_model(copy.deepcopy(self).eval())[0]


class MobileNetBlock(DepthwiseSeparableConv2d):
    """Convolution, BatchNorm and activation twice, and a residual.

    The input is added to the output where both have the same shape: where the stride is 1, the
    channels are as many and the padding keeps the size. The arguments are those of
    `DepthwiseSeparableConv2d`.
    """

    @property
    def has_residual(self) -> bool:
        """Whether the input is added."""
        conv = self.depthwise
        if isinstance(conv.padding, str):
            return False
        sides = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
        kept = all(2 * pad == step * (size - 1) for size, pad, step in sides)
        return kept and conv.stride == (1, 1) and conv.in_channels == self.pointwise.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']."""
        y = super().forward(x)
        return y + x if self.has_residual else y


def _same(kernel_size: Pair, dilation: Pair) -> tuple[int, int]:
    kernel, steps = pair(kernel_size), pair(dilation)
    if not all(size % 2 for size in kernel):
        raise InputError(f"kernel_size is {kernel_size}; give a padding where it is even")
    return steps[0] * (kernel[0] // 2), steps[1] * (kernel[1] // 2)

"""Depthwise-separable convolutions: blocks to train, which `octavo.fuse` fuses, and INT8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels.common.convolution import Size2d, both
from octavo.kernels.depthwise_separable_conv2d.schema import depthwise_separable_conv2d
from octavo.layers.convolution.int8 import Int8Conv2d

__all__ = ["DepthwiseSeparableConv2d", "Int8DepthwiseSeparableConv2d", "MobileNetBlock"]


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
        kernel_size: Size2d = 3,
        *,
        stride: Size2d = 1,
        padding: Size2d | None = None,
        dilation: Size2d = 1,
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


def _same(kernel_size: Size2d, dilation: Size2d) -> tuple[int, int]:
    kernel, steps = both(kernel_size), both(dilation)
    if not all(size % 2 for size in kernel):
        raise InputError(f"kernel_size is {kernel_size}; give a padding where it is even")
    return steps[0] * (kernel[0] // 2), steps[1] * (kernel[1] // 2)


class Int8DepthwiseSeparableConv2d(nn.Module):
    """pointwise(depthwise(x)), whose intermediate codes need not reach memory.

    Args:
        depthwise: the first; takes codes and gives codes.
        pointwise: the second, 1 x 1 with stride 1; takes these codes.

    Raises:
        InputError: layers that are not of this form.
    """

    def __init__(self, depthwise: Int8Conv2d, pointwise: Int8Conv2d) -> None:
        super().__init__()
        if depthwise.groups != depthwise.in_channels or not depthwise.out_codes:
            raise InputError(f"the first layer is {depthwise}; it must be depthwise, to codes")
        if not (depthwise.in_codes and pointwise.in_codes):
            raise InputError("both layers must take codes; make them with in_codes=True")
        if depthwise.out_zero_point != pointwise.zero_point:
            raise InputError(
                f"the first layer gives codes with the zero point {depthwise.out_zero_point} and "
                f"the second takes {pointwise.zero_point}"
            )
        self.depthwise, self.pointwise = depthwise, pointwise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, C, H, W] to [B, N, H', W'], codes or floats as the second layer gives them."""
        if x.device.type == "cpu":  # which gains nothing from one kernel, but from packed weights
            y: torch.Tensor = self.pointwise(self.depthwise(x))
            return y
        return self.in_one_kernel(x)

    def in_one_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """The same by `octavo.kernels.depthwise_separable_conv2d`, on any device."""
        first, second = self.depthwise, self.pointwise
        middle, by = first.sums_scale, second.multiplier
        if middle is not first.one and middle is not None:
            by = by / middle  # the kernel multiplies with the scale of the middle itself
        return depthwise_separable_conv2d(
            x,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            stride=first.stride,
            padding=first.padding,
            dilation=first.dilation,
            dw_activation=first.sums_activation,
            pw_activation=second.sums_activation,
            scale_x=first.one,
            dw_scale=first.multiplier,
            mid_scale=middle,
            pw_scale=by,
            zero_point=first.zero_point,
            mid_zero_point=second.zero_point,
            out_dtype=torch.int8 if second.out_codes else second.floats.dtype,
            out_scale=second.sums_scale,
            out_zero_point=second.out_zero_point,
        )

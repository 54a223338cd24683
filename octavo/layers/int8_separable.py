"""A depthwise and a pointwise convolution in eight bits, in one kernel."""

from __future__ import annotations

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels import depthwise_separable_conv2d
from octavo.layers.conv import Int8Conv2d

__all__ = ["Int8DepthwiseSeparableConv2d"]


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
        middle, step = first.steps_scale, second.step
        if middle is not first.one and middle is not None:
            step = step / middle  # the kernel multiplies with the scale of the middle itself
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
            dw_scale=first.step,
            mid_scale=middle,
            pw_scale=step,
            zero_point=first.zero_point,
            mid_zero_point=second.zero_point,
            out_dtype=torch.int8 if second.out_codes else second.like.dtype,
            out_scale=second.steps_scale,
            out_zero_point=second.out_zero_point,
        )

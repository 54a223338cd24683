"""The two halves as operators of their own: what CPUs run, and a candidate on a GPU.

Many output channels make one kernel compute the depthwise half again for each block of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.convolution import Convolution
from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.depthwise_conv2d.schema import depthwise_conv2d
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.int8_gemm.schema import int8_gemm

__all__ = ["depthwise_separable_conv2d"]


def depthwise_separable_conv2d(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> torch.Tensor:
    """See `schema.depthwise_separable_conv2d`."""
    middle = _depthwise(x, dw_weight, s.depthwise).permute(0, 2, 3, 1)
    product = _float_product if x.is_floating_point() else _code_product
    return product(middle, pw_weight, s.pointwise).permute(0, 3, 1, 2)


def _depthwise(x: torch.Tensor, weight: torch.Tensor, c: Convolution) -> torch.Tensor:
    return depthwise_conv2d(
        x,
        weight,
        c.epilogue.bias,
        stride=c.window.stride,
        padding=c.window.padding,
        dilation=c.window.dilation,
        activation=c.epilogue.activation,
        scale_x=c.epilogue.scale_x,
        scale_w=c.epilogue.scale_w,
        zero_point=c.zero_point,
        out_dtype=c.epilogue.out_dtype,
        out_scale=c.epilogue.out_scale,
        out_zero_point=c.epilogue.out_zero_point,
    )


def _float_product(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> torch.Tensor:
    # a GPU multiplies halves, which rounds once more where something follows
    dtype = x.dtype if x.is_cuda else torch.float32
    bias = None if e.bias is None else e.bias.to(dtype)
    return e.after_bias(functional.linear(x.to(dtype), w.to(dtype), bias).float())


def _code_product(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> torch.Tensor:
    return int8_gemm(
        x,
        w,
        e.scale_x,
        e.scale_w,
        bias=e.bias,
        activation=e.activation,
        residual=e.residual,
        residual_scale=e.residual_scale,
        residual_zero_point=e.residual_zero_point,
        out_dtype=e.out_dtype,
        out_scale=e.out_scale,
        out_zero_point=e.out_zero_point,
    )

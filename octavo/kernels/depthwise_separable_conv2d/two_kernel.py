"""The two halves as operators of their own: what CPUs run, and a candidate on a GPU.

Many output channels make one kernel compute the depthwise half again for each block of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo.kernels.common.epilogue import Epilogue
from octavo.kernels.depthwise_conv2d import schema as depthwise
from octavo.kernels.depthwise_separable_conv2d.reference import Separable
from octavo.kernels.int8_gemm import schema as gemm

__all__ = ["depthwise_separable_conv2d"]


def depthwise_separable_conv2d(
    x: torch.Tensor, dw_weight: torch.Tensor, pw_weight: torch.Tensor, s: Separable
) -> torch.Tensor:
    """See `schema.depthwise_separable_conv2d`."""
    middle = depthwise.OPERATOR(x, dw_weight, s.depthwise).permute(0, 2, 3, 1)
    product = _float_product if x.is_floating_point() else gemm.OPERATOR
    result: torch.Tensor = product(middle, pw_weight, s.pointwise)
    return result.permute(0, 3, 1, 2)


def _float_product(x: torch.Tensor, w: torch.Tensor, e: Epilogue) -> torch.Tensor:
    # a GPU multiplies halves, which rounds once more where something follows
    dtype = x.dtype if x.is_cuda else torch.float32
    bias = None if e.bias is None else e.bias.to(dtype)
    return e.after_bias(functional.linear(x.to(dtype), w.to(dtype), bias).float())

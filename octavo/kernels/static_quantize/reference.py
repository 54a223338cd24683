"""The oracle: plain torch, bit for bit what the kernel computes; also the path of CPUs."""

from __future__ import annotations

import math

import torch

from octavo.kernels.common.codes import QMAX, QMIN, to_int8

__all__ = ["static_quantize"]


def static_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int) -> torch.Tensor:
    """See `schema.static_quantize`."""
    if torch.compiler.is_compiling():
        return to_int8(x.detach().float(), scale, zero_point)
    ratio = x.detach().float() / scale
    # NaN does not survive the conversion in a defined way; all of it in place, which is faster
    ratio = ratio.round_().nan_to_num_(nan=-math.inf)
    if zero_point:
        ratio.add_(zero_point)
    return ratio.clamp_(QMIN, QMAX).to(torch.int8).contiguous()

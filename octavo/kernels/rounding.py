"""Reals to int8 codes, as every kernel's reference does it."""

from __future__ import annotations

import torch

__all__ = ["scale_of_peak", "to_int8"]

QMIN, QMAX = -128, 127


def scale_of_peak(peak: torch.Tensor) -> torch.Tensor:
    """float32 scale under which `peak` is the largest code; 1/127 for a peak of zero."""
    # a tensor, not a number: by a number CUDA multiplies with the reciprocal, which is not exact
    return torch.where(peak == 0, 1.0, peak) / torch.full_like(peak, QMAX)


def to_int8(x: torch.Tensor, scale: torch.Tensor, zero_point: int = 0) -> torch.Tensor:
    """saturate(round_half_even(x / scale) + zero_point); NaN gives the smallest code."""
    ratio = torch.round(x / scale)
    if zero_point:
        ratio = ratio + zero_point
    # of the ways to replace NaN, the one that Inductor vectorizes
    return torch.where(ratio == ratio, ratio, QMIN).clamp(QMIN, QMAX).to(torch.int8)

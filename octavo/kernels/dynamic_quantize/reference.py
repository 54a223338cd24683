"""The oracle: plain torch, bit for bit what the kernel computes."""

from __future__ import annotations

import torch

from octavo.kernels.rounding import scale_of_peak, to_int8

__all__ = ["dynamic_quantize"]


def dynamic_quantize(
    x: torch.Tensor, smooth: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `schema.dynamic_quantize`."""
    values = x.detach().float()
    if smooth is not None:
        values = values / smooth.detach().float()
    if values.numel() == 0:
        peak = values.new_zeros(values.shape[:-1] if per_token else ())
    else:
        peak = values.abs().amax(-1) if per_token else values.abs().amax()
    scale = scale_of_peak(peak)
    codes = to_int8(values, scale.unsqueeze(-1) if per_token else scale)
    return codes.contiguous(), scale.contiguous()

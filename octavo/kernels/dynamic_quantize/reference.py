"""The oracle: plain torch, bit for bit what the kernel computes."""

from __future__ import annotations

import torch

__all__ = ["QMAX", "dynamic_quantize"]

QMAX = 127


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
    # a tensor, not a number: by a number CUDA multiplies with the reciprocal, which is not exact
    scale = torch.where(peak == 0, 1.0, peak) / torch.full_like(peak, QMAX)
    codes = torch.round(values / (scale.unsqueeze(-1) if per_token else scale))
    codes = codes.nan_to_num(nan=-QMAX - 1).clamp(-QMAX - 1, QMAX).to(torch.int8)
    return codes.contiguous(), scale.contiguous()

"""The oracle: torch's sum and layer_norm, and `dynamic_quantize`'s own reference."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional

from octavo.kernels.dynamic_quantize.reference import dynamic_quantize

__all__ = ["Norm", "Result", "add_norm"]

Result: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Norm(NamedTuple):
    """(z - mean(z)) / sqrt(var(z) + eps) * weight + bias over the last axis (arXiv 1607.06450).

    Attributes:
        weight: floating [N], or None for 1.
        bias: floating [N], or None for 0.
        eps: added to the variance, which is the biased one.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


def add_norm(x: torch.Tensor, residual: torch.Tensor, norm: Norm, quantize: bool) -> Result:
    """See `schema.add_norm`."""
    y = functional.layer_norm(x + residual, x.shape[-1:], *norm)
    if quantize:
        return y, *dynamic_quantize(y, None, per_token=True)
    return y, x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)

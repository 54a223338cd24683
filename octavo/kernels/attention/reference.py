"""Torch's scaled_dot_product_attention, with a result that is laid out as that of the C."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

__all__ = ["attention", "room", "sdpa"]


def attention(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    """See `schema.attention`."""
    y = sdpa(q, *rest)
    return y if y.transpose(1, 2).is_contiguous() else room(q).copy_(y)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """The same in any layout, with a gradient."""
    shared = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


def room(q: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] without values, laid out as [B, T, H, D]."""
    batch, heads, queries, size = q.shape
    return q.new_empty(batch, queries, heads, size).transpose(1, 2)

"""The attention of transformers' models between INT8 projections, in C where it can run.

Models of transformers look up the function that attends by the name in their configuration. The
one called "sdpa" is wrapped: for modules that are marked it takes ours, for all others and for all
that ours cannot do it is the one that was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from octavo.layers import attention_native

__all__ = ["MARK", "wrap_sdpa"]

MARK = "octavo_attention"
"""Attribute of a module whose calls may be ours."""
READ = ("cache", "output_attentions", "position_bias", "softcap")
"""Arguments that change what transformers' function does."""
_Result = tuple[torch.Tensor, torch.Tensor | None]


def wrap_sdpa() -> None:
    """Puts the wrapper in its place, once a process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    there = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not hasattr(there, MARK):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _wrapped(there)


def _wrapped(original: Callable[..., _Result]) -> Callable[..., _Result]:
    def sdpa(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> _Result:
        mask = attention_mask
        plain = not dropout and all(kwargs.get(n) is None or kwargs[n] is False for n in READ)
        if plain and getattr(module, MARK, False):
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            causal = bool(causal) and mask is None
            aligned = not causal or query.shape[2] == key.shape[2]
            if aligned and not attention_native.why_not(query, key, value, mask):
                out = attention_native.attention(
                    query, key, value, mask, scale=scaling, causal=causal
                )
                return out.transpose(1, 2), None
        return original(
            module, query, key, value, mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip

    setattr(sdpa, MARK, True)
    return sdpa

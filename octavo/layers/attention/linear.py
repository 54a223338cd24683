"""Linear attention that is called as the softmax attention is whose place it takes.

Each class holds one `LinearAttention` and reads the arguments of another attention's `forward`.
What linear attention cannot do with them is refused when it is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError, UnsupportedError
from octavo.layers.attention.efficient import LinearAttention
from octavo.layers.attention.masks import causal_or_full, kept, key_padding

__all__ = ["LinearMultiheadAttention", "LinearSelfAttention"]


class LinearMultiheadAttention(nn.Module):
    """Takes what nn.MultiheadAttention takes, where queries, keys and values are one tensor.

    Whether a call is causal is read from its masks, as nn.MultiheadAttention does; a causal
    `attention` is so in every call. There are no weights [T, T], so None is returned for them.

    Args:
        attention: what attends.
        batch_first: whether x is [B, T, C], and not [T, B, C].
    """

    in_proj_bias = None
    """Tells torch's transformer layers to call this module, and not their fused kernel."""
    _qkv_same_embed_dim = False

    def __init__(self, attention: LinearAttention, *, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.batch_first = attention, batch_first
        self.embed_dim, self.num_heads = attention.dim, attention.num_heads
        self.head_dim = attention.head_dim

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002 - there are none
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """See nn.MultiheadAttention.

        Raises:
            UnsupportedError: cross attention, or nested tensors.
            InputError: a mask that linear attention cannot take.
        """
        x, padding, causal = self.read(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        out = self.attention(x, padding, causal=causal)
        if query.ndim == 2:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,  # noqa: ARG002
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """The arguments of `forward` as x [B, T, C], keys to attend to [B, T], and causality."""
        if not (query is key and key is value):
            raise UnsupportedError(
                "its queries, keys and values are different tensors; only self-attention becomes "
                "linear, so leave this attention out with exclude="
            )
        x = query
        if x.is_nested:
            raise UnsupportedError(
                "linear attention takes no nested tensors; give padded ones and a key_padding_mask"
            )
        padding = None if key_padding_mask is None else kept(key_padding_mask, true_hides=True)
        if x.ndim == 2:
            x, padding = x.unsqueeze(0), None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        causal = self.attention.causal or is_causal
        if attn_mask is not None and not is_causal:
            tokens = x.shape[1]
            if attn_mask.shape != (tokens, tokens):
                raise InputError(
                    f"attn_mask has shape {list(attn_mask.shape)}; linear attention takes the "
                    f"causal mask [{tokens}, {tokens}] only, and a key_padding_mask"
                )
            causal = causal_or_full(kept(attn_mask, true_hides=True), causal=causal)
        return x, padding, causal


class LinearSelfAttention(nn.Module):
    """Takes what the self-attention modules of transformers (version 5) take.

    Args:
        attention: what attends. Its `proj` is nn.Identity where the model has the output
            projection in another module.
    """

    PASSED_BY = (
        "encoder_attention_mask",
        "encoder_hidden_states",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
    )
    """What a model's other layers read, and self-attention does not."""

    def __init__(self, attention: LinearAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attends.

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, T], or [B, H or 1, T or 1, T] as `kept` takes it.
            kwargs: whatever the model hands down.

        Returns:
            [B, T, C], and None for the weights, which linear attention has not.

        Raises:
            UnsupportedError: a mask, cache or output that linear attention has not.
            InputError: a mask that linear attention cannot take.
        """
        x, padding, causal = self.read(hidden_states, attention_mask, **kwargs)
        return self.attention(x, padding, causal=causal), None

    def read(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """The arguments of `forward` as x [B, T, C], keys to attend to [B, T], and causality."""
        causal = self.attention.causal or bool(kwargs.pop("is_causal", False))
        for name, value in kwargs.items():
            if name not in self.PASSED_BY and value is not None and value is not False:
                raise UnsupportedError(_reason(name))
        if attention_mask is None:
            return hidden_states, None, causal
        if not isinstance(attention_mask, torch.Tensor):
            raise UnsupportedError(
                f"the attention mask is a {type(attention_mask).__name__}; load the model with "
                'attn_implementation="sdpa" before it is converted'
            )
        keep, tokens = kept(attention_mask), hidden_states.shape[1]
        if keep.shape == hidden_states.shape[:2]:
            return hidden_states, keep, causal
        if keep.ndim != 4 or keep.shape[2] not in (1, tokens) or keep.shape[3] != tokens:
            raise InputError(
                f"the attention mask has shape {list(keep.shape)}; linear attention takes "
                f"[B, {tokens}] or [B, 1, {tokens}, {tokens}], without keys of earlier calls"
            )
        padding = key_padding(keep, causal=causal)
        return hidden_states, padding.expand(len(hidden_states), -1), causal


def _reason(argument: str) -> str:
    if argument == "output_attentions":
        return "linear attention has no weights to return; call without output_attentions"
    if argument == "past_key_values":
        return (
            "linear attention keeps a state and no cache of keys; call the model with "
            "use_cache=False, or decode with the prefill and step of its LinearAttention"
        )
    return f"linear attention has no argument {argument!r}; call the model without it"

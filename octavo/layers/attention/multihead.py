"""nn.MultiheadAttention taken apart, so that its projections are layers that can be swapped."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from octavo.core.errors import InputError
from octavo.kernels.attention.schema import attention

__all__ = ["MultiheadAttention", "RowsLinear", "decompose_reason"]


class RowsLinear(nn.Linear):
    """nn.Linear that can compute some of its output channels only."""

    def forward(self, input: torch.Tensor, rows: slice | None = None) -> torch.Tensor:  # noqa: A002
        """[..., K] to [..., N], or to the output channels in `rows`."""
        if rows is None:
            return functional.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[rows]
        return functional.linear(input, self.weight[rows], bias)


def decompose_reason(module: nn.MultiheadAttention) -> str:
    """Why an attention has to stay as it is, or nothing."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} may compute something else than nn.MultiheadAttention"
    if module._parameters.get("in_proj_weight") is None:
        return "its keys or values have other sizes than its queries (kdim, vdim)"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    return ""


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention over two layers, `in_proj` [3E, E] and `out_proj` [E, E].

    Queries, keys and values are one product where they come from the same tensor. Shares its
    parameters with the module it is made from. Takes and gives what nn.MultiheadAttention does,
    but for nested tensors.

    Args:
        module: one for which `decompose_reason` says nothing.
    """

    in_proj_bias = None
    """Tells torch's transformer layers to call this module, and not their fused kernel."""
    _qkv_same_embed_dim = False

    operators = ("attention",)

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = module.embed_dim, module.num_heads
        self.head_dim, self.dropout = module.head_dim, module.dropout
        self.batch_first = module.batch_first
        self.in_proj: nn.Module = _rows_linear(module.in_proj_weight, module.in_proj_bias)
        self.out_proj: nn.Module = _rows_linear(module.out_proj.weight, module.out_proj.bias)
        self.train(module.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See nn.MultiheadAttention."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise InputError(
                "this attention takes no nested tensors; give padded ones and a key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask; give the mask too")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            same = key is value, query is key
            query = query.transpose(0, 1)
            key = query if same[1] else key.transpose(0, 1)
            value = key if same[0] else value.transpose(0, 1)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        elif dropout:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        else:
            out = attention(q, k, v, mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [B, T, E] each."""
        e = self.embed_dim
        if query is key and key is value:
            return torch.split(self.in_proj(query), e, -1)
        q = self.in_proj(query, slice(0, e))
        if key is value:
            return (q, *torch.split(self.in_proj(key, slice(e, 3 * e)), e, -1))
        return q, self.in_proj(key, slice(e, 2 * e)), self.in_proj(value, slice(2 * e, 3 * e))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, E] to [B, heads, T, E / heads]."""
        return torch.unflatten(x, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self,
        attn_mask: torch.Tensor | None,
        padding: torch.Tensor | None,
        q: torch.Tensor,
        keys: int,
    ) -> torch.Tensor | None:
        """What is added to the scores, [B or 1, heads or 1, T, S]; None for nothing."""
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.ndim == 3:
            mask = torch.unflatten(mask, 0, (-1, self.num_heads))
        if padding is None:
            return mask
        added = _additive(padding, q.dtype)
        if added is None or tuple(added.shape) != (len(q), keys):
            raise InputError(
                f"key_padding_mask has shape {list(padding.shape)}; it must be [{len(q)}, {keys}]"
            )
        added = added[:, None, None, :]
        return added if mask is None else mask + added

    def extra_repr(self) -> str:
        """Sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _rows_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> RowsLinear:
    linear = RowsLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment] # they are parameters
    return linear


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as numbers to add; in a boolean one, True hides a key."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention whose weights [B, heads, T, S] are wanted too."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = functional.dropout(weights, dropout)
    return weights @ v, weights

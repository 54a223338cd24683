"""Multi-head self-attention: over softmax, and over a feature map in time linear in the length."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from octavo.core.errors import InputError, UnsupportedError
from octavo.kernels.linear_attention.reference import FEATURE_MAPS, State
from octavo.kernels.linear_attention.schema import linear_attention, linear_attention_step

__all__ = ["EfficientAttention", "LinearAttention"]


class _SelfAttention(nn.Module):
    """The projections of a multi-head self-attention, and how heads are cut from them.

    Attributes:
        qkv: [..., C] to [..., 3C]: queries, keys and values in this order, the heads of each side
            by side.
        proj: [..., C] to [..., C].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise InputError(
                f"dim {dim} is not a multiple of num_heads {num_heads}; each head takes "
                "dim / num_heads channels"
            )
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, qkv_bias, device=device, dtype=dtype)
        self.proj: nn.Module = nn.Linear(dim, dim, device=device, dtype=dtype)

    def _heads(self, x: torch.Tensor, shape: str) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, [..., H, C / H] each."""
        if x.ndim != len(shape.split(",")) or x.shape[-1] != self.dim:
            raise InputError(
                f"x has shape {list(x.shape)}; this attention takes [{shape}] with C = {self.dim}"
            )
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.num_heads, self.head_dim))
        return qkv.unbind(-3)


class EfficientAttention(_SelfAttention):
    """Multi-head self-attention, softmax(q k^T / sqrt(D)) v, by torch's fused kernels.

    Args:
        dim: C, the channels of the input and of the output.
        num_heads: H; must divide dim.
        qkv_bias: whether `qkv` has a bias; `proj` always has one.
        attn_drop: probability with which a weight is dropped, in training only.
        causal: whether a token attends to itself and those before it only.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: sizes that do not fit, or a probability outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, device, dtype)
        if not 0 <= attn_drop < 1:
            raise InputError(f"attn_drop is {attn_drop}; give a probability from 0 to below 1")
        self.attn_drop, self.causal = attn_drop, causal

    def forward(
        self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attends.

        Args:
            x: [B, T, C].
            key_padding_mask: bool [B, T], True for the keys to attend to; None for all. A token
                that may attend to none gets what torch's kernel gives it.

        Returns:
            [B, T, C].

        Raises:
            InputError: x or the mask has another shape or dtype.
        """
        q, k, v = (each.transpose(1, 2) for each in self._heads(x, "B, T, C"))
        mask = self._mask(x, key_padding_mask)
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=self.causal and mask is None,
        )
        attended: torch.Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return attended

    def _mask(self, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor | None:
        """True for what a query may attend to, [B, 1, T or 1, T]; None without padding."""
        if padding is None:
            return None
        if padding.dtype != torch.bool or padding.shape != x.shape[:2]:
            raise InputError(
                f"key_padding_mask is {padding.dtype} {list(padding.shape)}; it must be torch.bool "
                f"{list(x.shape[:2])}, True for the keys to attend to"
            )
        mask = padding[:, None, None, :]
        if not self.causal:
            return mask
        return mask & torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=x.device).tril()

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}"
            f", attn_drop={self.attn_drop}"
        )


class LinearAttention(_SelfAttention):
    """Multi-head self-attention whose time and memory grow with the length, not with its square.

    phi(q) (phi(k)^T v) / (phi(q) sum phi(k)) with phi(x) = elu(x) + 1 (arXiv 2006.16236); the
    sums are over all keys, or over those up to the query's where it is causal. Nothing else is
    scaled. A causal one decodes token by token on a state of constant size: `prefill`, then
    `step`.

    Args:
        dim: C, the channels of the input and of the output.
        num_heads: H; must divide dim.
        causal: whether a token attends to itself and those before it only.
        qkv_bias: whether `qkv` has a bias; `proj` always has one.
        feature_map: phi, as in `octavo.kernels.linear_attention`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: sizes that do not fit, or a feature map that is not known.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        qkv_bias: bool = False,
        *,
        feature_map: str = "elu+1",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, device, dtype)
        if feature_map not in FEATURE_MAPS:
            raise InputError(
                f"feature_map {feature_map!r} is unknown; use one of {', '.join(FEATURE_MAPS)}"
            )
        self.causal, self.feature_map = causal, feature_map

    def forward(
        self,
        x: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        *,
        causal: bool | None = None,
    ) -> torch.Tensor:
        """Attends.

        Args:
            x: [B, T, C].
            key_padding_mask: bool [B, T], True for the keys to attend to; None for all.
            causal: for this call; None for what the layer is.

        Returns:
            [B, T, C].

        Raises:
            InputError: x or the mask has another shape or dtype.
        """
        q, k, v = self._heads(x, "B, T, C")
        out: Any = linear_attention(
            q,
            k,
            v,
            feature_map=self.feature_map,
            causal=self.causal if causal is None else causal,
            key_padding_mask=key_padding_mask,
        )
        return self._out(out)

    def prefill(
        self, x: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """Attends, and keeps what later tokens need of these.

        Args:
            x: [B, T, C].
            key_padding_mask: as in `forward`.

        Returns:
            [B, T, C], and the state after the last token.

        Raises:
            UnsupportedError: the layer is not causal.
            InputError: x or the mask has another shape or dtype.
        """
        self._check_causal("prefill")
        q, k, v = self._heads(x, "B, T, C")
        found: Any = linear_attention(
            q,
            k,
            v,
            feature_map=self.feature_map,
            causal=True,
            key_padding_mask=key_padding_mask,
            return_state=True,
        )
        out, state = found
        return self._out(out), state

    def step(self, x_t: torch.Tensor, state: State) -> torch.Tensor:
        """Attends with one more token a sequence; the state takes it in, in place.

        Args:
            x_t: [B, C].
            state: from `prefill`, or of the last step.

        Returns:
            [B, C].

        Raises:
            UnsupportedError: the layer is not causal.
            InputError: x_t or the state has another shape or dtype.
        """
        self._check_causal("step")
        q, k, v = self._heads(x_t, "B, C")
        return self._out(linear_attention_step(q, k, v, state, feature_map=self.feature_map))

    def _out(self, heads: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(heads.flatten(-2))
        return out

    def _check_causal(self, method: str) -> None:
        if not self.causal:
            raise UnsupportedError(
                f"{method} decodes token by token, and this attention is not causal: its first "
                "token attends to the last; make it with causal=True"
            )

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}"
            f", feature_map={self.feature_map}"
        )

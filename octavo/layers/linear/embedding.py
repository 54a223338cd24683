"""nn.Embedding and nn.EmbeddingBag with tables of 8 bits and fewer.

In 8 bits a value takes a byte, and a row 4 more for its scale; in 4 bits with groups of 32 a value
takes half a byte, and a group 5 more. Only the rows that are looked up become floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from octavo.core.errors import InputError
from octavo.layers.linear.weight_only import NarrowWeight
from octavo.layers.module import module_options
from octavo.quant.weights import QuantizedWeight

__all__ = ["WeightOnlyEmbedding", "WeightOnlyEmbeddingBag"]


class WeightOnlyEmbedding(NarrowWeight):
    """`torch.nn.Embedding` for inference, with a table of 2 to 8 bits.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        bits: of a value: 8, 4, 3 or 2.
        group_size: neighbours along D that share a scale; None for one scale per row.
        symmetric: whether there are no zero points.
        padding_idx: as in `torch.nn.Embedding`: only training, and bags, look at it.
        device: of the buffers.
        dtype: of the result.

    Attributes:
        values: int8 [V, D] for 8 bits, else uint8 [V, ceil(D * bits / 8)] as `octavo.quant.pack`
            lays it out.
        weight_scale: float32 [V] or [V, D / group_size].
        zero_point: uint8 of that shape, or None.
        floats: [0], of the dtype of the result.
    """

    values: torch.Tensor
    floats: torch.Tensor
    record = ("values", "weight_scale", "zero_point")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.padding_idx = padding_idx
        self._hold(num_embeddings, embedding_dim, device)
        self.register_buffer("floats", torch.empty(0, dtype=dtype, device=device))

    @classmethod
    def from_float(
        cls,
        table: nn.Embedding | nn.EmbeddingBag,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> Any:
        """Quantizes the table of a float layer, which is not changed.

        Args:
            table: a layer with a weight [V, D] of any float dtype.
            bits: of a value.
            group_size: neighbours along D that share a scale; None for one scale per row.
            symmetric: without zero points; 4 bits and fewer gain from having them.

        Raises:
            InputError: a weight that is not finite, a group size that does not divide D, or a
                layer with max_norm.
        """
        if table.max_norm is not None:
            raise InputError("max_norm changes rows when they are read; leave the layer in float")
        layer = cls(
            **module_options(cls, table),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            device=table.weight.device,
            dtype=table.weight.dtype,
        )
        layer.set_weight(table.weight)
        return layer.train(table.training)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in floats [V, D], made anew each time: for code that reads it itself."""
        return self._rows(None)

    def _rows(self, index: torch.Tensor | None) -> torch.Tensor:
        """Rows in floats [n, D]: those of `index` int [n], or all."""
        found = self.quantized
        if index is not None:
            rows = (None if one is None else one.index_select(0, index) for one in found[:3])
            found = QuantizedWeight._make((*rows, *found[3:]))
        return found.unpacked(self.embedding_dim).dequantize().to(self.floats.dtype)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Indices int [...] to rows [..., D] in the dtype of the float table."""
        return self._rows(index.reshape(-1)).reshape(*index.shape, self.embedding_dim)


class WeightOnlyEmbeddingBag(WeightOnlyEmbedding):
    """`torch.nn.EmbeddingBag` for inference, with a table of 2 to 8 bits.

    Args:
        num_embeddings: V; this and what follows up to `padding_idx`, which bags leave out, as in
            `WeightOnlyEmbedding`.
        embedding_dim: D.
        mode: "sum", "mean" or "max".
        include_last_offset: whether the last offset is the end of the last bag.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        padding_idx: int | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
        if mode not in ("sum", "mean", "max"):
            raise InputError(f"mode is {mode!r}; use sum, mean or max")
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self,
        index: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One row for each bag, as `torch.nn.EmbeddingBag` makes it.

        Args:
            index: int [B, L], one bag per row; or [n], with the start of each bag in `offsets`.
            offsets: int [B]; with `include_last_offset` [B + 1].
            per_sample_weights: of the shape of `index`, for the mode "sum".

        Returns:
            [B, D] in the dtype of the float table.
        """
        flat = index.reshape(-1)
        count = len(flat)
        places = torch.arange(count, device=flat.device, dtype=flat.dtype)
        # one row more: what bags leave out, and a row where there would be none
        rows = functional.pad(self._rows(flat), (0, 0, 0, 1))
        if self.padding_idx is not None:
            places = places.masked_fill(flat == self.padding_idx, count)
        return functional.embedding_bag(
            places.reshape(index.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=None if self.padding_idx is None else count,
        )

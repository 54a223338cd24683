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
from octavo.layers.module import QuantizedModule
from octavo.quant.groups import quantize_groups
from octavo.quant.weights import QuantizedWeight

__all__ = ["WeightOnlyEmbedding", "WeightOnlyEmbeddingBag"]


class WeightOnlyEmbedding(QuantizedModule):
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
    weight_scale: torch.Tensor
    zero_point: torch.Tensor | None
    floats: torch.Tensor
    float32 = ("weight_scale",)
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
        if bits not in (2, 3, 4, 8):
            raise InputError(f"bits is {bits}; use 8, 4, 3 or 2")
        if group_size is not None and (group_size < 1 or embedding_dim % group_size):
            raise InputError(
                f"group_size {group_size} does not divide embedding_dim {embedding_dim}; choose a "
                "divisor, or None for one scale per row"
            )
        if bits == 8 and not symmetric:
            raise InputError("8-bit tables are symmetric; leave symmetric=True")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.padding_idx = padding_idx
        v, octets = num_embeddings, -(-embedding_dim * bits // 8)
        groups = (v,) if group_size is None else (v, embedding_dim // group_size)
        kind = torch.int8 if bits == 8 else torch.uint8
        points = None if symmetric else torch.zeros(groups, dtype=torch.uint8, device=device)
        self.register_buffer("values", torch.zeros((v, octets), dtype=kind, device=device))
        self.register_buffer("weight_scale", torch.ones(groups, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", points)
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
            table.num_embeddings,
            table.embedding_dim,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            device=table.weight.device,
            dtype=table.weight.dtype,
            **cls._settings(table),
        )
        packed = quantize_groups(table.weight, bits, group_size, symmetric).packed()
        layer.values.copy_(packed.values)
        layer.weight_scale.copy_(packed.scale)
        if layer.zero_point is not None and packed.zero_point is not None:
            layer.zero_point.copy_(packed.zero_point)
        return layer.train(table.training)

    @staticmethod
    def _settings(table: Any) -> dict[str, Any]:
        """What else a layer has in common with the float one."""
        return {"padding_idx": table.padding_idx}

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in floats [V, D], made anew each time: for code that reads it itself."""
        return self._rows(None)

    def _rows(self, index: torch.Tensor | None) -> torch.Tensor:
        """Rows in floats [n, D]: those of `index` int [n], or all."""
        values, scale, points = self.values, self.weight_scale, self.zero_point
        if index is not None:
            values, scale = values.index_select(0, index), scale.index_select(0, index)
            points = None if points is None else points.index_select(0, index)
        axis = 0 if self.group_size is None else None
        found = QuantizedWeight(values, scale, points, None, self.bits, axis, self.group_size)
        return found.unpacked(self.embedding_dim).dequantize().to(self.floats.dtype)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Indices int [...] to rows [..., D] in the dtype of the float table."""
        return self._rows(index.reshape(-1)).reshape(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes, and how the table is quantized."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, "
            f"group_size={self.group_size}"
            + ("" if self.symmetric else ", asymmetric")
            + ("" if self.padding_idx is None else f", padding_idx={self.padding_idx}")
        )


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

    @staticmethod
    def _settings(table: Any) -> dict[str, Any]:
        names = ("padding_idx", "mode", "include_last_offset")
        return {name: getattr(table, name) for name in names}

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

    def extra_repr(self) -> str:
        """As of an embedding, and what a bag is."""
        return f"{super().extra_repr()}, mode={self.mode}"

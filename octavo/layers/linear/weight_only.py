"""nn.Linear with narrow weights and float activations, for layers bound by reading weights."""

from __future__ import annotations

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels.weight_only_gemm.schema import weight_only_gemm
from octavo.layers.linear.int8 import compute_dtype, rows_of
from octavo.layers.module import QuantizedModule
from octavo.quant.groups import quantize_groups
from octavo.quant.weights import QuantizedWeight

__all__ = ["NarrowWeight", "WeightOnlyLinear"]


class NarrowWeight(QuantizedModule):
    """A module with a weight [N, K] of 2 to 8 bits.

    Attributes:
        bits: of a value: 8, 4, 3 or 2.
        group_size: neighbours along K that share a scale; None for one scale per row.
        symmetric: whether there are no zero points.
        weight_scale: float32 [N] or [N, K / group_size].
        zero_point: uint8 of that shape, or None.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    weight_scale: torch.Tensor
    zero_point: torch.Tensor | None
    float32 = ("weight_scale",)

    def _hold(self, n: int, k: int, device: torch.device | str | None) -> None:
        """Makes the buffers, of which the first is int8 [N, K], or packed uint8 [N, octets].

        Raises:
            InputError: numbers that do not go together.
        """
        bits, size = self.bits, self.group_size
        if bits not in (2, 3, 4, 8):
            raise InputError(f"bits is {bits}; use 8, 4, 3 or 2")
        if size is not None and (size < 1 or k % size):
            raise InputError(
                f"group_size {size} does not divide the {k} values of a row; choose a divisor, or "
                "None for one scale per row"
            )
        if bits == 8 and not self.symmetric:
            raise InputError("8-bit weights are symmetric; leave symmetric=True")
        groups = (n,) if size is None else (n, k // size)
        kind = torch.int8 if bits == 8 else torch.uint8
        values = torch.zeros((n, -(-k * bits // 8)), dtype=kind, device=device)
        points = None if self.symmetric else torch.zeros(groups, dtype=torch.uint8, device=device)
        tensors = (values, torch.ones(groups, dtype=torch.float32, device=device), points)
        for name, tensor in zip(self.record, tensors, strict=True):
            self.register_buffer(name, tensor)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, its values packed, with the bias where the module has one."""
        values, scale, points = (self._buffers[name] for name in self.record)
        axis = 0 if self.group_size is None else None
        return QuantizedWeight(
            values,  # type: ignore[arg-type]
            scale,  # type: ignore[arg-type]
            points,
            self._buffers.get("bias"),
            self.bits,
            axis,
            self.group_size,
        )

    def set_weight(self, weight: torch.Tensor | QuantizedWeight) -> None:
        """Takes a weight, its values not packed: floating [N, K], which is rounded, or quantized.

        Raises:
            InputError: values that are not finite.
        """
        if isinstance(weight, torch.Tensor):
            weight = quantize_groups(weight, self.bits, self.group_size, self.symmetric)
        for mine, given in zip(self.quantized[:3], weight.packed()[:3], strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)


class WeightOnlyLinear(NarrowWeight):
    """y = activation(x @ W.T + b), with W in 2 to 8 bits and everything else in float.

    Args:
        in_features: K.
        out_features: N.
        bits: of a weight: 8, 4, 3 or 2.
        group_size: neighbours along K that share a scale; None for one scale per output channel.
        symmetric: whether there are no zero points.
        bias: whether there is one.
        activation: what follows, as in `octavo.kernels.int8_gemm`.
        device: of the buffers.
        dtype: of the bias.

    Attributes:
        weight: int8 [N, K] for 8 bits, else uint8 [N, ceil(K * bits / 8)] as `octavo.quant.pack`
            lays it out.
        weight_scale: float32 [N] or [N, K / group_size].
        zero_point: uint8 of that shape, or None.
        bias: [N], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.activation = activation
        self._hold(out_features, in_features, device)
        added = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", added)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        activation: str = "none",
        quantized: QuantizedWeight | None = None,
    ) -> WeightOnlyLinear:
        """Quantizes the weights of a float layer, which is not changed.

        Args:
            linear: weight [N, K] and bias [N] of any float dtype.
            bits: of a weight.
            group_size: neighbours along K that share a scale; None for one scale per channel.
            symmetric: without zero points; 4 bits and fewer gain from having them.
            activation: what follows the layer.
            quantized: the weight as it was quantized elsewhere, such as by GPTQ, with these bits
                and groups; by default each weight is rounded to the nearest value, under scales of
                the least squared error.

        Raises:
            InputError: weights that are not finite, or a group size that does not divide K.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            bias=linear.bias is not None,
            activation=activation,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.set_weight(linear.weight if quantized is None else quantized)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of x; `rows` computes those output channels only."""
        weight = self.quantized
        if rows is not None:
            weight = rows_of(weight, rows)
        return weight_only_gemm(
            x.to(compute_dtype(x)),
            weight.values,
            weight.scale,
            weight.zero_point,
            bits=self.bits,
            group_size=self.group_size,
            bias=weight.bias,
            activation=self.activation,
        )

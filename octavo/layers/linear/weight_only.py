"""nn.Linear with narrow weights and float activations, for layers bound by reading weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError
from octavo.kernels.weight_only_gemm.schema import weight_only_gemm
from octavo.layers.linear.int8 import compute_dtype, rows_of
from octavo.layers.module import QuantizedModule
from octavo.quant.groups import quantize_groups
from octavo.quant.weights import QuantizedWeight

__all__ = ["WeightOnlyLinear"]


class WeightOnlyLinear(QuantizedModule):
    """y = activation(x @ W.T + b), with W in 2 to 8 bits and everything else in float.

    Args:
        in_features: K.
        out_features: N.
        bits: of a weight: 8, 4, 3 or 2.
        group_size: neighbours along K that share a scale; None for one scale an output channel.
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
    weight_scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None
    float32 = ("weight_scale",)

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
        if bits not in (2, 3, 4, 8):
            raise InputError(f"bits is {bits}; use 8, 4, 3 or 2")
        if group_size is not None and (group_size < 1 or in_features % group_size):
            raise InputError(
                f"group_size {group_size} does not divide in_features {in_features}; choose a "
                "divisor, or None for a scale a channel"
            )
        if bits == 8 and not symmetric:
            raise InputError("8-bit weights are symmetric; leave symmetric=True")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.activation = activation
        n, octets = out_features, -(-in_features * bits // 8)
        groups = (n,) if group_size is None else (n, in_features // group_size)
        code = torch.int8 if bits == 8 else torch.uint8
        points = None if symmetric else torch.zeros(groups, dtype=torch.uint8, device=device)
        self.register_buffer("weight", torch.zeros((n, octets), dtype=code, device=device))
        self.register_buffer("weight_scale", torch.ones(groups, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", points)
        self.register_buffer("bias", torch.zeros(n, dtype=dtype, device=device) if bias else None)

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
            group_size: neighbours along K that share a scale; None for a scale a channel.
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
        if quantized is None:
            quantized = quantize_groups(linear.weight, bits, group_size, symmetric)
        packed = quantized.packed()
        layer.weight.copy_(packed.values)
        layer.weight_scale.copy_(packed.scale)
        if layer.zero_point is not None and packed.zero_point is not None:
            layer.zero_point.copy_(packed.zero_point)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of x; `rows` computes those output channels only."""
        weight = QuantizedWeight(
            self.weight,
            self.weight_scale,
            self.zero_point,
            self.bias,
            self.bits,
            0 if self.group_size is None else None,
            self.group_size,
        )
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

    def config(self) -> dict[str, Any]:
        """See `QuantizedModule`."""
        return {**super().config(), "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Sizes, and how weights are quantized."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}"
            + ("" if self.symmetric else ", asymmetric")
            + (f", activation={self.activation}" if self.activation != "none" else "")
        )

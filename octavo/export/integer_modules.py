"""What a quantized layer computes, as modules of PyTorch that have an engine's integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.quant import QParams, fake_quantize, quantize
from octavo.quant.requantize import (
    UNSIGNED,
    SumMultipliers,
    bias_on_grid,
    mean_multiplier,
    multiplier,
    requantize,
    signed,
)
from octavo.quant.weights import QuantizedWeight

__all__ = ["FakeQuantize", "IntegerAdd", "IntegerLayer", "IntegerMean"]


class IntegerLayer(nn.Module):
    """A convolution or Linear on codes, exact in float64, requantized once in float32.

    Args:
        operator: the aten operator of the float layer.
        arguments: its arguments after input, weight and bias.
        source: how the input is quantized.
        weight: int8 in the operator's layout, with one scale or [channels], and a bias: int32 in
            units of the sums where the engine adds it there, else float32.
        target: how the output will be quantized, or None.
        channel_axis: axis of the output that the weight's scales belong to.
    """

    def __init__(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        source: QParams,
        weight: QuantizedWeight,
        target: QParams | None,
        channel_axis: int,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.arguments = arguments
        self.source = source
        self.target = target
        self.channel_axis = channel_axis
        self.codes: torch.Tensor
        self.unit: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("codes", weight.values.double())
        self.register_buffer("unit", multiplier(source.scale, weight.scale))
        self.register_buffer("bias", weight.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out, as the float layer."""
        codes = (quantize(x, self.source).int() - self.source.zero_point).double()
        takes_bias = self.operator is not torch.ops.aten.matmul.default
        rest = (None, *self.arguments) if takes_bias else ()
        accumulator: torch.Tensor = self.operator(codes, self.codes, *rest)
        unit = self._along_channels(self.unit, accumulator)
        if self.bias is not None:
            bias = self.bias
            if bias.is_floating_point():
                bias = bias_on_grid(bias, self.unit)
            accumulator = accumulator + self._along_channels(bias, accumulator)
        if self.target is None:
            return accumulator.float() * unit
        scale = self.target.scale
        return requantize(accumulator, unit / scale) * scale

    def _along_channels(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if values.ndim == 0:
            return values
        shape = [1] * like.ndim
        shape[self.channel_axis] = -1
        return values.reshape(shape)


class IntegerAdd(nn.Module):
    """A residual addition on uint8 codes; see `SumMultipliers`.

    Args:
        left: how the first input is quantized.
        right: how the second one is.
        target: how the output will be.
    """

    def __init__(self, left: QParams, right: QParams, target: QParams) -> None:
        super().__init__()
        self.left, self.right, self.target = left, right, target
        self.sum = SumMultipliers.of(signed(left), signed(right), signed(target))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out."""
        a, b = (
            quantize(value, qparams).double() + (UNSIGNED if qparams.dtype.symmetric else 0)
            for value, qparams in ((x, self.left), (y, self.right))
        )
        return (torch.round(self.sum(a, b)) - self.sum.zero_point) * self.target.scale


class IntegerMean(nn.Module):
    """The mean of a picture's codes, rounded once; see `mean_multiplier`.

    Args:
        source: how the picture is quantized.
        target: how its mean will be.
    """

    def __init__(self, source: QParams, target: QParams) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 [n, c, h, w] in, float32 [n, c, 1, 1] out."""
        codes = quantize(x, self.source).int() - self.source.zero_point
        pixels = x.shape[-1] * x.shape[-2]
        by = mean_multiplier(self.source.scale, self.target.scale, pixels)
        return requantize(codes.sum((-2, -1), keepdim=True), by) * self.target.scale


class FakeQuantize(nn.Module):
    """A Q/DQ pair."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.qparams = qparams

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, what is left of it out."""
        return fake_quantize(x, self.qparams)

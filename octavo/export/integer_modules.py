"""What a quantized layer computes, as modules of PyTorch that have an engine's integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.quant import QParams, fake_quantize, quantize

__all__ = ["FakeQuantize", "IntegerAdd", "IntegerLayer", "IntegerMean"]


class IntegerLayer(nn.Module):
    """A convolution or Linear on codes, exact in float64, requantized once in float32.

    Args:
        operator: the aten operator of the float layer.
        arguments: its arguments after input, weight and bias.
        source: how the input is quantized.
        codes: int8 weight in the operator's layout.
        weight_scale: float32 scalar or [channels].
        bias: float32 [channels], on the grid of the accumulator where the engine adds it there.
        target: how the output will be quantized, or None.
        channel_axis: axis of the output that `weight_scale` belongs to.
    """

    def __init__(
        self,
        operator: Any,
        arguments: tuple[Any, ...],
        source: QParams,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
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
        self.step: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("codes", codes.double())
        self.register_buffer("step", source.scale * weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out, as the float layer."""
        codes = (quantize(x, self.source).int() - self.source.zero_point).double()
        takes_bias = self.operator is not torch.ops.aten.matmul.default
        rest = (None, *self.arguments) if takes_bias else ()
        accumulator: torch.Tensor = self.operator(codes, self.codes, *rest)
        step = self._along_channels(self.step, accumulator)
        if self.bias is not None:
            bias = self._along_channels(self.bias, accumulator).double()
            accumulator = accumulator + torch.round(bias / step.double())
        if self.target is None:
            return accumulator.float() * step
        scale = self.target.scale
        return torch.round(accumulator.float() * (step / scale)) * scale

    def _along_channels(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if values.ndim == 0:
            return values
        shape = [1] * like.ndim
        shape[self.channel_axis] = -1
        return values.reshape(shape)


class IntegerAdd(nn.Module):
    """A residual addition on uint8 codes, with two fused multiply-adds in float32.

    y = round(a * s_a / s_y + (b * s_b / s_y + offset)), where the offset gathers the zero points.

    Args:
        left: how the first input is quantized.
        right: how the second one is.
        target: how the output will be.
    """

    def __init__(self, left: QParams, right: QParams, target: QParams) -> None:
        super().__init__()
        self.left, self.right, self.target = left, right, target
        self.ratios = left.scale / target.scale, right.scale / target.scale
        zeros = [_to_uint8(q) + q.zero_point.float() for q in (left, right, target)]
        self.zero = zeros[2]
        self.offset = zeros[2] - (self.ratios[0] * zeros[0] + self.ratios[1] * zeros[1])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Float32 in, float32 out."""
        codes = [
            quantize(value, qparams).double() + _to_uint8(qparams)
            for value, qparams in ((x, self.left), (y, self.right))
        ]
        inner = (codes[1] * self.ratios[1].double() + self.offset.double()).float()
        total = (codes[0] * self.ratios[0].double() + inner.double()).float()
        return (torch.round(total) - self.zero) * self.target.scale


class IntegerMean(nn.Module):
    """The mean of a picture's codes, rounded once.

    y = round(sum * (s_x / (s_y * pixels))), with the sum of the codes exact.

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
        ratio = self.source.scale / (self.target.scale * pixels)
        total = codes.sum((-2, -1), keepdim=True).float()
        return torch.round(total * ratio) * self.target.scale


class FakeQuantize(nn.Module):
    """A Q/DQ pair."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.qparams = qparams

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 in, what is left of it out."""
        return fake_quantize(x, self.qparams)


def _to_uint8(qparams: QParams) -> float:
    """What to add to a code to make it unsigned."""
    return 128.0 if qparams.dtype.symmetric else 0.0

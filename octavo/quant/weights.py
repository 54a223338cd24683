"""THE quantized weight: one record for layers, operators, the simulation and every engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from octavo.core.arrays import Array
from octavo.quant.affine import dequantize, qparams_from_range, quantize
from octavo.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor
from octavo.quant.packing import pack, unpack
from octavo.quant.qparams import QTYPES, QDType, QParams
from octavo.quant.requantize import bias_on_grid, multiplier

__all__ = ["QuantizedWeight", "half_scale", "quantize_weight"]

ACCUMULATOR_LIMIT = 2.0**30
"""A bias may use half of the int32 accumulator; the products have the rest."""


class QuantizedWeight(NamedTuple):
    """Quantized values, what they stand for, and the bias that belongs to them.

    Packings for a kernel are kept beside `values`: see `octavo.kernels.common.packed`.

    Attributes:
        values: int8 in the shape of the weight; of 4 bits and fewer also packed along the last
            axis, uint8. Unsigned (0 to 2**bits - 1) where there are zero points.
        scale: float32 []; one per channel [N]; or one per group [..., K / group_size].
        zero_point: uint8 in the shape of the scale; None for symmetric weights.
        bias: of the layer, floating [N]; or int32 [N], in units of the accumulator; or None.
        bits: of a value: 8, 4, 3 or 2.
        axis: of the channels that have a scale; None for one scale, and for groups.
        group_size: neighbours on the last axis that share a scale; None for no groups.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bits: int = 8
    axis: int | None = 0
    group_size: int | None = None

    @property
    def dtype(self) -> QDType:
        """The integer type."""
        return QTYPES[f"{'int' if self.zero_point is None else 'uint'}{self.bits}"]

    @property
    def granularity(self) -> Granularity:
        """Which values share a scale."""
        if self.group_size is not None:
            return PerGroup(self.group_size)
        return PerTensor() if self.axis is None else PerChannel(self.axis)

    @property
    def qparams(self) -> QParams:
        """Scales and zero points, checked."""
        points = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        return QParams(self.scale, points, self.dtype, self.granularity)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""
        tensors = (self.values, self.scale, self.zero_point, self.bias)
        moved = [None if one is None else one.to(device) for one in tensors]
        return QuantizedWeight._make((*moved, *self[4:]))

    def packed(self) -> QuantizedWeight:
        """The same with the values of 4 bits and fewer packed along the last axis."""
        return self if self.bits == 8 else self._replace(values=pack(self.values, self.dtype))

    def unpacked(self, count: int) -> QuantizedWeight:
        """The reverse of `packed`, for `count` values on the last axis."""
        if self.bits == 8:
            return self
        return self._replace(values=unpack(self.values, self.dtype, count))

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output channels from `start` to `stop`; each has scales of its own."""
        points, bias = (
            None if one is None else one[start:stop] for one in (self.zero_point, self.bias)
        )
        return self._replace(
            values=self.values[start:stop],
            scale=self.scale[start:stop],
            zero_point=points,
            bias=bias,
        )

    def dequantize(self) -> torch.Tensor:
        """(value - zero_point) * scale of unpacked values, each step in float32."""
        if self.axis:
            return dequantize(self.values, self.qparams)
        each = self.values.numel() // max(1, self.scale.numel())
        parts = self.values.reshape(*self.scale.shape, each).to(torch.float32)
        if self.zero_point is not None:
            parts = parts.sub_(self.zero_point.unsqueeze(-1))
        return parts.mul_(self.scale.unsqueeze(-1)).reshape(self.values.shape)


def quantize_weight(
    weight: torch.Tensor | Array,
    axis: int | None,
    *,
    bias: torch.Tensor | Array | None = None,
    input_scale: float | None = None,
    half_scales: bool = False,
) -> QuantizedWeight:
    """Quantizes a weight symmetrically to int8, by its largest magnitude.

    An engine adds the bias in its int32 accumulator, in units of input_scale * weight_scale. Every
    back end and the simulation in PyTorch call this one function, so all of them hold the same
    integers. Where a channel's weights are so small that its bias would overflow the accumulator,
    the channel's scale is raised.

    Args:
        weight: floating, of any shape.
        axis: output-channel axis for one scale per channel; None for one scale.
        bias: floating [channels], with leading axes of length 1 or none; or None.
        input_scale: scale of the layer's input, for a bias in units of the accumulator.
        half_scales: round scales up to what float16 can hold.

    Returns:
        values in -127..127, on the device of the weight; the bias int32 where `input_scale` is
        given, else as it is.
    """
    real = _floats(weight)
    if axis is None:
        bound = real.abs().max() if real.numel() else torch.zeros(())
    else:
        rest = [index for index in range(real.ndim) if index != axis]
        bound = real.abs().amax(rest) if rest else real.abs()
    granularity = PerTensor() if axis is None else PerChannel(axis)
    qparams = qparams_from_range(-bound, bound, "int8", granularity)
    if half_scales:
        qparams = half_scale(qparams)
    offset = None if bias is None else _floats(bias).to(real.device)
    if offset is None or input_scale is None:
        return QuantizedWeight(quantize(real, qparams), qparams.scale, bias=offset, axis=axis)
    offset = offset.reshape(-1)
    need = offset.double().abs() / (input_scale * ACCUMULATOR_LIMIT)
    floor = need.max() if axis is None else need
    scale = torch.maximum(qparams.scale.double(), floor).float()
    qparams = QParams(scale, qparams.zero_point, qparams.dtype, granularity)
    if half_scales:
        qparams = half_scale(qparams)
    units = multiplier(qparams.scale.new_tensor(input_scale), qparams.scale)
    values = quantize(real, qparams)
    return QuantizedWeight(values, qparams.scale, bias=bias_on_grid(offset, units), axis=axis)


def half_scale(qparams: QParams) -> QParams:
    """The same parameters with scales rounded up to the next float16, at least its smallest one."""
    scale = qparams.scale.numpy()
    half = scale.astype(np.float16)
    half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
    rounded = torch.from_numpy(np.asarray(half, dtype=np.float32))
    return QParams(rounded, qparams.zero_point, qparams.dtype, qparams.granularity)


def _floats(values: torch.Tensor | Array) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().to(torch.float32)
    return torch.from_numpy(np.array(values, dtype=np.float32))

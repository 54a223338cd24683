"""A layer's weight as INT8 codes, and its bias on the grid of the accumulator.

Every backend and the simulation in PyTorch call this one function, so all of them hold the same
integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.core.arrays import Array, Float32
from octavo.quant.affine import qparams_from_range, quantize
from octavo.quant.granularity import PerChannel, PerTensor
from octavo.quant.qparams import QParams

__all__ = ["QuantizedWeight", "half_scale", "quantize_weight"]

ACCUMULATOR_LIMIT = 2.0**30
"""A bias may use half of the int32 accumulator; the products have the rest."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized layer's constants.

    Attributes:
        codes: int8, shape of the weight.
        qparams: their scales.
        bias: float32 [channels], each a whole multiple of input scale times weight scale, or None.
        bias_codes: int32 [channels], that multiple, or None.
    """

    codes: npt.NDArray[np.int8]
    qparams: QParams
    bias: Float32 | None = None
    bias_codes: npt.NDArray[np.int32] | None = None


def quantize_weight(
    weight: Array,
    axis: int | None,
    *,
    bias: Array | None = None,
    input_scale: float | None = None,
    half_scales: bool = False,
) -> QuantizedWeight:
    """Quantizes a weight symmetrically to int8, by its largest magnitude.

    An engine adds the bias in its int32 accumulator, in steps of input_scale * weight_scale.
    Rounding the bias to that grid here makes float and integer backends add the same number. Where
    a channel's weights are so small that its bias would overflow the accumulator, the channel's
    scale is raised.

    Args:
        weight: float array.
        axis: output-channel axis for one scale a channel; None for one scale.
        bias: float [channels], with leading axes of length 1 or none; or None.
        input_scale: scale of the layer's input; needed with a bias.
        half_scales: round scales up to what float16 can hold.

    Returns:
        codes in -127..127, scales, and the bias on the grid.
    """
    real = torch.from_numpy(np.array(weight, dtype=np.float32))
    if axis is None:
        bound = real.abs().max() if real.numel() else torch.zeros(())
    else:
        rest = [index for index in range(real.ndim) if index != axis]
        bound = real.abs().amax(rest) if rest else real.abs()
    granularity = PerTensor() if axis is None else PerChannel(axis)
    qparams = qparams_from_range(-bound, bound, "int8", granularity)
    if half_scales:
        qparams = half_scale(qparams)
    if bias is None or input_scale is None:
        return QuantizedWeight(quantize(real, qparams).numpy(), qparams)
    offset = torch.from_numpy(np.array(bias, dtype=np.float32)).double().reshape(-1)
    need = offset.abs() / (input_scale * ACCUMULATOR_LIMIT)
    floor = need.max() if axis is None else need
    scale = torch.maximum(qparams.scale.double(), floor).float()
    qparams = QParams(scale, qparams.zero_point, qparams.dtype, granularity)
    if half_scales:
        qparams = half_scale(qparams)
    step = np.float32(input_scale) * qparams.scale.numpy()
    codes = np.rint(offset.numpy() / step.astype(np.float64))
    return QuantizedWeight(
        codes=quantize(real, qparams).numpy(),
        qparams=qparams,
        bias=(codes * step.astype(np.float64)).astype(np.float32),
        bias_codes=codes.astype(np.int32),
    )


def half_scale(qparams: QParams) -> QParams:
    """The same parameters with scales rounded up to the next float16, at least its smallest one."""
    scale = qparams.scale.numpy()
    half = scale.astype(np.float16)
    half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
    rounded = torch.from_numpy(np.asarray(half, dtype=np.float32))
    return QParams(rounded, qparams.zero_point, qparams.dtype, qparams.granularity)

"""The four verbs: choose_qparams, quantize, dequantize, fake_quantize.

Arithmetic follows ONNX QuantizeLinear and DequantizeLinear (opset 13 to 21) bit for bit: divide in
float32, round half to even, add the zero point, saturate. NaN becomes the type's smallest code,
which is what ONNX Runtime gives on x86.
"""

from __future__ import annotations

import math

import torch

from octavo.core.errors import InputError
from octavo.quant.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    channel_axis,
    scale_shape,
)
from octavo.quant.qparams import QDType, QParams, qdtype

__all__ = ["choose_qparams", "dequantize", "fake_quantize", "qparams_from_range", "quantize"]

MIN_SCALE = 2.0**-63
"""The smallest scale ever chosen: the product of two still is a normal float32."""

_PER_TENSOR = PerTensor()


def qparams_from_range(
    low: torch.Tensor | float,
    high: torch.Tensor | float,
    dtype: str | QDType = "int8",
    granularity: Granularity = _PER_TENSOR,
) -> QParams:
    """Parameters under which the values from `low` to `high` are representable.

    Signed types are symmetric: scale = max(|low|, |high|) / qmax, zero_point = 0. "uint8" is
    affine: the range is widened to hold 0, scale = (high - low) / 255, and 0.0 is exactly
    representable. A range of zero width at 0 (a tensor that was always zero) is taken as -1 to 1,
    since any scale represents it exactly.

    Args:
        low: smallest real value; a number, or a tensor of the shape of the scale.
        high: largest real value, likewise.
        dtype: the integer type.
        granularity: which values share a scale.

    Returns:
        the parameters, scale in float32.

    Raises:
        InputError: a bound is NaN or infinite, or low is above high.
    """
    kind = qdtype(dtype)
    lo = torch.as_tensor(low).detach().to(torch.float64)
    hi = torch.as_tensor(high).detach().to(torch.float64)
    for name, bound in (("low", lo), ("high", hi)):
        if not bool(torch.isfinite(bound).all()):
            bad = float(bound[~torch.isfinite(bound)].flatten()[0])
            raise InputError(f"the {name} end of the range is {bad}; ranges must be finite")
    if bool((lo > hi).any()):
        raise InputError(
            f"the range is empty: low {lo.max().item()} is above high {hi.min().item()}"
        )
    if kind.symmetric:
        bound = torch.maximum(lo.abs(), hi.abs())
        bound = torch.where(bound == 0, torch.ones_like(bound), bound)
        scale = (bound / kind.qmax).clamp_min(MIN_SCALE).to(torch.float32)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), kind, granularity)
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    empty = lo == hi
    lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
    scale = ((hi - lo) / (kind.qmax - kind.qmin)).clamp_min(MIN_SCALE).to(torch.float32)
    zero_point = torch.round(kind.qmin - lo / scale).clamp(kind.qmin, kind.qmax)
    return QParams(scale, zero_point.to(torch.int32), kind, granularity)


def choose_qparams(
    x: torch.Tensor, dtype: str | QDType = "int8", granularity: Granularity = _PER_TENSOR
) -> QParams:
    """Parameters from the smallest and largest value of `x` in each part that shares a scale.

    Args:
        x: float tensor of any shape; an empty one counts as all zero.
        dtype: the integer type.
        granularity: which values share a scale.

    Raises:
        InputError: `x` holds NaN or infinity, or the granularity does not fit its shape.
    """
    shape = scale_shape(tuple(x.shape), granularity)
    if x.numel() == 0:
        zeros = torch.zeros(shape, device=x.device)
        return qparams_from_range(zeros, zeros, dtype, granularity)
    parts = _parts(x.detach().float(), granularity)
    low, high = torch.aminmax(parts, dim=-1)
    return qparams_from_range(low.reshape(shape), high.reshape(shape), dtype, granularity)


def quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Integer codes of `x`: saturate(round_half_even(x / scale) + zero_point).

    Args:
        x: float tensor (float16 and bfloat16 are computed in float32).
        qparams: must fit the shape of `x`.

    Returns:
        a tensor of the same shape, int8 or uint8; narrower types use one int8 a code (see
        `packing`). NaN gives the smallest code, infinities saturate.
    """
    kind = qparams.dtype
    scale, zero_point = _broadcast(qparams, x)
    real = x.detach().to(torch.float32) / scale
    code = torch.round(real).nan_to_num(nan=-math.inf) + zero_point
    return code.clamp(kind.qmin, kind.qmax).to(kind.storage)


def dequantize(
    q: torch.Tensor, qparams: QParams, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values of codes: (q - zero_point) * scale, computed in float32 and cast to `dtype`."""
    scale, zero_point = _broadcast(qparams, q)
    return ((q.to(torch.int32) - zero_point).to(torch.float32) * scale).to(dtype)


def fake_quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """What is left of `x` after quantize and dequantize, in the dtype of `x`; no gradient."""
    return dequantize(quantize(x, qparams), qparams, x.dtype)


def _parts(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Views `x` so that each row of the last axis holds the values that share one scale."""
    if isinstance(granularity, PerTensor):
        return x.reshape(-1)
    if isinstance(granularity, PerChannel):
        return (
            x.movedim(channel_axis(x.ndim, granularity.axis), 0)
            .flatten(1)
            .reshape(x.shape[granularity.axis], -1)
        )
    if isinstance(granularity, PerToken):
        return x
    return x.reshape(*x.shape[:-1], -1, granularity.group_size)


def _broadcast(qparams: QParams, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point in a shape that broadcasts against `x`, on its device."""
    granularity = qparams.granularity
    expected = scale_shape(tuple(x.shape), granularity)
    scale, zero_point = qparams.scale.to(x.device), qparams.zero_point.to(x.device)
    if tuple(scale.shape) != expected:
        raise InputError(
            f"a tensor of shape {list(x.shape)} with {granularity} needs a scale of shape "
            f"{list(expected)}, not {list(scale.shape)}"
        )
    if isinstance(granularity, PerTensor):
        return scale, zero_point
    if isinstance(granularity, PerChannel):
        shape = [1] * x.ndim
        shape[granularity.axis] = -1
        return scale.reshape(shape), zero_point.reshape(shape)
    if isinstance(granularity, PerToken):
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    if isinstance(granularity, PerGroup):
        size = granularity.group_size
        return scale.repeat_interleave(size, -1), zero_point.repeat_interleave(size, -1)
    raise AssertionError(granularity)

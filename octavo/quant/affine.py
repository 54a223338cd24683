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
        the parameters, scale in float32, on the device of `low` and `high`.

    Raises:
        InputError: an end is not finite in float32, low is above high, or their shapes do not
            fit each other or the granularity.
    """
    kind = qdtype(dtype)
    lo, hi = _bounds(low, high)
    if kind.symmetric:
        bound = torch.maximum(lo.abs(), hi.abs())
        bound = bound.masked_fill(bound == 0, 1.0)
        scale = (bound / kind.qmax).clamp_min(MIN_SCALE).to(torch.float32)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), kind, granularity)
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    empty = lo == hi
    lo, hi = torch.where(empty, -1.0, lo), torch.where(empty, 1.0, hi)
    steps = kind.qmax - kind.qmin
    width = (hi - lo).clamp_min(steps * MIN_SCALE)
    scale = (width / steps).to(torch.float32)
    # Not from the rounded scale: -b to b has the zero point 128 for every b.
    zero_point = torch.round(kind.qmin - lo * steps / width)
    return QParams(scale, zero_point, kind, granularity)


def choose_qparams(
    x: torch.Tensor, dtype: str | QDType = "int8", granularity: Granularity = _PER_TENSOR
) -> QParams:
    """Parameters from the smallest and largest value of `x` in each part that shares a scale.

    Args:
        x: float tensor of any shape; an empty one counts as all zero.
        dtype: the integer type.
        granularity: which values share a scale.

    Returns:
        the parameters, on the device of `x`.

    Raises:
        InputError: `x` holds NaN or infinity, or the granularity does not fit its shape.
    """
    shape = scale_shape(tuple(x.shape), granularity)
    if x.numel() == 0:
        zeros = torch.zeros(shape, device=x.device)
        return qparams_from_range(zeros, zeros, dtype, granularity)
    parts = _parts(x.detach(), granularity)
    # Two reductions take a tenth of the time of torch.aminmax along an axis on a CPU.
    return qparams_from_range(parts.amin(-1), parts.amax(-1), dtype, granularity)


def quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Integer codes of `x`: saturate(round_half_even(x / scale) + zero_point).

    Args:
        x: float tensor of any shape; every float type is computed in float32.
        qparams: must fit the shape of `x`.

    Returns:
        a tensor of the same shape, int8 or uint8; narrower types use one int8 a code (see
        `packing`). NaN gives the smallest code, infinities saturate.

    Raises:
        InputError: the parameters do not fit the shape of `x`.
    """
    kind = qparams.dtype
    view, scale, zero_point = _aligned(x.detach(), qparams)
    code = view.to(torch.float32) / scale
    code.round_().nan_to_num_(nan=-math.inf).add_(zero_point).clamp_(kind.qmin, kind.qmax)
    return code.to(kind.storage).reshape(x.shape)


def dequantize(
    q: torch.Tensor, qparams: QParams, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Real values of codes: (q - zero_point) * scale, computed in float32 and cast to `dtype`.

    Args:
        q: integer codes of any shape, one element a code.
        qparams: the parameters they were quantized with.
        dtype: of the result.

    Returns:
        a tensor of the shape of `q`.

    Raises:
        InputError: `q` is not an integer tensor, or the parameters do not fit its shape.
    """
    if q.dtype.is_floating_point or q.dtype.is_complex:
        raise InputError(
            f"dequantize takes integer codes, not {q.dtype}; quantize the tensor first"
        )
    view, scale, zero_point = _aligned(q, qparams)
    # The difference of two 8-bit numbers is exact in float32.
    return view.to(torch.float32).sub_(zero_point).mul_(scale).to(dtype).reshape(q.shape)


def fake_quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """What is left of `x` after quantize and dequantize, in the dtype of `x`; no gradient."""
    return dequantize(quantize(x, qparams), qparams, x.dtype)


def _bounds(
    low: torch.Tensor | float, high: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ends of a range in float64, of one shape, checked."""
    device = next((end.device for end in (low, high) if isinstance(end, torch.Tensor)), None)
    lo, hi = (
        torch.as_tensor(end, dtype=torch.float64, device=device).detach() for end in (low, high)
    )
    if lo.ndim and hi.ndim and lo.shape != hi.shape:
        raise InputError(
            f"low has shape {list(lo.shape)} and high {list(hi.shape)}; give both the shape of "
            "the scale"
        )
    for name, end in (("low", lo), ("high", hi)):
        bad = end[~torch.isfinite(end.to(torch.float32))]
        if bad.numel():
            raise InputError(
                f"the {name} end of the range is {float(bad[0])}, and ranges must be finite in "
                "float32; look for NaN and infinity in the data"
            )
    shape = lo.shape or hi.shape
    lo, hi = lo.expand(shape), hi.expand(shape)
    crossed = lo > hi
    if bool(crossed.any()):
        raise InputError(
            f"the range is empty: low {float(lo[crossed][0])} is above high "
            f"{float(hi[crossed][0])}; swap the two"
        )
    return lo, hi


def _parts(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """Views `x` so that its last axis runs over the values that share one scale."""
    if isinstance(granularity, PerTensor):
        return x.reshape(-1)
    if isinstance(granularity, PerChannel):
        channels_first = x.movedim(granularity.axis, 0)
        return channels_first.reshape(len(channels_first), -1)
    if isinstance(granularity, PerToken):
        return x
    return _grouped(x, granularity)


def _grouped(x: torch.Tensor, granularity: PerGroup) -> torch.Tensor:
    """[..., n] as [..., n / group_size, group_size]."""
    return x.reshape(*scale_shape(tuple(x.shape), granularity), granularity.group_size)


def _aligned(x: torch.Tensor, qparams: QParams) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x` (its last axis split where groups share a scale), and scale and zero point for it.

    The two broadcast against the first and lie on its device: CUDA divides by a scalar that lies
    on the CPU as a product with the reciprocal, which is not exact.
    """
    granularity = qparams.granularity
    expected = scale_shape(tuple(x.shape), granularity)
    scale, zero_point = qparams.scale.to(x.device), qparams.zero_point.to(x.device)
    if tuple(scale.shape) != expected:
        raise InputError(
            f"a tensor of shape {list(x.shape)} with {granularity} needs a scale of shape "
            f"{list(expected)}, not {list(scale.shape)}; choose the parameters for this tensor"
        )
    if isinstance(granularity, PerTensor):
        return x, scale, zero_point
    if isinstance(granularity, PerChannel):
        shape = [1] * x.ndim
        shape[granularity.axis] = -1
        return x, scale.reshape(shape), zero_point.reshape(shape)
    if isinstance(granularity, PerGroup):
        x = _grouped(x, granularity)
    return x, scale.unsqueeze(-1), zero_point.unsqueeze(-1)

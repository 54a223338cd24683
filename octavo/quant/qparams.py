"""What makes a number a quantized number: scale, zero point, integer type and granularity."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from octavo.core.errors import InputError
from octavo.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["QTYPES", "QDType", "QParams"]


@dataclass(frozen=True)
class QDType:
    """An integer type as quantization uses it.

    Attributes:
        name: "int8", "uint8", "int4", "uint4" and so on for 3 and 2 bits.
        bits: width when packed.
        qmin: smallest code; results saturate there, as in ONNX QuantizeLinear.
        qmax: largest code.
        storage: torch dtype that holds one unpacked code.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    storage: torch.dtype

    @property
    def symmetric(self) -> bool:
        """Signed types are used with a zero point of 0."""
        return self.qmin < 0


def _signed(bits: int) -> QDType:
    half = 1 << (bits - 1)
    return QDType(f"int{bits}", bits, -half, half - 1, torch.int8)


def _unsigned(bits: int) -> QDType:
    return QDType(f"uint{bits}", bits, 0, (1 << bits) - 1, torch.uint8)


QTYPES: dict[str, QDType] = {
    one.name: one for bits in (8, 4, 3, 2) for one in (_signed(bits), _unsigned(bits))
}


def qdtype(name: str | QDType) -> QDType:
    """Looks a type up by name.

    Raises:
        InputError: no such type.
    """
    if isinstance(name, QDType):
        return name
    if name not in QTYPES:
        raise InputError(f"no quantized type is called {name!r}; choose from {', '.join(QTYPES)}")
    return QTYPES[name]


@dataclass(frozen=True, eq=False)
class QParams:
    """How real numbers map to integers: real = (integer - zero_point) * scale.

    Two are equal, and hash alike, where type, granularity and numbers are equal, on any device.

    Attributes:
        scale: float32 tensor, positive and finite; its shape follows from the granularity. A
            number or any float tensor may be given; it is copied.
        zero_point: int32 tensor of the same shape, on the same device; zero for signed types.
        dtype: the integer type.
        granularity: which values share a scale.

    Raises:
        InputError: a scale that is not positive and finite in float32, a zero point that the
            type cannot hold, or shapes that do not belong together.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    dtype: QDType = field(default=QTYPES["int8"])
    granularity: Granularity = field(default=PerTensor())

    def __post_init__(self) -> None:
        # The detour through float64 keeps the value that was given for the message, and its last
        # step always copies: parameters do not change when a caller's statistics do.
        scale = torch.as_tensor(self.scale, dtype=torch.float64).detach()
        zero_point = torch.as_tensor(
            self.zero_point, dtype=torch.float64, device=scale.device
        ).detach()
        object.__setattr__(self, "dtype", qdtype(self.dtype))
        _check_shapes(scale, zero_point, self.granularity)
        _check_values(scale, zero_point, self.dtype)
        object.__setattr__(self, "scale", scale.to(torch.float32).contiguous())
        object.__setattr__(self, "zero_point", zero_point.to(torch.int32).contiguous())

    @property
    def axis(self) -> int | None:
        """The channel axis of per-channel parameters, else None."""
        return self.granularity.axis if isinstance(self.granularity, PerChannel) else None

    @property
    def group_size(self) -> int | None:
        """The group size of per-group parameters, else None."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else None

    def to(self, device: torch.device | str) -> QParams:
        """The same parameters on another device."""
        return QParams(
            self.scale.to(device), self.zero_point.to(device), self.dtype, self.granularity
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QParams):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.granularity == other.granularity
            and torch.equal(self.scale.cpu(), other.scale.cpu())
            and torch.equal(self.zero_point.cpu(), other.zero_point.cpu())
        )

    def __hash__(self) -> int:
        values = self.scale.cpu().numpy().tobytes(), self.zero_point.cpu().numpy().tobytes()
        return hash((self.dtype, self.granularity, *values))


def _check_shapes(scale: torch.Tensor, zero_point: torch.Tensor, granularity: Granularity) -> None:
    shape = list(scale.shape)
    if scale.shape != zero_point.shape:
        raise InputError(
            f"scale has shape {shape} and zero_point {list(zero_point.shape)}; they must be equal"
        )
    if isinstance(granularity, PerTensor) and scale.ndim:
        raise InputError(f"a per-tensor scale is a scalar, not of shape {shape}")
    if isinstance(granularity, PerChannel) and scale.ndim != 1:
        raise InputError(f"a per-channel scale has one axis, not shape {shape}")
    if isinstance(granularity, PerGroup) and not scale.ndim:
        raise InputError("a per-group scale has an axis of groups and is not a scalar")


def _check_values(scale: torch.Tensor, zero_point: torch.Tensor, kind: QDType) -> None:
    rounded = scale.to(torch.float32)
    bad = scale[~(torch.isfinite(rounded) & (rounded > 0))]
    if bad.numel():
        raise InputError(f"scale {float(bad[0])} is not positive and finite in float32")
    low, high = (0, 0) if kind.symmetric else (kind.qmin, kind.qmax)
    fits = (zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)
    bad = zero_point[~fits]
    if bad.numel():
        allowed = "0, as it is symmetric" if kind.symmetric else f"an integer {low}..{high}"
        raise InputError(f"zero_point {float(bad[0]):g} does not fit {kind.name}; use {allowed}")

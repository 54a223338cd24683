"""What makes a number a quantized number: scale, zero point, integer type and granularity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor

__all__ = ["QTYPES", "QDType", "QParams"]


@dataclass(frozen=True)
class QDType:
    """An integer type as quantization uses it.

    Attributes:
        name: "int8", "uint8", "int4", "int3" or "int2".
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


QTYPES: dict[str, QDType] = {
    "int8": _signed(8),
    "uint8": QDType("uint8", 8, 0, 255, torch.uint8),
    "int4": _signed(4),
    "int3": _signed(3),
    "int2": _signed(2),
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

    Attributes:
        scale: float32 tensor, positive and finite; its shape follows from the granularity.
        zero_point: int32 tensor of the same shape; zero for signed types.
        dtype: the integer type.
        granularity: which values share a scale.

    Raises:
        InputError: a scale that is not positive and finite, a zero point that the type cannot
            hold, or shapes that do not belong together.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    dtype: QDType = field(default=QTYPES["int8"])
    granularity: Granularity = field(default=PerTensor())

    def __post_init__(self) -> None:
        scale = torch.as_tensor(self.scale).detach().to(torch.float32).contiguous()
        zero_point = torch.as_tensor(self.zero_point).detach().to(torch.int32).contiguous()
        object.__setattr__(self, "dtype", qdtype(self.dtype))
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)
        if scale.shape != zero_point.shape:
            raise InputError(
                f"scale has shape {list(scale.shape)} and zero_point {list(zero_point.shape)}; "
                "they must be equal"
            )
        if isinstance(self.granularity, PerTensor) and scale.ndim:
            raise InputError(f"a per-tensor scale is a scalar, not of shape {list(scale.shape)}")
        if isinstance(self.granularity, PerChannel) and scale.ndim != 1:
            raise InputError(f"a per-channel scale has one axis, not shape {list(scale.shape)}")
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bool(bad.any()):
            raise InputError(f"scale {float(scale[bad].flatten()[0])} is not positive and finite")
        if self.dtype.symmetric:
            if bool(zero_point.any()):
                value = int(zero_point[zero_point != 0].flatten()[0])
                raise InputError(f"zero_point {value} with the symmetric {self.dtype.name}; use 0")
        elif bool(((zero_point < self.dtype.qmin) | (zero_point > self.dtype.qmax)).any()):
            raise InputError(
                f"zero_point {int(zero_point.max())} is outside {self.dtype.name}'s "
                f"{self.dtype.qmin}..{self.dtype.qmax}"
            )

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
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )

    def __hash__(self) -> int:
        values: tuple[Any, ...] = (tuple(self.scale.shape), float(self.scale.sum()))
        return hash((self.dtype, self.granularity, values))

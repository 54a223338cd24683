"""Which values of a tensor share one scale and one zero point."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.core.errors import InputError

__all__ = ["Granularity", "PerChannel", "PerGroup", "PerTensor", "PerToken"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for all values: x [4, 8] has a scale of shape []."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axis`: x [16, 8, 3, 3] with axis 0 has a scale of shape [16]."""

    axis: int = 0


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of the last axis: x [2, 5, 64] has a scale of shape [2, 5]."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each `group_size` neighbours on the last axis.

    x [16, 256] with group_size 128 has a scale of shape [16, 2].
    """

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(f"group_size is {self.group_size}; give a positive number")


Granularity = PerTensor | PerChannel | PerToken | PerGroup


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape the scale of a tensor of `shape` must have.

    Raises:
        InputError: the granularity does not fit the shape.
    """
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        return (shape[channel_axis(len(shape), granularity.axis)],)
    if not shape:
        raise InputError(f"{granularity} needs a tensor of at least one axis, not a scalar")
    if isinstance(granularity, PerToken):
        return shape[:-1]
    if shape[-1] % granularity.group_size:
        raise InputError(
            f"the last axis has {shape[-1]} values, which group_size {granularity.group_size} "
            "does not divide; choose a divisor or pad the tensor"
        )
    return (*shape[:-1], shape[-1] // granularity.group_size)


def channel_axis(ndim: int, axis: int) -> int:
    """`axis` counted from the front.

    Raises:
        InputError: a tensor of `ndim` axes has no such axis.
    """
    if not -ndim <= axis < ndim:
        raise InputError(f"axis {axis} does not exist in a tensor of {ndim} axes")
    return axis % ndim

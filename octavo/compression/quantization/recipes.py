"""What `octavo.quantize` may do to a layer, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from octavo.core.errors import InputError

__all__ = ["Int4WeightOnly", "Int8Dynamic", "Int8Static", "Int8WeightOnly", "Recipe"]

Smooth: TypeAlias = "float | Literal['auto'] | None"
OBSERVERS = ("minmax", "percentile", "entropy", "mse", "auto")


@dataclass(frozen=True)
class Int8Dynamic:
    """INT8 weights a channel; INT8 activations with a scale a token, found at run time.

    Attributes:
        smooth: strength of SmoothQuant, 0 to 1; "auto" chooses it layer by layer, and None leaves
            it out. All but None need calibration data.
    """

    smooth: Smooth = None

    def __post_init__(self) -> None:
        _check_smooth(self.smooth)

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe cannot do without data."""
        return self.smooth is not None

    def __str__(self) -> str:
        return "int8 dynamic"


@dataclass(frozen=True)
class Int8Static:
    """INT8 weights a channel; INT8 activations with one calibrated scale. Needs calibration data.

    Attributes:
        observer: what chooses the range of a layer's input: "minmax", "percentile", "entropy",
            "mse", or "auto", which takes the one that keeps the layer's output closest.
        smooth: as in `Int8Dynamic`. One scale has to fit all tokens and channels, so activations
            of transformers need it.
    """

    observer: str = "auto"
    smooth: Smooth = "auto"

    def __post_init__(self) -> None:
        _check_smooth(self.smooth)
        if self.observer not in OBSERVERS:
            raise InputError(f"observer {self.observer!r} is unknown; use {', '.join(OBSERVERS)}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe cannot do without data."""
        return True

    def __str__(self) -> str:
        return "int8 static"


@dataclass(frozen=True)
class Int8WeightOnly:
    """INT8 weights a channel, float activations: for layers bound by reading their weights."""

    needs_calibration = False

    def __str__(self) -> str:
        return "int8 weights"


@dataclass(frozen=True)
class Int4WeightOnly:
    """4-bit weights in groups, float activations.

    With calibration data GPTQ (arXiv 2210.17323) chooses the codes; without, each weight is
    rounded to the nearest one.

    Attributes:
        group_size: neighbouring input channels that share a scale.
        symmetric: leave the zero points out; smaller by one byte a group, and less accurate.
    """

    group_size: int = 128
    symmetric: bool = False

    needs_calibration = False

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(f"group_size is {self.group_size}; give a positive number")

    def __str__(self) -> str:
        return f"int4 weights, groups of {self.group_size}"


Recipe: TypeAlias = "Int8Dynamic | Int8Static | Int8WeightOnly | Int4WeightOnly"


def _check_smooth(smooth: Smooth) -> None:
    if smooth is None or smooth == "auto":
        return
    if not isinstance(smooth, (int, float)) or not 0 <= smooth <= 1:
        raise InputError(f"smooth is {smooth!r}; give a number from 0 to 1, 'auto' or None")

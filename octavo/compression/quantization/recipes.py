"""What `octavo.quantize` may do to a layer, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from octavo.core.errors import InputError

__all__ = [
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "Recipe",
    "by_itself",
    "weight_format",
]

Smooth: TypeAlias = "float | Literal['auto'] | None"


@dataclass(frozen=True)
class Int8Dynamic:
    """INT8 weights with per-channel scales; INT8 activations with per-token scales.

    The scales of activations are found at run time.

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

    uses_calibration = needs_calibration

    def __str__(self) -> str:
        return "int8 dynamic"


@dataclass(frozen=True)
class Int8Static:
    """INT8 weights with per-channel scales; INT8 activations with one calibrated scale.

    It needs calibration data, or the table that `octavo.calibrate` made of the model.

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
        from octavo.calibration.observers import LAYER_OBSERVERS  # brings ONNX Runtime along

        known = ("auto", *LAYER_OBSERVERS)
        if self.observer not in known:
            raise InputError(f"observer {self.observer!r} is unknown; use {', '.join(known)}")

    needs_calibration = uses_calibration = True

    def __str__(self) -> str:
        return "int8 static"


@dataclass(frozen=True)
class Int8WeightOnly:
    """INT8 weights with per-channel scales, float activations.

    For layers bound by reading their weights, and for tables of embeddings.
    """

    needs_calibration = uses_calibration = False

    def __str__(self) -> str:
        return "int8 weights"


@dataclass(frozen=True)
class Int4WeightOnly:
    """4-bit weights in groups, float activations.

    With calibration data GPTQ (arXiv 2210.17323) chooses the codes; without, each weight is
    rounded to the nearest one.

    Attributes:
        group_size: neighbouring input channels that share a scale.
        symmetric: leave the zero points out; smaller by one byte per group, and less accurate.
        gptq: use calibration data, where there is some; False rounds to the nearest values.
    """

    group_size: int = 128
    symmetric: bool = False
    gptq: bool = True

    needs_calibration = False

    @property
    def uses_calibration(self) -> bool:
        """Whether the recipe gains from data."""
        return self.gptq

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(f"group_size is {self.group_size}; give a positive number")

    def __str__(self) -> str:
        return f"int4 weights, groups of {self.group_size}"


Recipe: TypeAlias = "Int8Dynamic | Int8Static | Int8WeightOnly | Int4WeightOnly"


def weight_format(recipe: Recipe) -> tuple[int, int | None, bool]:
    """Bits, group size and symmetry of the weights that a recipe makes."""
    if isinstance(recipe, Int4WeightOnly):
        return 4, recipe.group_size, recipe.symmetric
    return 8, None, True


def by_itself(recipe: Recipe) -> Recipe:
    """The recipe under which a weight depends on itself only, and not on what its layer is given.

    Layers of different kinds that hold one weight keep it so.
    """
    if isinstance(recipe, Int4WeightOnly):
        return replace(recipe, gptq=False)
    return recipe if isinstance(recipe, Int8WeightOnly) else replace(recipe, smooth=None)


def _check_smooth(smooth: Smooth) -> None:
    if smooth is None or smooth == "auto":
        return
    if not isinstance(smooth, (int, float)) or not 0 <= smooth <= 1:
        raise InputError(f"smooth is {smooth!r}; give a number from 0 to 1, 'auto' or None")

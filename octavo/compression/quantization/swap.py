"""Quantized layers in the place of float ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from octavo.calibration.inputs import LayerInputs
from octavo.compression.quantization.gptq import gptq
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
)
from octavo.compression.quantization.smooth import Bound, choose_smoothing
from octavo.core.errors import OctavoError
from octavo.layers.linear.int8 import Int8Linear, as_linear
from octavo.layers.linear.weight_only import WeightOnlyLinear
from octavo.layers.recurrent.int8 import Int8GRU, Int8LSTM

__all__ = ["Made", "quantized_layer"]


@dataclass(frozen=True)
class Made:
    """A layer that is ready to be put in its place.

    Attributes:
        layer: the quantized layer.
        detail: what was chosen for it, in words.
        sqnr_db: of its output on calibration rows; None where that was not measured.
    """

    layer: nn.Module
    detail: str
    sqnr_db: float | None = None


def quantized_layer(choice: Choice, inputs: LayerInputs | None, bounds: Sequence[Bound]) -> Made:
    """Makes the layer that a choice asks for; nothing is changed yet.

    Args:
        choice: one with a recipe.
        inputs: what the layer was given during calibration, where there was one.
        bounds: ways to find the range of a static layer.

    Raises:
        OctavoError: of the kind that its making raised, with the layer's name.
    """
    try:
        return _make(choice, inputs, bounds)
    except OctavoError as error:
        raise type(error)(f"layer {choice.name!r}: {error}") from error


def _make(choice: Choice, inputs: LayerInputs | None, bounds: Sequence[Bound]) -> Made:
    layer, recipe = choice.module, choice.recipe
    if isinstance(layer, nn.LSTM):
        return Made(Int8LSTM.from_float(layer), "a scale a token")
    if isinstance(layer, nn.GRU):
        return Made(Int8GRU.from_float(layer), "a scale a token")
    layer = as_linear(layer)
    if isinstance(recipe, Int8WeightOnly):
        return Made(WeightOnlyLinear.from_float(layer), "a scale a channel")
    if isinstance(recipe, Int4WeightOnly):
        codes, how = None, "nearest codes"
        if inputs is not None and inputs.gram is not None:
            gram = inputs.gram
            codes = gptq(layer.weight, gram, 4, recipe.group_size, recipe.symmetric)
            how = "GPTQ"
        made = WeightOnlyLinear.from_float(
            layer,
            bits=4,
            group_size=recipe.group_size,
            symmetric=recipe.symmetric,
            codes=codes,
        )
        return Made(made, how)
    assert isinstance(recipe, (Int8Dynamic, Int8Static))  # noqa: S101 - there are no others
    if inputs is None:
        return Made(Int8Linear.from_float(layer), "a scale a token")
    static = isinstance(recipe, Int8Static)
    found = choose_smoothing(layer.weight, inputs, recipe.smooth, bounds if static else ())
    made_int8 = Int8Linear.from_float(layer, smooth=found.factors, input_scale=found.input_scale)
    strength = "no smoothing" if found.alpha is None else f"smooth {found.alpha:g}"
    return Made(made_int8, strength, found.sqnr_db)

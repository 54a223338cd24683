"""The kinds of layers that Octavo quantizes: what each becomes, and when it stays in float.

To add one: its module in `octavo.layers`, an entry in `LAYER_TYPES`, its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from octavo.calibration.inputs import LayerInputs
from octavo.compression.quantization.gptq import gptq
from octavo.compression.quantization.recipes import (
    Int4WeightOnly,
    Int8Static,
    Int8WeightOnly,
    Recipe,
)
from octavo.compression.quantization.smooth import choose_smoothing, input_bounds
from octavo.layers.attention.multihead import RowsLinear
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.layers.linear.embedding import WeightOnlyEmbedding, WeightOnlyEmbeddingBag
from octavo.layers.linear.int8 import Int8Linear, as_linear, is_linear
from octavo.layers.linear.weight_only import WeightOnlyLinear
from octavo.layers.module import QuantizedModule
from octavo.layers.recurrent.int8 import Int8GRU, Int8LSTM

__all__ = ["LAYER_TYPES", "QUANTIZED", "LayerResult", "LayerType", "layer_type"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer that is ready to be put in its place.

    Attributes:
        layer: the quantized layer.
        detail: what was chosen for it, in words.
        sqnr_db: of its output on calibration rows; None where that was not measured.
        recipe: what it was made by, where that is another one than was asked for.
    """

    layer: nn.Module
    detail: str
    sqnr_db: float | None = None
    recipe: str = ""


Make: TypeAlias = "Callable[[Any, Recipe, LayerInputs | None], LayerResult]"
"""(float layer, recipe, what calibration gave it) -> the quantized layer."""


@dataclass(frozen=True)
class LayerType:
    """One kind of float layer.

    Attributes:
        matches: whether a module is of this kind.
        reason: (layer, recipe) -> why it stays in float; "" where it can be quantized.
        make: makes the quantized layer; None where the model's graph is needed for that.
        quantized: the classes that it becomes, which a saved model names.
        calibrated: whether calibration watches what it is given.
        fewest: weights below which it gains nothing, unless it is asked for by name.
    """

    matches: Callable[[nn.Module], bool]
    reason: Callable[[Any, Recipe], str]
    make: Make | None
    quantized: tuple[type[QuantizedModule], ...]
    calibrated: bool = False
    fewest: int = 0


def layer_type(module: nn.Module) -> LayerType | None:
    """The entry for a float layer; None where Octavo has no quantized form of it."""
    return next((one for one in LAYER_TYPES if one.matches(module)), None)


def _is(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kinds)


def _weight_reason(layer: Any, recipe: Recipe, width: int) -> str:
    """Why a weight [..., width] cannot be quantized."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized; remove the parametrization first"
    if layer.weight.dtype not in FLOATS:
        return f"its weight is {layer.weight.dtype}"
    if isinstance(recipe, Int4WeightOnly) and width % recipe.group_size:
        return f"group_size {recipe.group_size} does not divide the {width} values of a row"
    return ""


def _linear_reason(layer: Any, recipe: Recipe) -> str:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight itself"
    known = (nn.Linear.forward, RowsLinear.forward)
    if isinstance(layer, nn.Linear) and type(layer).forward not in known:
        return f"{type(layer).__name__} computes something of its own in forward"
    width = 0 if parametrize.is_parametrized(layer) else as_linear(layer).in_features
    return _weight_reason(layer, recipe, width)


def _make_linear(module: nn.Module, recipe: Recipe, inputs: LayerInputs | None) -> LayerResult:
    layer = as_linear(module)
    if isinstance(recipe, Int8WeightOnly):
        return LayerResult(WeightOnlyLinear.from_float(layer), "per-channel scales")
    if isinstance(recipe, Int4WeightOnly):
        size, symmetric = recipe.group_size, recipe.symmetric
        quantized = None
        if inputs is not None and inputs.gram is not None:
            quantized = gptq(layer.weight, inputs.gram, 4, size, symmetric)
        made = WeightOnlyLinear.from_float(
            layer, bits=4, group_size=size, symmetric=symmetric, quantized=quantized
        )
        return LayerResult(made, "nearest values" if quantized is None else "GPTQ")
    if inputs is None:
        return LayerResult(Int8Linear.from_float(layer), "per-token scales")
    bounds = input_bounds(recipe.observer) if isinstance(recipe, Int8Static) else ()
    found = choose_smoothing(layer.weight, inputs, recipe.smooth, bounds)
    int8 = Int8Linear.from_float(layer, smooth=found.factors, input_scale=found.input_scale)
    strength = "no smoothing" if found.alpha is None else f"smooth {found.alpha:g}"
    return LayerResult(int8, strength, found.sqnr_db)


def _embedding_reason(layer: Any, recipe: Recipe) -> str:
    kind = type(layer).__name__
    if type(layer) not in (nn.Embedding, nn.EmbeddingBag):
        return f"{kind} may compute something else than torch's own"
    if not isinstance(recipe, (Int8WeightOnly, Int4WeightOnly)):
        return f"{kind} has weight-only forms; give it Int8WeightOnly() by an override"
    if layer.max_norm is not None:
        return "max_norm changes its rows when they are read"
    return _weight_reason(layer, recipe, layer.embedding_dim)


def _make_embedding(layer: Any, recipe: Recipe, _inputs: LayerInputs | None) -> LayerResult:
    bag = isinstance(layer, nn.EmbeddingBag)
    kind = WeightOnlyEmbeddingBag if bag else WeightOnlyEmbedding
    if isinstance(recipe, Int4WeightOnly):
        size, symmetric = recipe.group_size, recipe.symmetric
        made = kind.from_float(layer, bits=4, group_size=size, symmetric=symmetric)
        return LayerResult(made, "nearest values")
    return LayerResult(kind.from_float(layer), "per-row scales")


def _recurrent_reason(layer: Any, recipe: Recipe) -> str:
    kind = type(layer).__name__
    if type(layer) not in (nn.LSTM, nn.GRU):
        return f"{kind} may compute something else than torch's own"
    if isinstance(recipe, (Int8WeightOnly, Int4WeightOnly)):
        return f"{kind} has a dynamic INT8 form only; give it Int8Dynamic() by an override"
    if getattr(layer, "proj_size", 0):
        return "it has a projection (proj_size), which the INT8 form has not"
    return ""  # the dynamic form needs no scales, so it serves Int8Static too


def _make_recurrent(layer: Any, _recipe: Recipe, _inputs: LayerInputs | None) -> LayerResult:
    kind = Int8LSTM if isinstance(layer, nn.LSTM) else Int8GRU
    return LayerResult(kind.from_float(layer), "per-token scales", recipe="int8 dynamic")


def _convolution_reason(_layer: Any, recipe: Recipe) -> str:
    if isinstance(recipe, Int8Static):
        return ""
    return "convolutions quantize with scales of whole tensors; use Int8Static()"


LAYER_TYPES: Sequence[LayerType] = (
    LayerType(
        is_linear,
        _linear_reason,
        _make_linear,
        (Int8Linear, WeightOnlyLinear),
        calibrated=True,
        fewest=128 * 128,  # of fewer, quantizing the input costs more than the product saves
    ),
    LayerType(
        _is(nn.Embedding, nn.EmbeddingBag),
        _embedding_reason,
        _make_embedding,
        (WeightOnlyEmbedding, WeightOnlyEmbeddingBag),
        fewest=128 * 128,
    ),
    LayerType(_is(nn.LSTM, nn.GRU), _recurrent_reason, _make_recurrent, (Int8LSTM, Int8GRU)),
    LayerType(_is(nn.Conv2d), _convolution_reason, None, (Int8Conv2d,)),
)

QUANTIZED = {kind.__name__: kind for one in LAYER_TYPES for kind in one.quantized}
"""Name -> class of every quantized layer that a saved model may name."""

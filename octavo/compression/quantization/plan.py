"""Which layers a recipe changes, and why the others stay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from octavo.compression.quantization.recipes import (
    Int4WeightOnly,
    Int8Static,
    Int8WeightOnly,
    Recipe,
)
from octavo.graph.select import Selector, check_selectors, selected
from octavo.layers.attention.multihead import RowsLinear
from octavo.layers.linear.int8 import as_linear, is_linear
from octavo.layers.module import QuantizedModule

__all__ = ["Choice", "plan"]


FEWEST = 128 * 128
"""Weights below which quantizing the input costs more than the smaller product saves."""
_NEEDS_STATIC = "convolutions quantize with scales of whole tensors; use Int8Static()"
_KNOWN_FORWARDS = (nn.Linear.forward, RowsLinear.forward)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """What happens to one layer.

    Attributes:
        name: in `named_modules()`.
        module: the layer.
        recipe: what it becomes; None if it stays.
        reason: why it stays.
    """

    name: str
    module: nn.Module
    recipe: Recipe | None
    reason: str = ""


def plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    overrides: Mapping[str, Recipe | None] | None = None,
) -> list[Choice]:
    """Decides about every layer with weights of two or more axes.

    Args:
        model: its attention taken apart (see `structure`).
        recipe: for all layers.
        include: layers to change; a layer that it matches is changed though it is small. None
            stands for all.
        exclude: layers to leave, also among those included.
        overrides: pattern of names -> another recipe, or None to leave the layer; the last one
            that matches counts.

    Raises:
        InputError: a selector that matches nothing, or is of another kind.
    """
    overrides = dict(overrides or {})
    layers = list(_layers(model))
    check_selectors((*(include or ()), *exclude, *overrides), layers, "layer with weights")
    tied = _tied_elsewhere(model)
    choices = []
    for name, module in layers:
        wanted = include is not None and selected(include, name, module)
        chosen: Recipe | None = recipe
        for pattern, other in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                chosen = other
                wanted = True
        if selected(exclude, name, module):
            reason = "excluded"
        elif chosen is None:
            reason = "left in float by an override"
        elif include is not None and not wanted:
            reason = "not included"
        else:
            reason = _why_not(module, chosen, tied, wanted)
        choices.append(Choice(name, module, None if reason else chosen, reason))
    return choices


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # it makes a weight for the layer that holds it
        wide = any(p.ndim > 1 for p in module.parameters(recurse=False))
        if wide or isinstance(module, QuantizedModule) or is_linear(module):
            yield name, module


def _tied_elsewhere(model: nn.Module) -> dict[int, str]:
    """Identity of a parameter that something else than a Linear holds -> the name of that."""
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if not is_linear(module)
        for parameter in module.parameters(recurse=False)
    }


def _why_not(module: nn.Module, recipe: Recipe, tied: Mapping[int, str], wanted: bool) -> str:
    if isinstance(module, QuantizedModule):
        return "is quantized already"
    if isinstance(module, (nn.LSTM, nn.GRU)):
        return _why_not_recurrent(module, recipe)
    if isinstance(module, nn.Conv2d):
        return "" if isinstance(recipe, Int8Static) else _NEEDS_STATIC
    if not is_linear(module):
        return f"Octavo has no INT8 layer for {type(module).__name__}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight itself"
    if isinstance(module, nn.Linear) and type(module).forward not in _KNOWN_FORWARDS:
        return f"{type(module).__name__} computes something of its own in forward"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if id(module.weight) in tied:
        return f"its weight is tied to {tied[id(module.weight)]!r}, which stays in float"
    linear = as_linear(module)
    if linear.weight.dtype not in FLOATS:
        return f"its weight is {linear.weight.dtype}"
    if isinstance(recipe, Int4WeightOnly) and linear.in_features % recipe.group_size:
        return f"group_size {recipe.group_size} does not divide its {linear.in_features} inputs"
    if not wanted and linear.weight.numel() < FEWEST:
        return f"too small to gain: {linear.out_features} x {linear.in_features} weights"
    return ""


def _why_not_recurrent(module: nn.LSTM | nn.GRU, recipe: Recipe) -> str:
    kind = type(module).__name__
    if type(module) not in (nn.LSTM, nn.GRU):
        return f"{kind} may compute something else than torch's own"
    if isinstance(recipe, (Int8WeightOnly, Int4WeightOnly)):
        return f"{kind} has a dynamic INT8 form only; give it Int8Dynamic() by an override"
    if getattr(module, "proj_size", 0):
        return "it has a projection (proj_size), which the INT8 form has not"
    return ""  # the dynamic form needs no scales, so it serves Int8Static too

"""Which layers a recipe changes, and why the others stay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from octavo.compression.quantization.recipes import Recipe, by_itself, weight_format
from octavo.compression.quantization.registry import layer_type
from octavo.graph.select import Selector, check_selectors, selected
from octavo.layers.linear.int8 import as_linear, is_linear
from octavo.layers.module import QuantizedModule

__all__ = ["Choice", "plan"]


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
    together: Sequence[Sequence[str]] = (),
) -> list[Choice]:
    """Decides about every layer with weights of two or more axes.

    Args:
        model: its attention decomposed (see `octavo.graph.patch`).
        recipe: for all layers.
        include: layers to change; a layer that it matches is changed though it is small. None
            stands for all.
        exclude: layers to leave, also among those included.
        overrides: pattern of names -> another recipe, or None to leave the layer; the last one
            that matches counts.
        together: names of layers that gain from one another; they are changed though small.

    Raises:
        InputError: a selector that matches nothing, or is of another kind.
    """
    overrides = dict(overrides or {})
    layers = list(_layers(model))
    check_selectors((*(include or ()), *exclude, *overrides), layers, "layer with weights")
    partners = {name for names in together for name in names}
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
            reason = _reason(module, chosen, small=wanted or name in partners)
        choices.append(Choice(name, module, None if reason else chosen, reason))
    return _keep_tied(model, choices)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # it makes a weight for the layer that holds it
        wide = any(p.ndim > 1 for p in module.parameters(recurse=False))
        if wide or isinstance(module, QuantizedModule) or is_linear(module):
            yield name, module


def _reason(module: nn.Module, recipe: Recipe, *, small: bool) -> str:
    if isinstance(module, QuantizedModule):
        return "is quantized already"
    kind = layer_type(module)
    if kind is None:
        return f"Octavo has no INT8 layer for {type(module).__name__}"
    reason = kind.reason(module, recipe)
    if not reason and not small and _count(module) < kind.fewest:
        weight: Any = (as_linear(module) if is_linear(module) else module).weight
        return f"too small to gain: {' x '.join(map(str, weight.shape))} weights"
    return reason


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _keep_tied(model: nn.Module, choices: Sequence[Choice]) -> list[Choice]:
    """Layers of several kinds with one weight get one quantized weight, or stay in float."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                holders.setdefault(id(parameter), []).append(name)
    found = {choice.name: choice for choice in choices}
    for names in holders.values():
        recipes = {name: found[name].recipe if name in found else None for name in names}
        kinds = {layer_type(model.get_submodule(name)) for name in names}
        if len(kinds) == 1:  # Linears with one weight are alike, so what is made of it is too
            continue
        formats = {name: recipe and weight_format(recipe) for name, recipe in recipes.items()}
        for name, recipe in recipes.items():
            if recipe is None:
                continue
            other = next((one for one in names if formats[one] != formats[name]), None)
            if other is None:
                found[name] = replace(found[name], recipe=by_itself(recipe))
                continue
            fate = f"becomes {recipes[other]}" if recipes[other] else "stays in float"
            reason = f"its weight is tied to {other!r}, which {fate}"
            found[name] = replace(found[name], recipe=None, reason=reason)
    return [found[choice.name] for choice in choices]

"""Quantized layers for the float ones that a plan chose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from octavo.calibration.inputs import LayerInputs, collect_inputs
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import Int4WeightOnly
from octavo.compression.quantization.registry import LayerResult, layer_type
from octavo.core.errors import OctavoError
from octavo.core.progress import Progress
from octavo.layers.module import QuantizedModule

__all__ = ["quantized_layers", "share_weights"]


def quantized_layers(
    model: nn.Module,
    choices: Sequence[Choice],
    batches: Iterable[Any] | None,
    progress: Progress,
) -> dict[str, LayerResult]:
    """Makes what the choices ask for; the model is not changed.

    Args:
        model: the float model.
        choices: for its layers.
        batches: calibration data, for those that use some; None for none.
        progress: where to show progress.

    Returns:
        name -> the quantized layer. One that needs data which did not reach it is left out.

    Raises:
        OctavoError: of the kind that the making of a layer raised, with its name.
    """
    chosen = [choice for choice in choices if choice.recipe is not None]
    inputs = {} if batches is None else _inputs(model, chosen, batches, progress)
    made: dict[str, LayerResult] = {}
    with progress.task("Quantizing layers", len(chosen)) as advance:
        for choice in chosen:
            kind, recipe = layer_type(choice.module), choice.recipe
            assert kind and recipe  # noqa: S101, PT018 - the plan saw to it
            seen = inputs.get(choice.name)
            unreached = kind.calibrated and recipe.needs_calibration and seen is None
            if kind.make is not None and not unreached:
                try:
                    made[choice.name] = kind.make(choice.module, recipe, seen)
                except OctavoError as error:
                    raise type(error)(f"layer {choice.name!r}: {error}") from error
            advance(1)
    share_weights(chosen, made)
    return made


def _inputs(
    model: nn.Module, choices: Sequence[Choice], batches: Iterable[Any], progress: Progress
) -> dict[str, LayerInputs]:
    watched, gram = {}, []
    for choice in choices:
        kind, recipe = layer_type(choice.module), choice.recipe
        if kind is None or recipe is None or not (kind.calibrated and recipe.uses_calibration):
            continue
        watched[choice.name] = choice.module
        if isinstance(recipe, Int4WeightOnly):
            gram.append(choice.name)
    return collect_inputs(model, watched, batches, progress, gram=gram) if watched else {}


def share_weights(choices: Sequence[Choice], made: Mapping[str, LayerResult]) -> None:
    """Layers whose float weight was one tensor get one quantized weight, where theirs are equal.

    Args:
        choices: for the float layers.
        made: name -> the quantized layer.
    """
    first: dict[int, QuantizedModule] = {}
    for choice in choices:
        new = made[choice.name].layer if choice.name in made else None
        weight = getattr(choice.module, "weight", None)
        if not isinstance(new, QuantizedModule) or not isinstance(weight, torch.Tensor):
            continue
        old = first.setdefault(id(weight), new)
        for mine, its in zip(new.record, old.record, strict=False):
            one, other = new._buffers.get(mine), old._buffers.get(its)
            if one is not None and other is not None and torch.equal(one, other):
                new._buffers[mine] = other

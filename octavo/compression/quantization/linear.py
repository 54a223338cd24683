"""."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn

from octavo.calibration.inputs import InputCollector, LayerInputs
from octavo.calibration.observers import OBSERVERS
from octavo.calibration.statistics import TensorStatistics
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import Int4WeightOnly, Int8Static, Recipe
from octavo.compression.quantization.smooth import Bound
from octavo.compression.quantization.swap import Made, quantized_layer
from octavo.core.errors import CalibrationError
from octavo.core.models import evaluating, run_batch
from octavo.core.progress import Progress
from octavo.layers.linear.int8 import is_linear

__all__ = []


def _calibrate(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Iterable[Any] | None,
    progress: Progress,
) -> dict[str, LayerInputs]:
    """Runs the batches and keeps what the layers were given."""
    watched = {
        choice.name: choice.module
        for choice in choices
        if is_linear(choice.module)
        and choice.recipe is not None
        and (choice.recipe.needs_calibration or isinstance(choice.recipe, Int4WeightOnly))
    }
    if calibration is None or not watched:
        return {}
    gram = [c.name for c in choices if isinstance(c.recipe, Int4WeightOnly)]
    total = len(calibration) if isinstance(calibration, Sized) else None
    count = 0
    with (
        evaluating(model),
        InputCollector(watched, gram=gram) as collector,
        progress.task("Watching the layers' inputs", total) as advance,
    ):
        for count, batch in enumerate(calibration, 1):
            run_batch(model, batch, f"calibration batch {count - 1}")
            advance(1)
    if not count:
        raise CalibrationError("calibration has no batches; give a few batches of real inputs")
    if not collector.inputs:
        raise CalibrationError(
            f"no layer to quantize ran during calibration, such as {next(iter(watched))!r}; give "
            "batches that reach them"
        )
    _share_inputs(watched, collector.inputs)
    return collector.inputs


def _share_inputs(layers: Mapping[str, nn.Module], inputs: dict[str, LayerInputs]) -> None:
    """Layers with the same weight get the same scales, so that they still have it afterwards."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        if name in inputs:
            other = first.setdefault(id(layer.weight), name)
            if other != name:
                inputs[other].merge(inputs[name])
                inputs[name] = inputs[other]


def _make(
    choices: Sequence[Choice], inputs: Mapping[str, LayerInputs], progress: Progress
) -> dict[str, Made]:
    """Name -> the new layer. Tied weights stay tied."""
    chosen = [choice for choice in choices if choice.recipe is not None]
    made: dict[str, Made] = {}
    with progress.task("Quantizing layers", len(chosen)) as advance:
        for choice in chosen:
            recipe = choice.recipe
            seen = inputs.get(choice.name)
            unreached = is_linear(choice.module) and seen is None
            if not (unreached and recipe is not None and recipe.needs_calibration):
                bounds = _bounds(recipe.observer) if isinstance(recipe, Int8Static) else ()
                made[choice.name] = quantized_layer(choice, seen, bounds)
            advance(1)
    _tie(chosen, made)
    return made


def _tie(choices: Sequence[Choice], made: Mapping[str, Made]) -> None:
    first: dict[tuple[int, Recipe | None], nn.Module] = {}
    for choice in choices:
        if choice.name not in made or not is_linear(choice.module):
            continue
        new = made[choice.name].layer
        old = first.setdefault((id(choice.module.weight), choice.recipe), new)
        for name in ("weight", "weight_scale", "zero_point"):
            mine, other = new._buffers.get(name), old._buffers.get(name)
            if mine is not None and other is not None and torch.equal(mine, other):
                new._buffers[name] = other


def _bounds(observer: str) -> tuple[Bound, ...]:
    names = [name for name in OBSERVERS if name != "moving-average"]
    return tuple(_bound(name) for name in (names if observer == "auto" else [observer]))


def _bound(observer: str) -> Bound:
    def bound(rows: torch.Tensor, peak: torch.Tensor) -> float:
        if observer == "minmax":
            return float(peak.max())
        statistics = TensorStatistics()
        statistics.update("input", rows.numpy(), 0)
        low, high = OBSERVERS[observer].range(statistics, "int8")
        return max(-low, high)

    return bound

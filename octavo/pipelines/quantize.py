"""octavo.quantize: a float model in, the same model with INT8 layers swapped in out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import nn

from octavo.calibration.observers import OBSERVERS
from octavo.calibration.statistics import TensorStatistics
from octavo.calibration.table import CalibrationTable
from octavo.core.errors import CalibrationError, InputError
from octavo.core.progress import Progress, default_progress
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.layers.inputs import InputCollector, LayerInputs
from octavo.layers.linear_kinds import is_linear
from octavo.layers.plan import Choice, Selector, plan
from octavo.layers.recipes import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    Recipe,
)
from octavo.layers.smooth import Bound
from octavo.layers.structure import Edits, take_apart
from octavo.layers.swap import Made, install, quantized_layer
from octavo.pipelines.convolutions import calibrate_convolutions
from octavo.pipelines.models import evaluating, held_bytes, run_batch

__all__ = ["quantize"]

RECIPES = (Int8Dynamic, Int8Static, Int8WeightOnly, Int4WeightOnly)


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    *,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    overrides: Mapping[str, Recipe | None] | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    progress: Progress | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Swaps INT8 layers in for float ones.

    Linear layers, the projections of nn.MultiheadAttention, nn.LSTM and nn.GRU are swapped; an
    activation that follows a Linear is computed by it. With `Int8Static` a model with convolutions
    becomes a graph of fused INT8 layers (see `octavo.fuse`) that hand each other codes, with the
    scales that `octavo.calibrate` finds. Layers that would not gain or would break stay as they
    are, and the summary says why. A model that could not be quantized is left as it was.

    Args:
        model: a float model; for inference.
        recipe: `Int8Dynamic()`, `Int8Static()`, `Int8WeightOnly()` or `Int4WeightOnly()`.
        calibration: batches of real data: a tensor, a tuple of arguments or a dict of keyword
            arguments each. Static scales and SmoothQuant need them, 4-bit weights gain from them.
            For convolutions also the table that `octavo.calibrate` made of this model.
        include: patterns of names, types or functions of (name, module) that select layers; by
            default all. A layer that one selects is swapped though it is small.
        exclude: the same, for layers to leave.
        overrides: pattern of names -> another recipe, or None to leave the layer.
        example_inputs: what to trace a model with convolutions with; by default the first batch.
        inplace: change `model` itself; by default a copy, which takes the memory of both.
        progress: where to show progress; by default bars on a terminal.
        verbose: print what was swapped, what not and why.

    Returns:
        the quantized model; `octavo_summary` is a `SwapSummary`.

    Raises:
        InputError: a model, recipe, selector or batch that does not fit.
        CalibrationError: no data where the recipe needs it, or NaN or infinity in it.
    """
    _check(model, recipe, calibration, overrides)
    work = model if inplace else copy.deepcopy(model)
    before, edits = held_bytes(work), Edits()
    try:
        refused = take_apart(work, edits)
        choices = plan(work, recipe, include=include, exclude=exclude, overrides=overrides)
        shown = progress or default_progress()
        if inplace and any(isinstance(one.module, nn.Conv2d) and one.recipe for one in choices):
            raise InputError(
                "a model with convolutions becomes a graph of its own; use what "
                "quantize(..., inplace=False) returns, or exclude torch.nn.Conv2d"
            )
        graph = calibrate_convolutions(model, choices, calibration, example_inputs, shown)
        rest = [
            choice
            for choice in choices
            if choice.name not in graph.forms and not isinstance(choice.module, nn.Conv2d)
        ]
        inputs = _calibrate(work, rest, graph.batches, shown)
        made = _make(rest, inputs, shown)
        layers = {choice.module: made[choice.name].layer for choice in rest if choice.name in made}
        if "" in made:
            if inplace:
                raise InputError(
                    f"the model is itself a {type(model).__name__}, which cannot be replaced in "
                    "place; use what quantize(..., inplace=False) returns"
                )
            work = made[""].layer
        else:
            install(work, layers, edits)
        if graph.forms:
            work = graph.apply(work if layers else None)
    except BaseException:
        edits.undo()
        raise
    refused.update(graph.refused)
    made.update(graph.made)
    swaps = [_describe(choice, made, refused) for choice in choices]
    summary = SwapSummary(tuple(swaps), before, held_bytes(work))
    work.octavo_summary = summary  # type: ignore[assignment] # a plain attribute
    if verbose:
        from octavo.reports import print_swaps

        print_swaps(summary)
    return work


def _check(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | None,
    overrides: Mapping[str, Recipe | None] | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    for given in (recipe, *(value for value in (overrides or {}).values() if value is not None)):
        if not isinstance(given, RECIPES):
            raise InputError(
                f"{given!r} is not a recipe; give Int8Dynamic(), Int8Static(), Int8WeightOnly() or "
                "Int4WeightOnly(), with the brackets"
            )
        if given.needs_calibration and calibration is None:
            raise CalibrationError(
                f"{given!r} needs calibration data; give a few batches of real inputs"
            )
    if isinstance(calibration, (torch.Tensor, np.ndarray, str, Mapping)):
        raise InputError(
            f"calibration is a {type(calibration).__name__}; give a list of batches, such as [x]"
        )


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


def _describe(choice: Choice, made: Mapping[str, Made], refused: Mapping[str, str]) -> LayerSwap:
    kind, before = type(choice.module).__name__, held_bytes(choice.module, recurse=False)
    kind = {"RowsLinear": "Linear"}.get(kind, kind)
    if choice.name in made:
        new = made[choice.name]
        recurrent = isinstance(choice.module, (nn.LSTM, nn.GRU))
        became = "int8 dynamic" if recurrent else str(choice.recipe)
        after = held_bytes(new.layer)
        return LayerSwap(choice.name, kind, became, new.detail, new.sqnr_db, before, after)
    reason = choice.reason or "calibration data never reached it"
    reason = refused.get(choice.name, refused.get(choice.name.rpartition(".")[0], reason))
    return LayerSwap(choice.name, kind, "", reason, None, before, before)

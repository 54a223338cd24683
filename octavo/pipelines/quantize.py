"""octavo.quantize: a float model in, the same model with INT8 layers swapped in out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from octavo.calibration.table import CalibrationTable
from octavo.compression.quantization.convolutions import calibrate_convolutions
from octavo.compression.quantization.linear import _calibrate, _make
from octavo.compression.quantization.plan import Choice, plan
from octavo.compression.quantization.recipes import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    Recipe,
)
from octavo.compression.quantization.swap import Made
from octavo.core.errors import CalibrationError, InputError
from octavo.core.models import held_bytes
from octavo.core.progress import Progress, default_progress
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.graph.install import install
from octavo.graph.patch import Edits, take_apart
from octavo.graph.select import Selector

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

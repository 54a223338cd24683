"""octavo.quantize: a float model in, the same model with INT8 layers swapped in out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from octavo.calibration.placed import Placed
from octavo.calibration.table import CalibrationTable
from octavo.compression.quantization.convolutions import Int8Graph, calibrate_convolutions
from octavo.compression.quantization.plan import Choice, plan
from octavo.compression.quantization.recipes import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8Static,
    Int8WeightOnly,
    Recipe,
)
from octavo.compression.quantization.registry import LayerResult
from octavo.compression.quantization.static import static_linears
from octavo.compression.quantization.swap import quantized_layers
from octavo.core.errors import CalibrationError, InputError
from octavo.core.models import held_bytes, outside_inference_mode
from octavo.core.progress import Progress, default_progress
from octavo.core.swaps import LayerSwap, SwapSummary
from octavo.graph.install import compile_libraries, install
from octavo.graph.patch import Patch, decompose
from octavo.graph.select import Selector

__all__ = ["quantize"]

RECIPES = (Int8Dynamic, Int8Static, Int8WeightOnly, Int4WeightOnly)


@outside_inference_mode()
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

    Linear layers, the projections of nn.MultiheadAttention, nn.LSTM and nn.GRU are swapped, with
    weight-only recipes nn.Embedding and nn.EmbeddingBag too; an activation that follows a Linear
    is computed by it. With `Int8Static` a model with convolutions becomes a graph of fused INT8
    layers (see `octavo.fuse`) that hand each other integers, with the scales that
    `octavo.calibrate` finds. Layers that would not gain or would break stay as they are, and the
    summary says why. A model that could not be quantized is left as it was.

    Args:
        model: a float model; for inference.
        recipe: `Int8Dynamic()`, `Int8Static()`, `Int8WeightOnly()` or `Int4WeightOnly()`.
        calibration: batches of real data: a tensor, a tuple of arguments or a dict of keyword
            arguments each. Static scales and SmoothQuant need them, 4-bit weights gain from them.
            For `Int8Static` also the table that `octavo.calibrate` made of this model; it holds no
            data to smooth with.
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
        CalibrationError: no data where the recipe needs it, NaN or infinity in it, or the table of
            another model.
    """
    _check(model, recipe, calibration, overrides)
    placed = None
    if isinstance(calibration, CalibrationTable):
        placed = Placed.of_table(model, calibration, example_inputs)
    work = model if inplace else copy.deepcopy(model)
    before, patch, shown = held_bytes(work), Patch(), progress or default_progress()
    try:
        reasons = decompose(work, patch)
        choices = plan(
            work,
            recipe,
            include=include,
            exclude=exclude,
            overrides=overrides,
            together=() if placed is None else placed.equalized(),
        )
        _check_replaceable(model, choices, inplace)
        graph = calibrate_convolutions(model, choices, placed or calibration, example_inputs, shown)
        made = _swap(work, choices, graph, placed, reasons, patch, shown)
        if "" in made:
            work = made[""].layer
        elif graph.layers:
            work = graph.apply(work if made else None)
            made.update(graph.results)
        compile_libraries(work, shown)
        swaps = [_describe(choice, made, reasons) for choice in choices]
        summary = SwapSummary(tuple(swaps), before, held_bytes(work))
    except BaseException:
        patch.rollback()
        raise
    work.octavo_summary = summary  # type: ignore[assignment] # a plain attribute
    if verbose:
        from octavo.reports import print_swaps

        print_swaps(summary)
    return work


def _swap(
    model: nn.Module,
    choices: Sequence[Choice],
    graph: Int8Graph,
    placed: Placed | None,
    reasons: dict[str, str],
    patch: Patch,
    progress: Progress,
) -> dict[str, LayerResult]:
    """Puts in the layers that are not quantized in the graph; adds to `reasons` why others stay."""
    reasons.update(graph.reasons)
    rest = [
        choice
        for choice in choices
        if choice.name not in graph.layers and not isinstance(choice.module, nn.Conv2d)
    ]
    made = quantized_layers(model, rest, graph.batches, progress)
    if placed is not None and not graph.layers:
        static, staying = static_linears(rest, placed)
        made.update(static)
        reasons.update(staying)
    if "" not in made:
        layers = {choice.module: made[choice.name].layer for choice in rest if choice.name in made}
        install(model, layers, patch)
    return made


def _check(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None,
    overrides: Mapping[str, Recipe | None] | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    table = isinstance(calibration, CalibrationTable)
    for given in (recipe, *(value for value in (overrides or {}).values() if value is not None)):
        if not isinstance(given, RECIPES):
            raise InputError(
                f"{given!r} is not a recipe; give Int8Dynamic(), Int8Static(), Int8WeightOnly() or "
                "Int4WeightOnly(), with the brackets"
            )
        smooth = getattr(given, "smooth", None)
        automatic = isinstance(given, Int8Static) and smooth == "auto"
        if table and smooth is not None and not automatic:
            raise InputError(f"{given!r} smooths with data, and a table has none; give batches")
        if given.needs_calibration and calibration is None:
            raise CalibrationError(
                f"{given!r} needs calibration data; give a few batches of real inputs"
            )
    given_recipes = (recipe, *(overrides or {}).values())
    if table and not any(isinstance(one, Int8Static) for one in given_recipes):
        raise InputError(f"{recipe!r} does not read a table; give Int8Static(), or batches")
    if isinstance(calibration, (torch.Tensor, np.ndarray, str, Mapping)):
        raise InputError(
            f"calibration is a {type(calibration).__name__}; give a list of batches, such as [x]"
        )


def _check_replaceable(model: nn.Module, choices: Sequence[Choice], inplace: bool) -> None:
    """Refuses to change a model in place that becomes another object."""
    wanted = [choice for choice in choices if choice.recipe is not None]
    if inplace and any(isinstance(choice.module, nn.Conv2d) for choice in wanted):
        raise InputError(
            "a model with convolutions becomes a graph of its own; use what "
            "quantize(..., inplace=False) returns, or exclude torch.nn.Conv2d"
        )
    if inplace and any(choice.name == "" for choice in wanted):
        raise InputError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; use what quantize(..., inplace=False) returns"
        )


def _describe(
    choice: Choice, made: Mapping[str, LayerResult], reasons: Mapping[str, str]
) -> LayerSwap:
    kind, before = type(choice.module).__name__, held_bytes(choice.module, recurse=False)
    kind = {"RowsLinear": "Linear"}.get(kind, kind)
    if choice.name in made:
        new = made[choice.name]
        became, after = new.recipe or str(choice.recipe), held_bytes(new.layer)
        return LayerSwap(choice.name, kind, became, new.detail, new.sqnr_db, before, after)
    reason = choice.reason or "calibration data never reached it"
    reason = reasons.get(choice.name, reasons.get(choice.name.rpartition(".")[0], reason))
    return LayerSwap(choice.name, kind, "", reason, None, before, before)

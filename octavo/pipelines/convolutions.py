"""Convolutions in eight bits: calibrated in the model's graph, and put into a fused one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.core.errors import CalibrationError, ExportError, InputError
from octavo.core.progress import Progress
from octavo.export.equalization import find_chains
from octavo.export.placement import place
from octavo.layers.fuse import fuse_model, merge_parallel
from octavo.layers.int8_forms import Form, Weights
from octavo.layers.int8_modules import can_be_int8, to_int8
from octavo.layers.plan import Choice
from octavo.layers.recipes import Int8Static
from octavo.layers.swap import Made
from octavo.pipelines.calibrate import calibrate_source
from octavo.pipelines.forms import forms_and_weights, forms_of_modules, module_of
from octavo.pipelines.models import in_evaluation
from octavo.pipelines.sources import ModelSource, first_batch, resolve_model

__all__ = ["Int8Graph", "calibrate_convolutions"]


@dataclass
class Int8Graph:
    """What becomes of the layers that are quantized in a model's graph.

    Attributes:
        batches: calibration data for the other layers.
        example: a batch, to trace the model with.
        fused: the float model, fused.
        forms: name of a module -> the codes around it; empty where there are no convolutions.
        weights: the same name -> what it computes with.
        merged: the same name -> the parallel convolutions that the layer stands for.
        made: name -> the INT8 layer, after `apply`.
        refused: name of a convolution -> why it stays in float.
        detail: what was chosen for the layers, in words.
    """

    batches: Iterable[Any] | None
    example: Any = None
    fused: nn.Module | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    detail: str = "a scale a tensor"

    def apply(self, changed: nn.Module | None) -> nn.Module:
        """The fused model, with the INT8 layers in it.

        Args:
            changed: the float model, where layers of it have been swapped since it was fused.
        """
        fused = self.fused if changed is None else fuse_model(changed.eval(), self.example)[0]
        assert fused is not None  # noqa: S101 - forms come with a fused model
        result, layers = to_int8(fused, self.forms, self.weights)
        for name, layer in layers.items():
            self.made[name] = Made(layer, self.detail)
            for other in self.merged.get(name, ()):
                if other != name:  # its weights are in that layer
                    self.made[other] = Made(nn.Identity(), f"in one convolution with {name!r}")
        return result


def calibrate_convolutions(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Iterable[Any] | CalibrationTable | None,
    example: Any,
    progress: Progress,
) -> Int8Graph:
    """Finds the codes of a model's convolutions, and of its Linears that are not smoothed.

    Args:
        model: the float model.
        choices: what is wanted for each of its layers.
        calibration: batches of real data, or the table of this model.
        example: what to export and trace the model with; None for the first batch.
        progress: where to show progress.

    Raises:
        InputError: recipes for convolutions that differ in their observer.
        CalibrationError: a table of another model, or one where data is needed.
    """
    wanted = {choice.name: choice for choice in choices if isinstance(choice.recipe, Int8Static)}
    convolutions = {name for name, one in wanted.items() if isinstance(one.module, nn.Conv2d)}
    if not convolutions:
        if isinstance(calibration, CalibrationTable):
            raise CalibrationError(
                "a table quantizes models with convolutions under Int8Static(); give batches here"
            )
        return Int8Graph(calibration)
    wanted = {
        name: choice
        for name, choice in wanted.items()
        if name in convolutions
        or (isinstance(choice.module, nn.Linear) and choice.recipe.smooth is None)  # type: ignore[union-attr]
    }
    observers = {choice.recipe.observer for choice in wanted.values()}  # type: ignore[union-attr]
    if len(observers) > 1:
        raise InputError(
            f"convolutions are calibrated together, and the recipes name the observers "
            f"{', '.join(sorted(observers))}; choose one"
        )
    return _calibrated(model, wanted, observers.pop(), calibration, example, progress)


def _calibrated(
    model: nn.Module,
    wanted: Mapping[str, Choice],
    observer: str,
    calibration: Iterable[Any] | CalibrationTable | None,
    example: Any,
    progress: Progress,
) -> Int8Graph:
    batches = None
    if not isinstance(calibration, CalibrationTable):
        assert calibration is not None  # noqa: S101 - static recipes were refused without it
        first, batches = first_batch(calibration)
        if iter(batches) is batches:  # it is read again for the other layers
            batches = list(batches)
        example = first if example is None else example
    graph = Int8Graph(batches, example)
    with in_evaluation(model):
        graph.fused = fused = fuse_model(model, example)[0]
        merged, parallel = merge_parallel(model, example)
        table = calibration if isinstance(calibration, CalibrationTable) else None
        graph.merged.update(_convolutions(model, parallel))
        wanted = _all_or_none(graph, wanted, known=table is not None)
        able = can_be_int8(fused, wanted)
        why = "it is half of a pair whose other half stays, or it is called twice"
        graph.refused.update(dict.fromkeys(wanted.keys() - able, why))
        wanted = {name: choice for name, choice in wanted.items() if name in able}
        if not wanted:
            return graph
        try:
            # the engines' tensors, where they are given
            source = resolve_model(model if table else merged, example)
        except ExportError as error:
            reason = f"its graph cannot be exported: {str(error).splitlines()[0]}"
            _by_modules(graph, fused, wanted, observer, reason)
            return graph
    if table is not None:
        table.check_model(source.fingerprint)
    else:
        options = CalibrationOptions(observer, exclude=_unwanted(source, wanted))
        table = calibrate_source(source, batches or (), options, progress, verbose=False)
    forms, weights = forms_and_weights(source, table)
    graph.forms.update({name: forms[name] for name in wanted if name in forms})
    graph.weights.update({name: weights[name] for name in graph.forms})
    for name in wanted.keys() - forms.keys():
        graph.refused[name] = "no scale fits it: it is called twice, or its result feeds no layer"
    _check_equalization(source, table, graph.forms)
    return graph


def _by_modules(
    graph: Int8Graph,
    fused: nn.Module,
    wanted: Mapping[str, Choice],
    observer: str,
    reason: str,
) -> None:
    """Calibrates by hooks, where there is no graph for a table."""
    convolutions = [name for name, one in wanted.items() if isinstance(one.module, nn.Conv2d)]
    if graph.batches is None:
        graph.refused.update(dict.fromkeys(convolutions, reason))
        return
    forms, weights = forms_of_modules(fused, convolutions, graph.batches, observer)
    graph.forms.update(forms)
    graph.weights.update(weights)
    graph.detail = "a scale a tensor, calibrated by itself: the model's graph cannot be exported"
    why = "calibration data never reached it"
    graph.refused.update(dict.fromkeys(set(convolutions) - forms.keys(), why))


def _check_equalization(
    source: ModelSource, table: CalibrationTable, forms: Collection[str]
) -> None:
    """Refuses a table that moved range between a layer in INT8 and one that stays in float."""
    for chain in find_chains(source.graph, place(source.graph, table.exclude)):
        ends = [module_of(layer.weight or "") for layer in (chain.producer, *chain.consumers)]
        staying = [name or chain.tensor for name in ends if name not in forms]
        if chain.tensor in table.equalization and staying:
            raise CalibrationError(
                f"the table equalizes the weights around {staying[0]!r}, which stays in float; "
                "calibrate with it in exclude, or with equalization=False"
            )


def _convolutions(
    model: nn.Module, parallel: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The convolutions among the layers that were merged."""
    kinds = dict(model.named_modules())
    return {
        name: tuple(one for one in layers if isinstance(kinds.get(one), nn.Conv2d))
        for name, layers in parallel.items()
    }


def _all_or_none(
    graph: Int8Graph, wanted: Mapping[str, Choice], *, known: bool
) -> dict[str, Choice]:
    """Of parallel convolutions the merged one, where all of them are wanted."""
    left = dict(wanted)
    for name, layers in graph.merged.items():
        floating = [one for one in layers if one not in wanted]
        why = ""
        if floating:
            why = f"it is one convolution with {floating[0]!r}, which stays in float"
        elif known:
            why = (
                "it is one with parallel convolutions, which the table does not know; give batches"
            )
        for one in layers:
            if why or one != name:
                left.pop(one, None)
            if why and one in wanted:
                graph.refused[one] = why
    return left


def _unwanted(source: ModelSource, wanted: Collection[str]) -> tuple[str, ...]:
    """Weights of the layers that stay in float, or are quantized elsewhere."""
    held = [layer.weight for layer in place(source.graph).layers if layer.weight is not None]
    return tuple(weight for weight in held if module_of(weight) not in wanted)

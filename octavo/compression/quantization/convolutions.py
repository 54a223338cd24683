"""Convolutions in eight bits: calibrated in the model's graph, and put into a fused one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from octavo.calibration import CalibrationOptions, TorchCollector
from octavo.calibration.observers import OBSERVERS, choose_range
from octavo.calibration.placed import Placed, weights_outside
from octavo.calibration.sources import first_batch, resolve_model
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import Int8Static
from octavo.compression.quantization.registry import LayerResult
from octavo.compression.quantization.static import layer_qparams
from octavo.core.errors import ExportError, InputError, first_line
from octavo.core.models import evaluating, in_evaluation, run_batch
from octavo.core.progress import Progress
from octavo.graph import fuse_model, merge_parallel
from octavo.graph.lower import can_be_int8, to_int8
from octavo.graph.scales import LayerQParams, names_in, parts_of
from octavo.quant.weights import quantize_weight

__all__ = ["Int8Graph", "calibrate_convolutions", "qparams_of_modules"]

_ALONE = "its other half stays in float, or it is called twice"
_NO_SCALE = "no scale fits it: it is called twice, or its result feeds no layer"
_UNREACHED = "calibration data never reached it"


@dataclass
class Int8Graph:
    """What becomes of the layers that are quantized in a model's graph.

    Attributes:
        batches: calibration data for the other layers.
        example: a batch, to trace the model with.
        fused: the float model, fused.
        layers: name of a module -> how it is quantized; empty where there are no convolutions.
        merged: the same name -> the parallel convolutions that the layer stands for.
        results: name -> the INT8 layer, after `apply`.
        reasons: name of a convolution -> why it stays in float.
        detail: what was chosen for the layers, in words.
    """

    batches: Iterable[Any] | None
    example: Any = None
    fused: nn.Module | None = None
    layers: dict[str, LayerQParams] = field(default_factory=dict)
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    results: dict[str, LayerResult] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    detail: str = "per-tensor scales"

    def apply(self, changed: nn.Module | None) -> nn.Module:
        """The fused model, with the INT8 layers in it.

        Args:
            changed: the float model, where layers of it have been swapped since it was fused.
        """
        fused = self.fused if changed is None else fuse_model(changed.eval(), self.example)[0]
        assert fused is not None  # noqa: S101 - layers come with a fused model
        result, layers = to_int8(fused, self.layers)
        for name, layer in layers.items():
            self.results[name] = LayerResult(layer, self.detail)
            for other in self.merged.get(name, ()):
                if other != name:  # its weights are in that layer
                    detail = f"in one convolution with {name!r}"
                    self.results[other] = LayerResult(nn.Identity(), detail)
        return result


def calibrate_convolutions(
    model: nn.Module,
    choices: Sequence[Choice],
    calibration: Iterable[Any] | Placed | None,
    example: Any,
    progress: Progress,
) -> Int8Graph:
    """Finds the scales of a model's convolutions, and of its Linears that are not smoothed.

    Args:
        model: the float model.
        choices: what is wanted for each of its layers.
        calibration: batches of real data, or the model with its table.
        example: what to export and trace the model with; None for the first batch.
        progress: where to show progress.

    Raises:
        InputError: recipes for convolutions that differ in their observer.
        CalibrationError: a table that equalizes around a layer that stays in float.
    """
    static = [choice for choice in choices if isinstance(choice.recipe, Int8Static)]
    convolutions = {one.name for one in static if isinstance(one.module, nn.Conv2d)}
    placed = calibration if isinstance(calibration, Placed) else None
    if not convolutions:
        return Int8Graph(None if isinstance(calibration, Placed) else calibration)
    wanted, observers = {}, set()
    for choice in static:
        assert isinstance(choice.recipe, Int8Static)  # noqa: S101 - chosen for it
        smoothed = placed is None and choice.recipe.smooth is not None
        if choice.name in convolutions or (isinstance(choice.module, nn.Linear) and not smoothed):
            wanted[choice.name] = choice
            observers.add(choice.recipe.observer)
    if isinstance(calibration, Placed):
        return _of_table(model, wanted, calibration, example)
    if len(observers) > 1:
        raise InputError(
            f"convolutions are calibrated together, and the recipes name the observers "
            f"{', '.join(sorted(observers))}; choose one"
        )
    assert calibration is not None  # noqa: S101 - static recipes were refused without it
    return _of_batches(model, wanted, observers.pop(), calibration, example, progress)


def _of_table(
    model: nn.Module, wanted: dict[str, Choice], placed: Placed, example: Any
) -> Int8Graph:
    graph = Int8Graph(None, placed.table.example_inputs() if example is None else example)
    with in_evaluation(model):
        graph.fused = fuse_model(model, graph.example)[0]
        parallel = merge_parallel(model, graph.example)[1]
    reason = "it is one with parallel convolutions, which the table does not know; give batches"
    for name in (one for together in _convolutions(model, parallel).values() for one in together):
        if wanted.pop(name, None) is not None:
            graph.reasons[name] = reason
    _take(graph, placed, _able(graph, wanted))
    placed.check_equalization(graph.layers)
    return graph


def _of_batches(
    model: nn.Module,
    wanted: dict[str, Choice],
    observer: str,
    calibration: Iterable[Any],
    example: Any,
    progress: Progress,
) -> Int8Graph:
    first, batches = first_batch(calibration)
    if iter(batches) is batches:  # it is read again for the other layers
        batches = list(batches)
    graph = Int8Graph(batches, first if example is None else example)
    with in_evaluation(model):
        graph.fused = fuse_model(model, graph.example)[0]
        merged, parallel = merge_parallel(model, graph.example)
        graph.merged.update(_convolutions(model, parallel))
        _all_or_none(graph, wanted)
        wanted = _able(graph, wanted)
        if not wanted:
            return graph
        try:
            source = resolve_model(merged, graph.example)
        except ExportError as error:
            _by_modules(graph, wanted, observer, first_line(error))
            return graph
        options = CalibrationOptions(observer, exclude=weights_outside(source, wanted))
        _take(graph, Placed.calibrated(source, batches, options, progress), wanted)
    return graph


def _convolutions(
    model: nn.Module, parallel: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The convolutions among the layers that were merged."""
    kinds = dict(model.named_modules())
    return {
        name: tuple(one for one in layers if isinstance(kinds.get(one), nn.Conv2d))
        for name, layers in parallel.items()
    }


def _all_or_none(graph: Int8Graph, wanted: dict[str, Choice]) -> None:
    """Of parallel convolutions leaves the merged one, where all of them are wanted."""
    for name, layers in graph.merged.items():
        staying = [one for one in layers if one not in wanted]
        for one in layers:
            if staying and wanted.pop(one, None) is not None:
                reason = f"it is one convolution with {staying[0]!r}, which stays in float"
                graph.reasons[one] = reason
            elif one != name:
                wanted.pop(one, None)


def _able(graph: Int8Graph, wanted: Mapping[str, Choice]) -> dict[str, Choice]:
    assert graph.fused is not None  # noqa: S101 - the caller fused it
    able = can_be_int8(graph.fused, wanted)
    graph.reasons.update(dict.fromkeys(wanted.keys() - able, _ALONE))
    return {name: choice for name, choice in wanted.items() if name in able}


def _take(graph: Int8Graph, placed: Placed, wanted: Collection[str]) -> None:
    found = layer_qparams(placed)
    graph.layers.update({name: found[name] for name in wanted if name in found})
    graph.reasons.update({name: _NO_SCALE for name in wanted if name not in found})


def _by_modules(graph: Int8Graph, wanted: Mapping[str, Choice], observer: str, reason: str) -> None:
    """Calibrates by hooks, where there is no graph for a table."""
    assert graph.fused is not None  # noqa: S101 - the caller fused it
    assert graph.batches is not None  # noqa: S101 - and has batches
    convolutions = [name for name, one in wanted.items() if isinstance(one.module, nn.Conv2d)]
    graph.layers.update(qparams_of_modules(graph.fused, convolutions, graph.batches, observer))
    detail = f"found layer by layer, as the graph cannot be exported ({reason})"
    graph.detail = f"per-tensor scales, {detail}"
    unreached = (name for name in convolutions if name not in graph.layers)
    graph.reasons.update(dict.fromkeys(unreached, _UNREACHED))


def qparams_of_modules(
    model: nn.Module, names: Collection[str], batches: Iterable[Any], observer: str
) -> dict[str, LayerQParams]:
    """How each convolution of a fused model is quantized, by hooks on its modules.

    Nothing is known about who reads their results, so those stay floats; and weights are as they
    are. Inputs are asymmetric.

    Args:
        model: from `octavo.fuse`.
        names: of convolutions of the float model.
        batches: real data.
        observer: as in `Int8Static`; "auto" takes "mse" here, for there is no engine to compare.

    Returns:
        as `layer_qparams`, without convolutions that the data did not reach.

    Raises:
        CalibrationError: NaN or infinity in the input of a convolution.
        InputError: a batch that does not fit the model.
    """
    parts = {}
    for path, layer in model.named_modules():
        found = [] if isinstance(layer, nn.Linear) else names_in(layer, path, names)
        own = (path,) if len(found) == 1 else (f"{path}.depthwise", f"{path}.pointwise")
        parts.update(dict(zip(found, zip(own, parts_of(layer), strict=False), strict=False)))
    chosen = OBSERVERS["mse" if observer == "auto" else observer]
    ports = {f"{path}.input": name for name, (path, _) in parts.items()}
    with evaluating(model), TorchCollector(model, ports) as collector:
        for number, batch in enumerate(batches):
            run_batch(model, batch, f"calibration batch {number}")
    result = {}
    for port, name in ports.items():
        seen, layer = collector.statistics[port], parts[name][1]
        if seen.count:
            x = choose_range(chosen.range(seen, "uint8"), "uint8")
            scale = float(x.scale)
            weight = quantize_weight(layer.weight, 0, bias=layer.bias, input_scale=scale)
            result[name] = LayerQParams(x, bias=weight.bias is not None, weight=weight)
    return result

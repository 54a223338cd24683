"""Convolutions in eight bits: calibrated in the model's graph, and put into a fused one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from octavo.calibration import CalibrationOptions, CalibrationTable, TorchCollector
from octavo.calibration.observers import OBSERVERS, choose_range
from octavo.calibration.sources import ModelSource, calibrate_source, first_batch, resolve_model
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import Int8Static
from octavo.compression.quantization.swap import Made
from octavo.core.arrays import Array
from octavo.core.errors import CalibrationError, ExportError, InputError
from octavo.core.feeds import to_numpy
from octavo.core.models import evaluating, in_evaluation, run_batch
from octavo.core.progress import Progress
from octavo.export.equalization import find_chains
from octavo.export.onnx_model import TRANSPOSED
from octavo.export.placement import ACTIVATIONS, QuantizedLayer, place
from octavo.export.qdq import INTEGER_BIAS, adjust_weights, layer_constants
from octavo.export.unsigned import unsigned_spec
from octavo.graph import fuse_model, merge_parallel
from octavo.graph.lower import can_be_int8, to_int8
from octavo.graph.scales import Form, Weights, names_in, parts_of
from octavo.quant import QParams
from octavo.quant.weights import quantize_weight

__all__ = [
    "Int8Graph",
    "calibrate_convolutions",
    "forms_and_weights",
    "forms_of_modules",
    "module_of",
]


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
        table = calibrate_source(source, batches or (), options, progress)
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


def forms_and_weights(
    source: ModelSource, table: CalibrationTable
) -> tuple[dict[str, Form], dict[str, Weights]]:
    """The codes around each convolution and Linear, and its weights as calibration left them.

    They are those of the engines: tensors that cannot be negative get unsigned codes.

    Args:
        source: an exported module.
        table: its scales, and what is to be done to its weights.

    Returns:
        name of a module -> its codes, and -> its weights with BatchNorm folded, equalized, and
        with the bias corrected. A module that is called twice, or that the table does not know,
        is left out.
    """
    placement = place(source.graph, table.exclude)
    spec = unsigned_spec(source.graph, table.spec(placement.tensors, source.ports))
    adjusted = adjust_weights(source.graph, placement, spec)
    nodes = {node.outputs[0].name: node for node in adjusted.graph}
    sums = {name for one in placement.layers if one.op == "Add" for name in one.activations}
    counts = Counter(layer.weight for layer in placement.layers)
    forms, weights = {}, {}
    for layer in placement.layers:
        x = spec.activations.get(layer.activations[0])
        name = module_of(layer.weight or "")
        if name is None or x is None or counts[layer.weight] > 1:
            continue
        weights[name] = own = _weights(nodes[layer.output], layer, x)
        form = _form(nodes[layer.output], x, spec.activations, sums)
        forms[name] = replace(form, bias=own.bias is not None)
    return forms, weights


def module_of(weight: str) -> str | None:
    """Name of the module that holds a weight; None for a weight that no module holds as such."""
    name, _, leaf = weight.removesuffix(TRANSPOSED).rpartition(".")
    return name if leaf == "weight" else None


def _form(
    node: ir.Node, x: QParams, activations: Mapping[str, QParams], sums: Collection[str]
) -> Form:
    result = _activated(node.outputs[0], activations)
    y = activations.get(result.name or "")
    total = None
    adds = [user for user, _ in result.uses() if user.op_type == "Add"]
    if result.name in sums and len(adds) == 1:
        total = activations.get(_activated(adds[0].outputs[0], activations).name or "")
    return Form(x, y, total)


def _activated(value: ir.Value, activations: Mapping[str, QParams]) -> ir.Value:
    """The tensor behind the activation of a layer's result."""
    while value.name not in activations:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or users[0].op_type not in ACTIVATIONS:
            break
        value = users[0].outputs[0]
    return value


def _weights(node: ir.Node, layer: QuantizedLayer, x: QParams) -> Weights:
    """The integers that an engine computes with."""
    weight, bias = layer_constants(node, layer)
    if layer.op == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    ):
        weight = weight.T
    on_grid = layer.op in INTEGER_BIAS
    made = quantize_weight(weight, 0, bias=bias, input_scale=float(x.scale) if on_grid else None)
    added: Array | None = made.bias if on_grid else bias
    if layer.op == "Conv":
        added = made.bias_codes
    scale = made.qparams.scale
    return Weights(_tensor(made.codes), scale, None if added is None else _tensor(added))


def forms_of_modules(
    model: nn.Module, names: Collection[str], batches: Iterable[Any], observer: str
) -> tuple[dict[str, Form], dict[str, Weights]]:
    """The codes that each convolution of a fused model reads, by hooks on its modules.

    Nothing is known about who reads their results, so those have no codes; and weights are as they
    are. Inputs have asymmetric codes.

    Args:
        model: from `octavo.fuse`.
        names: of convolutions of the float model.
        batches: real data.
        observer: as in `Int8Static`; "auto" takes "mse" here, for there is no engine to compare.

    Returns:
        as `forms_and_weights`, without convolutions that the data did not reach.

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
    forms, weights = {}, {}
    for port, name in ports.items():
        seen, layer = collector.statistics[port], parts[name][1]
        if not seen.count:
            continue
        x = choose_range(chosen.range(seen, "uint8"), "uint8")
        bias = None if layer.bias is None else to_numpy(layer.bias.detach().float(), name)
        weight = to_numpy(layer.weight.detach().float(), name)
        made = quantize_weight(weight, 0, bias=bias, input_scale=float(x.scale))
        added = None if made.bias_codes is None else _tensor(made.bias_codes)
        forms[name] = Form(x, bias=bias is not None)
        weights[name] = Weights(_tensor(made.codes), made.qparams.scale, added)
    return forms, weights


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))

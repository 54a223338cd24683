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

from octavo.calibration import CalibrationOptions, CalibrationTable
from octavo.core.arrays import Array, Float32
from octavo.core.errors import CalibrationError, ExportError, InputError
from octavo.core.progress import Progress
from octavo.export.onnx_model import TRANSPOSED
from octavo.export.placement import ACTIVATIONS, QuantizedLayer, place
from octavo.export.qdq import INTEGER_BIAS, adjust_weights
from octavo.export.unsigned import unsigned_spec
from octavo.layers.fuse import fuse_model, merge_parallel
from octavo.layers.fuse.trace import FusedModel
from octavo.layers.int8_graph import Form, Weights, to_int8
from octavo.layers.plan import Choice
from octavo.layers.recipes import Int8Static
from octavo.layers.swap import Made
from octavo.pipelines.calibrate import calibrate_source
from octavo.pipelines.models import in_evaluation
from octavo.pipelines.sources import ModelSource, first_batch, resolve_model
from octavo.quant import QParams
from octavo.quant.weights import quantize_weight

__all__ = ["Int8Graph", "calibrate_convolutions", "forms_and_weights"]


@dataclass
class Int8Graph:
    """What becomes of the layers that are quantized in a model's graph.

    Attributes:
        batches: calibration data for the other layers.
        example: a batch, to trace the model with.
        forms: name of a module -> the codes around it; empty where there are no convolutions.
        weights: the same name -> what it computes with.
        merged: the same name -> the parallel convolutions that the layer stands for.
        made: name -> the INT8 layer, after `apply`.
        refused: name of a convolution -> why it stays in float.
    """

    batches: Iterable[Any] | None
    example: Any = None
    forms: dict[str, Form] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> nn.Module:
        """The model as a graph, with the INT8 layers in it."""
        fused, summary = fuse_model(model.eval(), self.example)
        if not isinstance(fused, FusedModel):
            why = "its graph cannot be traced: " + "; ".join(summary.notes)
            self.refused.update(dict.fromkeys(self.forms, why))
            return model
        result, layers = to_int8(fused, self.forms, self.weights)
        self.made = {name: Made(layer, "a scale a tensor") for name, layer in layers.items()}
        for name in layers.keys() & self.merged.keys():
            detail = f"in one convolution with {name!r}"  # which holds the weights of all
            self.made.update(
                {other: Made(nn.Identity(), detail) for other in self.merged[name] if other != name}
            )
        why = "it is half of a fused pair without codes, or the graph calls it twice"
        self.refused.update(dict.fromkeys(self.forms.keys() - layers.keys(), why))
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
    try:
        with in_evaluation(model):
            merged, parallel = merge_parallel(model, example)
            graph.merged.update(_convolutions(model, parallel))
            known = isinstance(calibration, CalibrationTable)  # the engines' tensors, not merged
            source = resolve_model(model if known else merged, example)
    except ExportError as error:
        why = f"its graph cannot be exported: {str(error).splitlines()[0]}"
        graph.refused.update(dict.fromkeys(wanted, why))
        return graph
    wanted = _all_or_none(graph, wanted, known=known)
    if isinstance(calibration, CalibrationTable):
        calibration.check_model(source.fingerprint)
        table = calibration
    else:
        options = CalibrationOptions(observer, exclude=_unwanted(source, wanted))
        table = calibrate_source(source, batches or (), options, progress, verbose=False)
    forms, weights = forms_and_weights(source, table)
    graph.forms.update({name: forms[name] for name in wanted if name in forms})
    graph.weights.update({name: weights[name] for name in graph.forms})
    for name in wanted.keys() - forms.keys():
        graph.refused[name] = "no scale fits it: it is called twice, or its result feeds no layer"
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
            why = "it is one with parallel convolutions, which the table does not know; give batches"
        for one in layers:
            if why or one != name:
                left.pop(one, None)
            if why and one in wanted:
                graph.refused[one] = why
    return left


def _unwanted(source: ModelSource, wanted: Collection[str]) -> tuple[str, ...]:
    """Weights of the layers that stay in float, or are quantized elsewhere."""
    held = [layer.weight for layer in place(source.graph).layers if layer.weight is not None]
    return tuple(weight for weight in held if _module(weight) not in wanted)


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
        name = _module(layer.weight or "")
        if name is None or x is None or counts[layer.weight] > 1:
            continue
        weights[name] = own = _weights(nodes[layer.output], layer, x)
        form = _form(nodes[layer.output], x, spec.activations, sums)
        forms[name] = replace(form, bias=own.bias is not None)
    return forms, weights


def _module(weight: str) -> str | None:
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
    weight, bias = _constant(node.inputs[1]), None
    if layer.op == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    ):
        weight = weight.T
    if layer.bias is not None and layer.op == "MatMul":
        adder = next(user for user, _ in node.outputs[0].uses())
        bias = next(_constant(value) for value in adder.inputs if value and value.const_value)
    elif layer.bias is not None:
        bias = _constant(node.inputs[2])
    on_grid = layer.op in INTEGER_BIAS
    made = quantize_weight(weight, 0, bias=bias, input_scale=float(x.scale) if on_grid else None)
    added: Array | None = made.bias if on_grid else bias
    if layer.op == "Conv":
        added = made.bias_codes
    return Weights(
        torch.from_numpy(np.array(made.codes)),
        made.qparams.scale,
        None if added is None else torch.from_numpy(np.array(added)),
    )


def _constant(value: ir.Value | None) -> Float32:
    if value is None or value.const_value is None:
        raise ExportError("a layer that was placed has no constant weight; please report this")
    return np.array(value.const_value.numpy(), dtype=np.float32)

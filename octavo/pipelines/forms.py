"""The codes around each layer of a model, and its weights: from a table, or from its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from octavo.calibration import CalibrationTable, TorchCollector
from octavo.calibration.observers import OBSERVERS, choose_range
from octavo.core.arrays import Array
from octavo.core.feeds import to_numpy
from octavo.export.onnx_model import TRANSPOSED
from octavo.export.placement import ACTIVATIONS, QuantizedLayer, place
from octavo.export.qdq import INTEGER_BIAS, adjust_weights, layer_constants
from octavo.export.unsigned import unsigned_spec
from octavo.layers.int8_forms import Form, Weights, names_in, parts_of
from octavo.pipelines.models import evaluating, run_batch
from octavo.pipelines.sources import ModelSource
from octavo.quant import QParams
from octavo.quant.weights import quantize_weight

__all__ = ["forms_and_weights", "forms_of_modules", "module_of"]


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

"""Layers with the static scales of a table: what an engine would compute them with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from octavo.calibration.placed import Placed
from octavo.compression.quantization.plan import Choice
from octavo.compression.quantization.recipes import Int8Static
from octavo.compression.quantization.registry import LayerResult
from octavo.export.onnx_model import module_of
from octavo.export.placement import ACTIVATIONS, QuantizedLayer
from octavo.export.qdq import INTEGER_BIAS, adjust_weights, layer_constants
from octavo.graph.scales import LayerQParams, int8_layer
from octavo.layers.linear.int8 import as_linear, is_linear
from octavo.quant import QParams
from octavo.quant.requantize import bias_from_grid, multiplier
from octavo.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["layer_qparams", "static_linears"]


def layer_qparams(placed: Placed) -> dict[str, LayerQParams]:
    """How each convolution and Linear of a model is quantized, with its weight.

    All is as an engine has it: tensors that cannot be negative are unsigned, BatchNorm is folded,
    ranges are equalized and biases corrected.

    Args:
        placed: an exported module and its scales.

    Returns:
        name of a module -> its parameters. A module that is called twice, or that the table does
        not know, is left out.
    """
    spec = placed.spec(unsigned=True)
    layers = placed.placement.layers
    adjusted = adjust_weights(placed.source.graph, placed.placement, spec)
    nodes = {node.outputs[0].name: node for node in adjusted.graph}
    sums = {name for one in layers if one.op == "Add" for name in one.activations}
    counts = Counter(layer.weight for layer in layers)
    found = {}
    for layer in layers:
        name = module_of(layer.weight or "")
        x = spec.activations.get(layer.activations[0])
        if name is None or x is None or counts[layer.weight] > 1:
            continue
        node = nodes[layer.output]
        y, total = _results(node, spec.activations, sums)
        weight = _weight(node, layer, x)
        found[name] = LayerQParams(x, y, total, weight.bias is not None, weight)
    return found


def static_linears(
    choices: Sequence[Choice], placed: Placed
) -> tuple[dict[str, LayerResult], dict[str, str]]:
    """INT8 layers for Linears with static scales, where no convolution is to be quantized.

    Args:
        choices: for the layers of the model.
        placed: the model and its scales.

    Returns:
        name -> the layer; and name -> why there is none, for the others with `Int8Static`.

    Raises:
        CalibrationError: the table moves range into a layer that stays in float.
    """
    wanted = [
        choice
        for choice in choices
        if isinstance(choice.recipe, Int8Static) and is_linear(choice.module)
    ]
    found = layer_qparams(placed)
    made: dict[str, LayerResult] = {}
    for choice in wanted:
        if choice.name in found:
            layer = as_linear(choice.module)
            int8 = int8_layer(layer, found[choice.name], None, layer.weight)
            made[choice.name] = LayerResult(int8.train(layer.training), "the scale of the table")
    placed.check_equalization(made.keys())
    reason = "the table has no scale for its input"
    return made, {one.name: reason for one in wanted if one.name not in made}


def _results(
    node: ir.Node, activations: Mapping[str, QParams], sums: Collection[str]
) -> tuple[QParams | None, QParams | None]:
    """How the result of a layer is quantized, and the residual sum behind it."""
    result = _activated(node.outputs[0], activations)
    total = None
    adds = [user for user, _ in result.uses() if user.op_type == "Add"]
    if result.name in sums and len(adds) == 1:
        total = activations.get(_activated(adds[0].outputs[0], activations).name or "")
    return activations.get(result.name or ""), total


def _activated(value: ir.Value, activations: Mapping[str, QParams]) -> ir.Value:
    """The tensor behind the activation of a layer's result."""
    while value.name not in activations:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or users[0].op_type not in ACTIVATIONS:
            break
        value = users[0].outputs[0]
    return value


def _weight(node: ir.Node, layer: QuantizedLayer, x: QParams) -> QuantizedWeight:
    """The integers that an engine computes with.

    A convolution adds its bias as an integer, in the accumulator; a Gemm adds in floats what that
    integer stands for, and a MatMul the bias as it is.
    """
    weight, bias = layer_constants(node, layer)
    flipped = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    if layer.op == "MatMul" or flipped:
        weight = weight.T
    on_grid = layer.op in INTEGER_BIAS
    made = quantize_weight(weight, 0, bias=bias, input_scale=float(x.scale) if on_grid else None)
    if made.bias is None or layer.op != "Gemm":
        return made
    return made._replace(bias=bias_from_grid(made.bias, multiplier(x.scale, made.scale)))

"""A float graph and the scales that calibration chose, to a Q/DQ graph with INT8 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from octavo.core.arrays import Array, Float32
from octavo.core.errors import InputError
from octavo.export.editing import constant, initializer, new_node, optional, set_constant
from octavo.export.equalization import equalize
from octavo.export.placement import Placement, QuantizedLayer, place
from octavo.quant import PerTensor, QParams
from octavo.quant.requantize import bias_from_grid, multiplier
from octavo.quant.weights import half_scale, quantize_weight

__all__ = [
    "QdqModel",
    "QuantSpec",
    "adjust_weights",
    "insert_qdq",
    "layer_constants",
    "quantize_graph",
]

INTEGER_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Layers whose bias the engine adds in the accumulator."""
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QuantSpec:
    """What calibration decided about a graph.

    Attributes:
        activations: tensor name -> how it is quantized; a tensor that is missing stays float.
        equalization: tensor name -> factor per channel (see `equalization`).
        bias_correction: name of a layer's output -> what is added to its bias, per channel.
        exclude: patterns of nodes kept in float.
    """

    activations: Mapping[str, QParams]
    equalization: Mapping[str, Sequence[float]] = field(default_factory=dict)
    bias_correction: Mapping[str, Sequence[float]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class QdqModel:
    """A quantized graph.

    Attributes:
        model: the graph with Q/DQ pairs and int8 weights.
        layers: the layers that run in INT8 where the backend has a kernel.
        weights: weight name -> its scales.
        reasons: name of a node that could have been quantized -> why it is not.
    """

    model: ir.Model
    layers: tuple[QuantizedLayer, ...]
    weights: Mapping[str, QParams]
    reasons: Mapping[str, str]


def quantize_graph(
    model: ir.Model,
    spec: QuantSpec,
    placement: Placement | None = None,
    *,
    half_scales: bool = False,
) -> QdqModel:
    """Applies a specification to a float graph, which is not changed.

    Args:
        model: the float graph.
        spec: what calibration decided.
        placement: of this graph without what `spec` excludes, where it is known already.
        half_scales: round scales up to what float16 can hold, for a graph that will be cast to it.

    Raises:
        InputError: the specification names what the graph does not have.
    """
    placement = placement or place(model, spec.exclude)
    adjusted = adjust_weights(model, placement, spec)
    return insert_qdq(adjusted, placement, spec.activations, half_scales=half_scales)


def adjust_weights(model: ir.Model, placement: Placement, spec: QuantSpec) -> ir.Model:
    """A copy of a float graph with equalized weights and corrected biases."""
    copy = model.clone()
    equalize(copy, placement, spec.equalization)
    nodes = {node.outputs[0].name: node for node in copy.graph}
    layers = {layer.output: layer for layer in placement.layers}
    for output, delta in spec.bias_correction.items():
        if output not in layers:
            raise InputError(f"bias correction names {output!r}, which no quantized layer makes")
        add_to_bias(copy, nodes[output], layers[output], np.asarray(delta, dtype=np.float32))
    return copy


def layer_constants(node: ir.Node, layer: QuantizedLayer) -> tuple[Array, Array | None]:
    """Weight and bias of a layer, which equalization and bias correction may have renamed.

    Args:
        node: of the layer, in a graph that `adjust_weights` made.
        layer: as `place` found it before.
    """
    adder, index = _bias_input(node, layer)
    bias = optional(adder, index)
    return constant(node.inputs[1]), None if bias is None else constant(bias)


def _bias_input(node: ir.Node, layer: QuantizedLayer) -> tuple[ir.Node, int]:
    """The node that adds a layer's bias, and which of its inputs that is."""
    if layer.op != "MatMul" or layer.bias is None:
        return node, 2
    adder = next(user for user, _ in node.outputs[0].uses())
    return adder, next(i for i, v in enumerate(adder.inputs) if v is not None and v.const_value)


def add_to_bias(
    model: ir.Model,
    node: ir.Node,
    layer: QuantizedLayer,
    delta: Float32,
) -> None:
    """Adds a number a channel to a layer's bias, in place; makes a bias where there is none."""
    if layer.op == "MatMul" and layer.bias is None:
        raise InputError(f"{layer.name} has no bias to correct")
    node, index = _bias_input(node, layer)
    old = optional(node, index)
    if old is not None:
        known = constant(old).reshape(-1)
        if known.size not in (1, delta.size):
            raise InputError(f"{layer.name} has {known.size} biases, not {delta.size}")
        delta = (known + delta).astype(np.float32)
    set_constant(model, node, index, delta, f"{layer.output}.bias")


def insert_qdq(
    model: ir.Model,
    placement: Placement,
    activations: Mapping[str, QParams],
    *,
    half_scales: bool = False,
) -> QdqModel:
    """Inserts Q/DQ pairs into a copy of a float graph.

    Args:
        model: the float graph.
        placement: of this graph.
        activations: tensor name -> how it is quantized; per tensor, int8 or uint8.
        half_scales: round scales up to what float16 can hold.

    Raises:
        InputError: a tensor that the placement does not quantize, or a granularity other than per
            tensor.
    """
    for name, qparams in activations.items():
        if name not in placement.tensors:
            raise InputError(f"the model has no tensor {name!r} that can be quantized")
        if not isinstance(qparams.granularity, PerTensor):
            raise InputError(f"activations are quantized per tensor; {name!r} is not")
    if half_scales:
        activations = {name: half_scale(qparams) for name, qparams in activations.items()}
    copy = model.clone()
    graph = copy.graph
    nodes = {node.name: node for node in graph}
    reasons = dict(placement.reasons)
    layers, weights = [], {}
    for layer in placement.layers:
        missing = [name for name in layer.activations if name not in activations]
        if missing:
            reasons[layer.name] = f"the calibration table has no scale for {missing[0]!r}"
            continue
        layers.append(layer)
        if layer.weight is not None:
            weights[layer.weight] = _quantize_constants(
                copy, nodes[layer.name], layer, activations[layer.activations[0]], half_scales
            )
    values = ir.convenience.create_value_mapping(graph)
    for name, qparams in activations.items():
        readers = set(placement.tensors[name]) - set(reasons)
        if readers:
            _pair(copy, values[name], qparams, readers)
    common.RemoveUnusedNodesPass()(copy)
    return QdqModel(copy, tuple(layers), weights, reasons)


def _quantize_constants(
    model: ir.Model, node: ir.Node, layer: QuantizedLayer, source: QParams, half_scales: bool
) -> QParams:
    weight, bias = node.inputs[1], optional(node, 2) if layer.op in INTEGER_BIAS else None
    quantized = quantize_weight(
        constant(weight),
        layer.weight_axis,
        bias=None if bias is None else constant(bias),
        input_scale=float(source.scale),
        half_scales=half_scales,
    )
    base = f"{weight and weight.name}"
    if weight is not None and len(list(weight.uses())) > 1:
        base = f"{base}:{layer.output}"
    arrays = {
        "int8": quantized.values.numpy(),
        "scale": quantized.scale.numpy(),
        "zero_point": np.zeros(quantized.scale.shape, dtype=np.int8),
    }
    inputs = [initializer(model, f"{base}.{end}", array) for end, array in arrays.items()]
    axis = {} if layer.weight_axis is None else {"axis": layer.weight_axis}
    shape = ir.Shape(quantized.values.shape)
    dequantize = new_node("DequantizeLinear", inputs, f"{base}.dq", FLOAT, shape, **axis)
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])
    if quantized.bias is not None:
        # a whole number of units, so that float and integer backends add the same
        exact = bias_from_grid(quantized.bias, multiplier(source.scale, quantized.scale))
        set_constant(model, node, 2, exact.numpy(), f"{layer.output}.bias")
    return quantized.qparams


def _pair(model: ir.Model, value: ir.Value, qparams: QParams, readers: set[str]) -> None:
    """Puts one Q/DQ pair behind `value` for the nodes named in `readers`."""
    uses = [(user, index) for user, index in value.uses() if user.name in readers]
    integer = ir.DataType[qparams.dtype.name.upper()]
    scale = initializer(model, f"{value.name}.scale", qparams.scale.numpy())
    zero = qparams.zero_point.numpy().astype(integer.numpy())
    ends = [scale, initializer(model, f"{value.name}.zero_point", zero)]
    quantize = new_node("QuantizeLinear", [value, *ends], f"{value.name}.q", integer, value.shape)
    dequantize = new_node(
        "DequantizeLinear", [quantize.outputs[0], *ends], f"{value.name}.dq", FLOAT, value.shape
    )
    maker = value.producer()
    if maker is not None:
        model.graph.insert_after(maker, [quantize, dequantize])
    else:
        model.graph.insert_before(model.graph[0], [quantize, dequantize])
    for user, index in uses:
        user.replace_input_with(index, dequantize.outputs[0])

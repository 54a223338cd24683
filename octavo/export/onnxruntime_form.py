"""The same integers in the form that ONNX Runtime's CPU kernels are fast in.

ONNX Runtime runs a layer in INT8 only where a QuantizeLinear follows it directly, its bias is
int32, and (on x86) its input is uint8. A portable Q/DQ graph, as TensorRT wants it, has an
activation before the QuantizeLinear, float biases and int8 activations, and runs slower than float
there. This module rewrites one into the other and keeps the codes:

* quantization is monotone, so quantizing a clamp is clamping the codes:
  Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b));
* int8 with zero point z is uint8 with zero point z + 128, every code moved by 128, and back;
* biases already lie on the grid of the accumulator (see `weights`), so int32 holds them exactly;
* a channel of zero weights adds nothing, and lets the first convolution of a picture take the
  kernel for channels that come in fours;
* the mean of a picture is taken of its codes (see `pooling`). That rounds once where the mean of
  real numbers rounds at every addition, so what lies half way between two codes may become the
  other one; nothing else changes a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from octavo.core.arrays import Array
from octavo.export.editing import (
    constant,
    initializer,
    is_constant,
    new_node,
    only_user,
    optional,
    producer,
)
from octavo.export.equalization import clamp_bounds
from octavo.export.pooling import average_integers, averages_pictures
from octavo.quant.requantize import UNSIGNED, bias_on_grid, clamped, multiplier

__all__ = ["KernelDtypes", "LoweredModel", "lower_for_onnxruntime"]

INTEGER_OUTPUT = frozenset({"Add", "Conv", "Gemm", "MatMul"})
"""Layers with an integer kernel when a QuantizeLinear follows."""
FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})
"""Layers with a kernel from integers to float too."""


@dataclass(frozen=True)
class KernelDtypes:
    """Integer types that ONNX Runtime's kernels take on a processor.

    Attributes:
        activation: "uint8" or "int8".
        weight: "int8" or "uint8".
    """

    activation: str = "uint8"
    weight: str = "int8"

    def __str__(self) -> str:
        return f"{self.activation} activations, {self.weight} weights"


@dataclass(frozen=True)
class LoweredModel:
    """A graph for ONNX Runtime on one kind of processor.

    Attributes:
        model: the rewritten graph.
        float_layers: name of a layer with quantized inputs that has no integer kernel -> why not.
    """

    model: ir.Model
    float_layers: Mapping[str, str]


def lower_for_onnxruntime(model: ir.Model, dtypes: KernelDtypes) -> LoweredModel:
    """Rewrites a portable Q/DQ graph; its codes stay the same, up to ties in a mean.

    Args:
        model: from `quantize_graph`; not changed. A float graph comes back as it is.
        dtypes: which integer types to use.

    Raises:
        ExportError: a Q/DQ pair without constant scale and zero point.
    """
    copy = model.clone()
    for node in list(copy.graph):
        if node.op_type == "QuantizeLinear":
            _quantize_before_clamps(copy, node)
        elif averages_pictures(node):
            average_integers(copy, node)
    float_layers = {}
    for node in list(copy.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add"):
            continue
        if not _in_int8(node):
            continue
        reason = _float_reason(node)
        if reason:
            float_layers[node.name or ""] = reason
            _fold_weight(copy, node)
        elif node.op_type in ("Conv", "Gemm"):
            _integer_bias(copy, node)
    _retype_all(copy, dtypes)
    for node in list(copy.graph):
        if node.op_type == "Conv" and (node.name or "") not in float_layers:
            _four_channels(copy, node)
    common.RemoveUnusedNodesPass()(copy)
    return LoweredModel(copy, float_layers)


def _dequantized(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _in_int8(node: ir.Node) -> bool:
    """Whether both inputs of a layer are quantized."""
    return _dequantized(node.inputs[0]) and _dequantized(node.inputs[1])


def _quantize_before_clamps(model: ir.Model, quantize: ir.Node) -> None:
    """Moves a QuantizeLinear in front of the clamps that follow a layer, and clamps the codes."""
    low, high = -np.inf, np.inf
    clamps: list[ir.Node] = []
    layer = producer(quantize)
    while layer is not None and (bounds := clamp_bounds(layer)) is not None:
        if only_user(layer.outputs[0]) is None:
            break
        clamps.append(layer)
        # the clamp nearer to the layer acts first, so the outer bounds clip the inner ones
        low, high = (min(max(bound, low), high) for bound in bounds)
        layer = producer(layer)
    if not clamps or layer is None or layer.op_type not in INTEGER_OUTPUT or not _in_int8(layer):
        return
    if only_user(layer.outputs[0]) is None:
        return
    scale, zero = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    limits = np.iinfo(zero.dtype)
    bounds_code = [
        clamped(bound, float(scale), int(zero), limits.min, limits.max) for bound in (low, high)
    ]
    quantize.replace_input_with(0, layer.outputs[0])
    for clamp in clamps:  # outermost first: each has lost its only reader
        model.graph.remove(clamp, safe=True)
    if bounds_code == [limits.min, limits.max]:
        return
    codes = quantize.outputs[0]
    ends = [
        initializer(model, f"{codes.name}.{end}", np.asarray(code, dtype=zero.dtype))
        for end, code in zip(("low", "high"), bounds_code, strict=True)
    ]
    users = list(codes.uses())
    clip = new_node("Clip", [codes, *ends], f"{codes.name}.clip", codes.dtype, codes.shape)
    model.graph.insert_after(quantize, clip)
    for user, index in users:
        user.replace_input_with(index, clip.outputs[0])


def _float_reason(node: ir.Node) -> str:
    """Why ONNX Runtime has no integer kernel for a layer with quantized inputs; empty if it has."""
    output = node.outputs[0]
    users = [user.op_type for user, _ in output.uses()]
    if node.op_type not in INTEGER_OUTPUT:
        return f"ONNX Runtime has no INT8 kernel for {node.op_type} on a CPU"
    if set(users) == {"QuantizeLinear"} and not output.is_graph_output():
        return ""
    if node.op_type in FLOAT_OUTPUT:
        return ""
    readers = ", ".join(dict.fromkeys(users)) or "the model's output"
    return (
        f"ONNX Runtime's INT8 {node.op_type} needs a quantized output, and this one goes to "
        f"{readers} in float"
    )


def _integer_bias(model: ir.Model, node: ir.Node) -> None:
    bias, source, weight = optional(node, 2), producer(node, 0), producer(node, 1)
    if bias is None or not is_constant(bias) or source is None or weight is None:
        return
    unit = multiplier(*(_tensor(constant(end.inputs[1])) for end in (source, weight)))
    values = bias_on_grid(_tensor(constant(bias)).reshape(-1), unit)
    base = f"{node.outputs[0].name}.bias"
    inputs = [
        initializer(model, f"{base}.int32", values.numpy()),
        initializer(model, f"{base}.scale", unit.expand(values.shape).numpy()),
        initializer(model, f"{base}.zero_point", np.zeros(values.shape, dtype=np.int32)),
    ]
    dequantize = new_node(
        "DequantizeLinear", inputs, f"{base}.dq", ir.DataType.FLOAT, bias.shape, axis=0
    )
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _fold_weight(model: ir.Model, node: ir.Node) -> None:
    """Dequantizes a constant weight once, so that a float kernel need not do it at every call."""
    value, dequantize = node.inputs[1], producer(node, 1)
    if value is None or dequantize is None or not is_constant(dequantize.inputs[0]):
        return
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    axis = dequantize.attributes.get_int("axis", 1)
    if scale.ndim:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(codes.ndim)])
    real = (codes.astype(np.float32) * scale).astype(np.float32)
    node.replace_input_with(1, initializer(model, f"{value.name}.float", real))


def _four_channels(model: ir.Model, node: ir.Node) -> None:
    """Gives a convolution of three channels a fourth one, a copy whose weights are zero.

    The kernel for channels in fours needs no im2col and takes half the time; copying codes costs
    little beside that. It also wants output channels in sixteens.
    """
    source, weight = producer(node, 0), producer(node, 1)
    if source is None or weight is None or only_user(source.outputs[0]) is None:
        return
    codes, kernel = source.inputs[0], weight.inputs[0]
    if codes is None or codes.shape is None or kernel is None or not is_constant(kernel):
        return
    filters = constant(kernel)
    if filters.dtype != np.int8 or filters.shape[0] % 16 or filters.shape[1] != 3:
        return
    if source.op_type != "DequantizeLinear" or node.attributes.get_int("group", 1) != 1:
        return
    planes = initializer(model, "octavo.four_channels", np.array([0, 1, 2, 2], dtype=np.int64))
    four = ir.Shape([*codes.shape[:1], 4, *codes.shape[2:]])
    gather = new_node("Gather", [codes, planes], f"{codes.name}.four", codes.dtype, four, axis=1)
    model.graph.insert_before(source, gather)
    source.replace_input_with(0, gather.outputs[0])
    source.outputs[0].shape = four
    wider = np.concatenate([filters, np.zeros_like(filters[:, :1])], axis=1)
    weight.replace_input_with(0, initializer(model, f"{kernel.name}.four", wider))
    weight.outputs[0].shape = ir.Shape(wider.shape)


def _retype_all(model: ir.Model, dtypes: KernelDtypes) -> None:
    """Gives activations and weights the integer types that kernels take.

    Both ends of a pair move, and the Clip between them.
    """
    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        weight = node.op_type == "DequantizeLinear" and is_constant(node.inputs[0])
        zero = constant(node.inputs[2])
        if zero.dtype.name in ("int32", dtypes.weight if weight else dtypes.activation):
            continue
        _move(model, node, 2)
        if weight:
            _move(model, node, 0)
        elif node.op_type == "QuantizeLinear":
            kind = node.inputs[2].type if node.inputs[2] is not None else None
            node.outputs[0].type = kind
            for user, _ in list(node.outputs[0].uses()):
                if user.op_type == "Clip":
                    _move(model, user, 1)
                    _move(model, user, 2)
                    user.outputs[0].type = kind


def _move(model: ir.Model, node: ir.Node, index: int) -> None:
    """Makes a constant of int8 codes uint8, every code 128 more; or the other way round."""
    value = node.inputs[index]
    codes = constant(value)
    kind, shift = (np.uint8, UNSIGNED) if codes.dtype == np.int8 else (np.int8, -UNSIGNED)
    name = f"{value and value.name}.{np.dtype(kind).name}"
    moved = (codes.astype(np.int16) + shift).astype(kind)
    node.replace_input_with(index, initializer(model, name, moved))

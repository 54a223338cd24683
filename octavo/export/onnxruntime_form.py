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
from octavo.export.constants import constant, initializer
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
        if not _dequantized(node.inputs[0]) or not _dequantized(node.inputs[1]):
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


def _quantize_before_clamps(model: ir.Model, quantize: ir.Node) -> None:
    """Moves a QuantizeLinear in front of the clamps that follow a layer, and clamps the codes."""
    value = quantize.inputs[0]
    low, high = -np.inf, np.inf
    clamps = []
    while value is not None and (clamp := value.producer()) is not None:
        bounds = clamp_bounds(clamp)
        if bounds is None or len(list(value.uses())) != 1 or value.is_graph_output():
            break
        clamps.append(clamp)
        # the clamp nearer to the layer acts first, so the outer bounds clip the inner ones
        low, high = (min(max(bound, low), high) for bound in bounds)
        value = clamp.inputs[0]
    layer = value.producer() if value is not None else None
    if not clamps or value is None or layer is None or layer.op_type not in INTEGER_OUTPUT:
        return
    if len(list(value.uses())) != 1 or value.is_graph_output():
        return
    if not (_dequantized(layer.inputs[0]) and _dequantized(layer.inputs[1])):
        return
    scale, zero = constant(quantize.inputs[1]), constant(quantize.inputs[2])
    limits = np.iinfo(zero.dtype)
    bounds_code = [
        clamped(float(bound), float(scale), int(zero), limits.min, limits.max)
        for bound in (low, high)
    ]
    quantize.replace_input_with(0, value)
    for clamp in clamps:  # outermost first: each has lost its only reader
        model.graph.remove(clamp, safe=True)
    if bounds_code == [limits.min, limits.max]:
        return
    codes = quantize.outputs[0]
    names = [f"{codes.name}.{end}" for end in ("low", "high")]
    ends = [
        initializer(model, name, np.asarray(code, dtype=zero.dtype))
        for name, code in zip(names, bounds_code, strict=True)
    ]
    users = list(codes.uses())
    clip = ir.node("Clip", [codes, *ends], name=f"Clip:{codes.name}")
    clip.outputs[0].name = f"{codes.name}.clip"
    clip.outputs[0].type, clip.outputs[0].shape = codes.type, codes.shape
    model.graph.insert_after(quantize, clip)
    for user, index in users:
        user.replace_input_with(index, clip.outputs[0])


def _float_reason(node: ir.Node) -> str:
    """Why ONNX Runtime has no integer kernel for a layer with quantized inputs; empty if it has."""
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    if node.op_type not in INTEGER_OUTPUT:
        return f"ONNX Runtime has no INT8 kernel for {node.op_type} on a CPU"
    quantized = bool(users) and all(user.op_type == "QuantizeLinear" for user in users)
    if quantized and not output.is_graph_output():
        return ""
    if node.op_type in FLOAT_OUTPUT:
        return ""
    readers = ", ".join(dict.fromkeys(user.op_type for user in users)) or "the model's output"
    return (
        f"ONNX Runtime's INT8 {node.op_type} needs a quantized output, and this one goes to "
        f"{readers} in float"
    )


def _integer_bias(model: ir.Model, node: ir.Node) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return
    source, weight = (value.producer() for value in node.inputs[:2] if value is not None)
    if source is None or weight is None:
        return
    unit = multiplier(*(_tensor(constant(end.inputs[1])) for end in (source, weight)))
    values = bias_on_grid(_tensor(bias.const_value.numpy()).reshape(-1), unit)
    base = f"{node.outputs[0].name}.bias"
    inputs = [
        initializer(model, f"{base}.int32", values.numpy()),
        initializer(model, f"{base}.scale", unit.expand(values.shape).numpy()),
        initializer(model, f"{base}.zero_point", np.zeros(values.shape, dtype=np.int32)),
    ]
    dequantize = ir.node(
        "DequantizeLinear", inputs, attributes={"axis": 0}, name=f"DequantizeLinear:{base}"
    )
    dequantize.outputs[0].name = f"{base}.dq"
    dequantize.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    dequantize.outputs[0].shape = bias.shape
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _fold_weight(model: ir.Model, node: ir.Node) -> None:
    """Dequantizes a constant weight once, so that a float kernel need not do it at every call."""
    value = node.inputs[1]
    dequantize = value.producer() if value is not None else None
    if dequantize is None or value is None or not dequantize.inputs[0]:
        return
    if not dequantize.inputs[0].is_initializer():
        return
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    axis = dequantize.attributes.get_int("axis", 1) or 0
    if scale.ndim:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(codes.ndim)])
    real = (codes.astype(np.float32) * scale).astype(np.float32)
    node.replace_input_with(1, initializer(model, f"{value.name}.float", real))


def _four_channels(model: ir.Model, node: ir.Node) -> None:
    """Gives a convolution of three channels a fourth one, a copy whose weights are zero.

    The kernel for channels in fours needs no im2col and takes half the time; copying codes costs
    little beside that. It also wants output channels in sixteens.
    """
    source, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
    if source is None or weight is None or len(list(source.outputs[0].uses())) != 1:
        return
    codes, kernel = source.inputs[0], weight.inputs[0]
    if codes is None or kernel is None or kernel.const_value is None or codes.shape is None:
        return
    filters = kernel.const_value.numpy()
    if filters.dtype != np.int8 or filters.shape[0] % 16 or filters.shape[1] != 3:
        return
    if source.op_type != "DequantizeLinear" or node.attributes.get_int("group", 1) != 1:
        return
    planes = initializer(model, "octavo.four_channels", np.array([0, 1, 2, 2], dtype=np.int64))
    gather = ir.node("Gather", [codes, planes], {"axis": 1}, name=f"Gather:{codes.name}")
    gather.outputs[0].name = f"{codes.name}.four"
    gather.outputs[0].type = codes.type
    gather.outputs[0].shape = ir.Shape([*codes.shape[:1], 4, *codes.shape[2:]])
    model.graph.insert_before(source, gather)
    source.replace_input_with(0, gather.outputs[0])
    source.outputs[0].shape = gather.outputs[0].shape
    wider = np.concatenate([filters, np.zeros_like(filters[:, :1])], axis=1)
    weight.replace_input_with(0, initializer(model, f"{kernel.name}.four", wider))
    weight.outputs[0].shape = ir.Shape(wider.shape)


def _retype_all(model: ir.Model, dtypes: KernelDtypes) -> None:
    """Gives activations and weights the integer types that kernels take."""
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        _retype(model, node.inputs[2], dtypes.activation, node)
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        source = node.inputs[0]
        weight = source is not None and source.is_initializer()
        _retype(model, node.inputs[2], dtypes.weight if weight else dtypes.activation, node)


def _retype(model: ir.Model, zero_point: ir.Value | None, target: str, node: ir.Node) -> None:
    """Moves a Q or DQ node, and what lies between a pair, to codes of type `target`."""
    zero = constant(zero_point)
    if zero.dtype == np.int32 or zero.dtype.name == target:
        return
    _move(model, node, 2)
    if node.op_type == "QuantizeLinear":
        node.outputs[0].type = node.inputs[2].type if node.inputs[2] is not None else None
        for user, _ in list(node.outputs[0].uses()):
            if user.op_type == "Clip":
                _move(model, user, 1)
                _move(model, user, 2)
                user.outputs[0].type = node.outputs[0].type
    elif node.inputs[0] is not None and node.inputs[0].is_initializer():
        _move(model, node, 0)


def _move(model: ir.Model, node: ir.Node, index: int) -> None:
    """Makes a constant of int8 codes uint8, every code 128 more; or the other way round."""
    value = node.inputs[index]
    codes = constant(value)
    signed = codes.dtype == np.int8
    kind, shift = (np.uint8, UNSIGNED) if signed else (np.int8, -UNSIGNED)
    name = f"{value.name if value is not None else ''}.{np.dtype(kind).name}"
    moved = (codes.astype(np.int16) + shift).astype(kind)
    node.replace_input_with(index, initializer(model, name, moved))

"""The mean of a picture, which ONNX Runtime can take of codes instead of real numbers.

y = round(float32(sum of codes) * (scale_x / (scale_y * pixels))): an exact sum, rounded once,
without dequantizing the picture first.
"""

from __future__ import annotations

import onnx_ir as ir

from octavo.export.editing import constant, is_constant, new_node, only_user, optional, producer
from octavo.quant.requantize import mean_fits

__all__ = ["average_integers", "averages_pictures", "over_pictures"]


def over_pictures(node: ir.Node) -> bool:
    """Whether a ReduceMean goes over the last two of four axes."""
    source, axes = node.inputs[0], optional(node, 1)
    if source is None or source.shape is None or len(source.shape) != 4:
        return False
    if not is_constant(axes):
        return False
    return sorted(int(axis) % 4 for axis in constant(axes).ravel()) == [2, 3]


def averages_pictures(node: ir.Node) -> bool:
    """Whether a node is the mean over the last two of four axes, which it keeps at length 1."""
    mean = node.op_type == "ReduceMean" and over_pictures(node)
    return mean and node.attributes.get_int("keepdims", 1) == 1


def average_integers(model: ir.Model, node: ir.Node) -> None:
    """Turns such a mean between a DequantizeLinear and a QuantizeLinear into GlobalAveragePool.

    ONNX Runtime has a kernel on codes for that, and none for ReduceMean.

    Raises:
        ExportError: a scale that is not a constant.
    """
    result = node.outputs[0]
    source, reader = producer(node), only_user(result)
    if source is None or source.op_type != "DequantizeLinear":
        return
    if reader is None or reader.op_type != "QuantizeLinear":
        return
    if not mean_fits(*(float(constant(end.inputs[1])) for end in (source, reader))):
        return
    inputs, output = node.inputs[:1], f"{result.name}.pool"
    pool = new_node("GlobalAveragePool", inputs, output, result.dtype, result.shape)
    pool.name = node.name
    model.graph.insert_before(node, pool)
    reader.replace_input_with(0, pool.outputs[0])
    model.graph.remove(node, safe=True)

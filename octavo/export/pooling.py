"""The mean of a picture, which ONNX Runtime can take of codes instead of real numbers.

y = round(float32(sum of codes) * (scale_x / (scale_y * pixels))): an exact sum, rounded once,
without dequantizing the picture first.
"""

from __future__ import annotations

import onnx_ir as ir

from octavo.export.constants import constant
from octavo.quant.requantize import mean_fits

__all__ = ["average_integers", "averages_pictures"]


def averages_pictures(node: ir.Node) -> bool:
    """Whether a node is the mean over the last two of four axes, which it keeps at length 1."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type != "ReduceMean" or source is None or source.shape is None:
        return False
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] else None
    if axes is None or len(source.shape) != 4 or not node.attributes.get_int("keepdims", 1):
        return False
    return sorted(int(axis) % 4 for axis in axes.numpy().ravel()) == [2, 3]


def average_integers(model: ir.Model, node: ir.Node) -> None:
    """Turns such a mean between a DequantizeLinear and a QuantizeLinear into GlobalAveragePool.

    ONNX Runtime has a kernel on codes for that, and none for ReduceMean.

    Raises:
        ExportError: a scale that is not a constant.
    """
    result = node.outputs[0]
    users = [user for user, _ in result.uses()]
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != "DequantizeLinear" or result.is_graph_output():
        return
    if len(users) != 1 or users[0].op_type != "QuantizeLinear":
        return
    if not mean_fits(*(float(constant(end.inputs[1])) for end in (source, users[0]))):
        return
    pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
    pool.outputs[0].name = f"{result.name}.pool"
    pool.outputs[0].type, pool.outputs[0].shape = result.type, result.shape
    model.graph.insert_before(node, pool)
    users[0].replace_input_with(0, pool.outputs[0])
    model.graph.remove(node, safe=True)

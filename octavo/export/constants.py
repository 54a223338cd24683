"""Constants of an ONNX graph: reading them, adding them under free names, and replacing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from octavo.core.arrays import Array
from octavo.core.errors import ExportError

__all__ = ["constant", "initializer", "set_constant"]


def constant(value: ir.Value | None) -> Array:
    """The number behind a scale or zero point.

    Raises:
        ExportError: it is not a constant.
    """
    if value is None or value.const_value is None:
        raise ExportError(
            f"the scale or zero point {value.name if value else '(missing)'!r} of a Q/DQ pair is "
            "not a constant; export the model again"
        )
    return value.const_value.numpy()


def initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Adds a constant to a graph and returns its value.

    Where the name is taken by an equal constant, that one is shared; where it is taken by another,
    the new one gets a number behind its name.
    """
    array = np.asarray(array, order="C")
    known = model.graph.initializers
    free, number = name, 0
    while free in known:
        if _holds(known[free], array):
            return known[free]
        number += 1
        free = f"{name}.{number}"
    value = ir.Value(name=free)
    _fill(value, array)
    model.graph.register_initializer(value)
    return value


def set_constant(model: ir.Model, node: ir.Node, index: int, array: Array, name: str) -> None:
    """Gives a node another constant as its input `index`.

    It keeps the name of the old constant; where there is none, or another node reads it too, it is
    called `name`.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is not None and len(list(value.uses())) == 1 and not value.is_graph_output():
        _fill(value, array)
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, initializer(model, name, array))


def _fill(value: ir.Value, array: Array) -> None:
    tensor = ir.Tensor(np.asarray(array, order="C"), name=value.name)
    value.const_value = tensor
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)


def _holds(value: ir.Value, array: Array) -> bool:
    if value.const_value is None or value.dtype is None or value.dtype.numpy() != array.dtype:
        return False
    return np.array_equal(value.const_value.numpy(), array)

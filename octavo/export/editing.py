"""Reading and changing an ONNX graph: its constants, who makes and reads a value, and new nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from octavo.core.arrays import Array
from octavo.core.errors import ExportError

__all__ = [
    "constant",
    "initializer",
    "is_constant",
    "new_node",
    "only_user",
    "optional",
    "producer",
    "set_constant",
]


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node that it may do without."""
    return node.inputs[index] if index < len(node.inputs) else None


def producer(node: ir.Node, index: int = 0) -> ir.Node | None:
    """The node that makes an input; None for constants and inputs of the graph."""
    value = optional(node, index)
    return None if value is None else value.producer()


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, where it reads it once and nothing else does."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether an input is there and its numbers are known."""
    return value is not None and value.const_value is not None


def constant(value: ir.Value | None) -> Array:
    """The numbers behind a value.

    Raises:
        ExportError: it is not a constant.
    """
    if value is None or value.const_value is None:
        raise ExportError(
            f"the weight, scale or zero point {value.name if value else '(missing)'!r} is not a "
            "constant; export the model again"
        )
    return value.const_value.numpy()


def initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Adds a constant to a graph and returns its value.

    Where the name is taken by an equal constant, that one is shared; where it is taken by another,
    the new one gets a number behind its name.
    """
    known = model.graph.initializers
    free, number = name, 0
    while free in known:
        other = constant(known[free])
        if other.dtype == array.dtype and np.array_equal(other, array):
            return known[free]
        number += 1
        free = f"{name}.{number}"
    value = ir.val(free, const_value=ir.tensor(array, name=free))
    model.graph.register_initializer(value)
    return value


def set_constant(model: ir.Model, node: ir.Node, index: int, array: Array, name: str) -> None:
    """Gives a node another constant as its input `index`.

    It keeps the name of the old constant; where there is none, or another node reads it too, it is
    called `name`.
    """
    value = optional(node, index)
    if value is not None and only_user(value) is not None:
        value.const_value = tensor = ir.tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, initializer(model, name, array))


def new_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    dtype: ir.DataType | None,
    shape: ir.Shape | None,
    **attributes: int,
) -> ir.Node:
    """A node with one output, after which it is called; it is in no graph yet."""
    result = ir.val(output, dtype, shape)
    return ir.node(op, inputs, attributes, name=f"{op}:{output}", outputs=[result])

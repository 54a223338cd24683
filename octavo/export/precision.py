"""Float16 in the graph itself, since engines no longer have a flag for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from octavo.core.errors import ExportError
from octavo.export.editing import initializer, new_node

__all__ = ["float16_overflows", "to_float16"]

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = 65504.0
"""The largest finite float16."""
ROOM = 2.0
"""Values seen must stay below the largest float16 by this factor."""

FLOAT32_INPUTS: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2})}
"""Inputs that ONNX wants in float32 whatever the node computes in."""
FLOAT32_NODES = frozenset(
    {"Bernoulli", "BlackmanWindow", "Celu", "ConstantOfShape", "CumSum", "DynamicQuantizeLinear"}
    | {"EyeLike", "HammingWindow", "HannWindow", "MelWeightMatrix", "Multinomial"}
    | {"NonMaxSuppression", "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike", "Range", "RoiAlign", "TfIdfVectorizer"}
)
"""Nodes that have no float16, whose type an attribute fixes, or that it is too coarse for."""


def to_float16(model: ir.Model, peaks: Mapping[str, float] | None = None) -> ir.Model:
    """Casts the float parts of a graph to float16; inputs and outputs stay float32.

    Q/DQ pairs get float16 scales, so that what lies between them is float16 too. Nodes stay in
    float32 where float16 cannot hold their weights or, going by `peaks`, their results.

    Args:
        model: a float or Q/DQ graph; not changed.
        peaks: tensor name -> largest magnitude seen in it.

    Returns:
        the cast graph, with Cast nodes where float16 and float32 meet.

    Raises:
        ExportError: the graph has control flow, or an opset without float16 Q/DQ.
    """
    opset = model.opset_imports.get("", 0)
    if opset < 19 and any(node.op_type == "QuantizeLinear" for node in model.graph):
        raise ExportError(
            f"opset {opset} has no float16 QuantizeLinear; export the model with opset 19 or newer"
        )
    copy = model.clone()
    _Caster(copy, frozenset(float16_overflows(copy, peaks or {}))).run()
    common.RemoveUnusedNodesPass()(copy)
    return copy


def float16_overflows(model: ir.Model, peaks: Mapping[str, float]) -> dict[str, str]:
    """Which nodes have to stay in float32, and why.

    Args:
        model: a float or Q/DQ graph.
        peaks: tensor name -> largest magnitude seen in it.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is None:
                continue
            constant = value.const_value
            peak = peaks.get(value.name or "", 0.0) * ROOM
            if constant is not None and value.dtype == FLOAT and constant.size:
                magnitude = np.abs(constant.numpy())
                peak = float(magnitude[np.isfinite(magnitude)].max(initial=0.0))
            if peak > LARGEST:
                found[node.name or ""] = f"{value.name} reaches {peak:.3g}"
    return found


class _Caster:
    def __init__(self, model: ir.Model, keep: frozenset[str]) -> None:
        self.model = model
        self.keep = keep
        self.cast: dict[tuple[str, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.model.graph):
            if any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values()):
                raise ExportError(
                    f"{node.name} is control flow ({node.op_type}), which cannot be cast to "
                    "float16; use precision float32 or int8"
                )
            known = node.domain in ("", "ai.onnx") and node.op_type not in FLOAT32_NODES
            half = known and node.name not in self.keep
            target = HALF if half else FLOAT
            fixed = FLOAT32_INPUTS.get(node.op_type, frozenset())
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (FLOAT, HALF):
                    wanted = FLOAT if index in fixed else target
                    node.replace_input_with(index, self._as(value, wanted, node))
            if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT.value:
                node.attributes["to"] = ir.AttrInt64("to", target.value)
            for value in node.outputs:
                if value.dtype == FLOAT and half:
                    value.type = ir.TensorType(HALF)
        self._outputs()

    def _as(self, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        """The value in another float type: a new constant, or a Cast in front of its first user."""
        if value.dtype == dtype:
            return value
        key = (value.name or "", dtype)
        if key not in self.cast:
            suffix = "half" if dtype == HALF else "float"
            name = f"{value.name}.{suffix}"
            if value.const_value is not None:
                array = value.const_value.numpy().astype(dtype.numpy())
                self.cast[key] = initializer(self.model, name, array)
            else:
                node = new_node("Cast", [value], name, dtype, value.shape, to=dtype.value)
                self.model.graph.insert_before(user, node)
                self.cast[key] = node.outputs[0]
        return self.cast[key]

    def _outputs(self) -> None:
        """Casts outputs back to float32, under their own names."""
        graph = self.model.graph
        for index, value in enumerate(graph.outputs):
            producer = value.producer()
            if value.dtype != HALF or producer is None:
                continue
            name = value.name or ""
            value.name = f"{name}.half"
            cast = new_node("Cast", [value], name, FLOAT, value.shape, to=FLOAT.value)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]

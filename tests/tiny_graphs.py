"""Tiny ONNX graphs, and ONNX Runtime without any optimization as the independent reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from octavo.export import (
    QdqModel,
    QuantSpec,
    load_onnx,
    make_session,
    place,
    quantize_graph,
    serialize,
)
from octavo.quant import qparams_from_range

Array = np.ndarray[Any, Any]
FLOAT = TensorProto.FLOAT


class Net:
    """Writes an ONNX graph down, a node a call.

    Args:
        inputs: name -> shape; a float input.
    """

    def __init__(self, seed: int = 0, **inputs: Sequence[int | str | None]) -> None:
        self.random = np.random.default_rng(seed)
        self.inputs = [helper.make_tensor_value_info(n, FLOAT, s) for n, s in inputs.items()]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def const(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        """Normal numbers, scaled so that a layer keeps the size of what goes through it."""
        spread = scale / np.sqrt(max(1, np.prod(shape[1:]))) if len(shape) > 1 else scale
        return self.const(name, self.random.normal(0, spread, shape).astype(np.float32))

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def conv(self, x: str, cout: int, cin: int, k: int = 3, bias: bool = True, **attr: Any) -> str:
        n = len(self.nodes)
        group = attr.get("group", 1)
        parts = [x, self.weight(f"w{n}", cout, cin // group, k, k)]
        if bias:
            parts.append(self.weight(f"b{n}", cout, scale=0.3))
        attr.setdefault("pads", [k // 2] * 4)
        return self.op("Conv", *parts, **attr)

    def clip(self, x: str, low: float | None, high: float | None) -> str:
        n = len(self.nodes)
        names = ["" if low is None else self.const(f"low{n}", np.float32(low))]
        if high is not None:
            names.append(self.const(f"high{n}", np.float32(high)))
        return self.op("Clip", x, *names)

    def build(
        self, *outputs: str, opset: int = 20, ir_version: int = 9, infer: bool = True
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            self.outputs or [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            self.constants,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )
        return onnx.shape_inference.infer_shapes(model, strict_mode=True) if infer else model


def as_it_is(proto: onnx.ModelProto) -> ir.Model:
    """A graph with named nodes and nothing else of what `load_onnx` does."""
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = f"{node.op_type}:{node.outputs[0].name}"
    return model


def session(model: ir.Model | onnx.ModelProto) -> Any:
    """ONNX Runtime node by node, as the graph says."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = serialize(model) if isinstance(model, ir.Model) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    return session(model).run(None, dict(feeds))


def run_optimized(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    """As an engine runs it, with ONNX Runtime's fusions and integer kernels."""
    return make_session(model, threads=1).run(None, dict(feeds))


def feeds_for(
    model: ir.Model | onnx.ModelProto, *, batch: int = 2, seed: int = 1, scale: float = 1.0
) -> dict[str, Array]:
    """Normal numbers for every input; a dynamic axis is `batch` long."""
    random = np.random.default_rng(seed)
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    weights = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for value in proto.graph.input:
        if value.name not in weights:
            shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
            feeds[value.name] = (random.normal(0, 1, shape) * scale).astype(np.float32)
    return feeds


def values_of(
    model: ir.Model, names: Sequence[str], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """What the named tensors hold."""
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    inner = [name for name in names if name not in feeds]
    copy.graph.outputs[:] = [values[name] for name in inner]
    found = dict(zip(inner, run(copy, feeds), strict=True)) if inner else {}
    return {**{name: feeds[name] for name in names if name in feeds}, **found}


def minmax_spec(
    model: ir.Model,
    feeds: Mapping[str, Array],
    *,
    dtype: str = "int8",
    shrink: float = 1.0,
    exclude: tuple[str, ...] = (),
) -> QuantSpec:
    """Ranges of every tensor that can be quantized; `shrink` < 1 makes codes saturate."""
    tensors = values_of(model, list(place(model, exclude).tensors), feeds)
    ranges = {
        name: (float(x.min(initial=0)) * shrink, float(x.max(initial=0)) * shrink)
        for name, x in tensors.items()
    }
    for group in place(model, exclude).groups:
        widest = min(ranges[n][0] for n in group), max(ranges[n][1] for n in group)
        ranges.update(dict.fromkeys(group, widest))
    return QuantSpec(
        {name: qparams_from_range(low, high, dtype) for name, (low, high) in ranges.items()},
        exclude=exclude,
    )


def quantized(
    proto: onnx.ModelProto, *, dtype: str = "int8", shrink: float = 1.0, batch: int = 2
) -> tuple[ir.Model, QdqModel, dict[str, Array]]:
    """The prepared float graph, its Q/DQ twin by min-max, and the data that fitted it."""
    model = load_onnx(proto)
    feeds = feeds_for(model, batch=batch)
    return (
        model,
        quantize_graph(model, minmax_spec(model, feeds, dtype=dtype, shrink=shrink)),
        feeds,
    )


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def layer_names(model: ir.Model, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Output tensor of each quantized layer -> its operator."""
    return {layer.output: layer.op for layer in place(model, exclude).layers}

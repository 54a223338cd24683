"""A small network for the TensorRT tests, with and without Q/DQ pairs, and requests to build it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from octavo.engines.backend import BuildRequest, Profile
from octavo.export.onnx_model import load_onnx
from octavo.export.placement import place
from octavo.export.qdq import QdqModel, QuantSpec, quantize_graph
from octavo.quant import qparams_from_range

PROFILE = {"x": Profile((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}


def cnn(batch: int | str = "batch") -> ir.Model:
    """x [batch, 3, 8, 8] -> Conv, Relu, Conv, Relu, pooling, Gemm -> y [batch, 4]."""
    random = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "w2": (4, 8), "b2": (4,)}
    weights = {name: random.standard_normal(shape) / 4 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    return model_of(nodes, {"x": (batch, 3, 8, 8)}, {"y": (batch, 4)}, weights)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int | str, ...]],
    outputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, Any] | None = None,
    dtype: int = TensorProto.FLOAT,
) -> ir.Model:
    constants = [
        numpy_helper.from_array(np.asarray(value, dtype=np.float32), name)
        for name, value in (weights or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        constants,
    )
    opsets = [helper.make_opsetid("", 20)]
    return load_onnx(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def quantized(model: ir.Model, *, half: bool = False, dtype: str = "int8") -> QdqModel:
    """The network with every pair that the placement wants, but none for the last layer."""
    placement = place(model, exclude=("*:y",))
    ranges = {name: qparams_from_range(-4.0, 4.0, dtype) for name in placement.tensors}
    return quantize_graph(model, QuantSpec(ranges, exclude=("*:y",)), half_scales=half)


def request(precision: str = "float32", batch: int | str = "batch", **fields: Any) -> BuildRequest:
    model = cnn(batch)
    int8 = precision.startswith("int8")
    settings: dict[str, Any] = {
        "model": model,
        "quantized": quantized(model, half="float16" in precision) if int8 else None,
        "precision": precision,
        "fingerprint": "f" * 64,
        "table": '{"a": "table"}' if int8 else None,
        "profiles": PROFILE if isinstance(batch, str) else {},
    }
    return BuildRequest(**{**settings, **fields})


def pictures(count: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)

"""Small models and engine files that several test folders share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import octavo
from octavo.calibration import CalibrationTable
from octavo.core.results import TensorSpec
from octavo.engines import Artifact


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _float(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _normal(seed: int, *shape: int) -> np.ndarray:
    fan_in = int(np.prod(shape[1:])) or 1
    return (np.random.default_rng(seed).standard_normal(shape) / fan_in**0.5).astype(np.float32)


def cnn(batch: int | str = "batch", seed: int = 0) -> onnx.ModelProto:
    """x [batch, 3, 8, 8] -> Conv, Relu, Conv, Relu, pooling, Gemm -> y [batch, 4]."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    weights = {
        "w0": _normal(seed, 8, 3, 3, 3),
        "b0": _normal(seed + 1, 8),
        "w1": _normal(seed + 2, 8, 8, 3, 3),
        "b1": _normal(seed + 3, 8),
        "w2": _normal(seed + 4, 4, 8),
        "b2": _normal(seed + 5, 4),
    }
    return _model(nodes, [_float("x", batch, 3, 8, 8)], [_float("y", batch, 4)], weights)


def gated() -> onnx.ModelProto:
    """x [batch, 4, 6, 6] -> r = Relu(Conv x), y = Conv(r * Sigmoid(Conv r))."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["gate"]),
        helper.make_node("Sigmoid", ["gate"], ["s"]),
        helper.make_node("Mul", ["r0", "s"], ["m"]),
        helper.make_node("Conv", ["m", "w2"], ["y"]),
    ]
    weights = {f"w{index}": _normal(index, 4, 4, 1, 1) for index in range(3)}
    return _model(nodes, [_float("x", "batch", 4, 6, 6)], [_float("y", "batch", 4, 6, 6)], weights)


def two() -> onnx.ModelProto:
    """a [batch, 5], b [batch, 5] -> d = a - b, y = d @ w."""
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    inputs = [_float("a", "batch", 5), _float("b", "batch", 5)]
    outputs = [_float("d", "batch", 5), _float("y", "batch", 3)]
    return _model(nodes, inputs, outputs, {"w": _normal(0, 5, 3)})


def tokens() -> onnx.ModelProto:
    """ids int64 [batch, length] -> y float [batch, length, 4]; size int64 [1] of all of them."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["y"]),
        helper.make_node("Size", ["ids"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "zero"], ["size"]),
    ]
    weights = {"table": _normal(0, 7, 4), "w": _normal(1, 4, 4), "zero": np.zeros(1, np.int64)}
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    size = helper.make_tensor_value_info("size", TensorProto.INT64, [1])
    return _model(nodes, [ids], [_float("y", "batch", "length", 4), size], weights)


def plain() -> onnx.ModelProto:
    """x [batch, 4] -> Softmax: nothing that can run in INT8."""
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    return _model(nodes, [_float("x", "batch", 4)], [_float("y", "batch", 4)], {})


def images(samples: int = 24, seed: int = 7, channels: int = 3, size: int = 8) -> np.ndarray:
    """Float inputs of the convolutional models."""
    shape = (samples, channels, size, size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def cnn_table() -> CalibrationTable:
    """A min-max table of `cnn()`."""
    return octavo.calibrate(cnn(), [images(12), images(12, 8)], observer="minmax", verbose=False)


@functools.cache
def cnn_artifact(precision: str = "int8") -> Artifact:
    """An engine file of `cnn()` for ONNX Runtime."""
    calibration = cnn_table() if precision == "int8" else None
    return octavo.build(cnn(), precision=precision, calibration=calibration).artifact


def fake_artifact(**changes: Any) -> Artifact:
    """An engine file whose members are no models."""
    members = {"model.onnx": bytes(range(256)), "table.json": b"{}"}
    fields: dict[str, Any] = {
        "backend": "onnxruntime",
        "backend_version": "1.31.0",
        "precision": "int8",
        "model": "f" * 64,
        "calibration": "c" * 64,
        "inputs": (TensorSpec("x", ("batch", 3), "float32"),),
        "outputs": (TensorSpec("y", ("batch", 2), "float32"),),
        "profiles": {"x": ((1, 3), (2, 3), (4, 3))},
        "skipped": {"Softmax:s": "no kernel"},
    }
    members = changes.pop("members", members)
    return Artifact.of(members, **{**fields, **changes})

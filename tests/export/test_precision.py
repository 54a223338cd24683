"""Float16 in the graph: valid types everywhere, float32 at the ends and where it would overflow."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from tiny_graphs import FLOAT, Net, feeds_for, minmax_spec, ops, run, run_optimized, values_of

from octavo.core.errors import ExportError
from octavo.export import (
    export_torch,
    fingerprint,
    load_onnx,
    precision,
    quantize_graph,
    serialize,
    to_float16,
)
from octavo.quant import sqnr_db

HALF = ir.DataType.FLOAT16
Array = np.ndarray[Any, Any]


def checked(model: ir.Model, peaks: dict[str, float] | None = None) -> ir.Model:
    """The cast graph, after a strict check of all types and of its ends."""
    result = to_float16(model, peaks)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    declared = {
        value.name: value.dtype for node in result.graph for value in node.outputs if value.name
    }
    inferred = onnx.shape_inference.infer_shapes(
        ir.to_proto(strip_types(result)), strict_mode=True, data_prop=True
    )
    for value in inferred.graph.value_info:
        kind = value.type.tensor_type.elem_type
        assert declared.get(value.name, kind) == kind, f"{value.name} is not {kind}"
    for before, after in zip(
        (*model.graph.inputs, *model.graph.outputs),
        (*result.graph.inputs, *result.graph.outputs),
        strict=True,
    ):
        assert (after.name, after.dtype) == (before.name, before.dtype)
        assert after.shape == before.shape
    return result


def strip_types(model: ir.Model) -> ir.Model:
    bare = model.clone()
    for node in bare.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    return bare


def small_net() -> onnx.ModelProto:
    net = Net(x=["n", 3, 8, 8])
    stem = net.clip(net.conv("x", 8, 3), 0, 6)
    block = net.op("Relu", net.op("Add", stem, net.conv(stem, 8, 8)))
    mean = net.op("Flatten", net.op("GlobalAveragePool", block))
    y = net.op("Gemm", mean, net.weight("w", 10, 8), net.weight("b", 10), transB=1)
    return net.build(net.op("Softmax", y))


def test_a_network_in_float16() -> None:
    model = load_onnx(small_net())
    before = fingerprint(model)
    half = checked(model)
    assert fingerprint(model) == before
    assert ops(half).count("Cast") == 2, "one at either end"
    assert ir.DataType.FLOAT not in {value.dtype for value in half.graph.initializers.values()}
    feeds = feeds_for(model, batch=4)
    want, have = run(model, feeds)[0], run(half, feeds)[0]
    assert have.dtype == np.float32
    assert sqnr_db(want, have) > 50
    assert not np.array_equal(want, have)
    assert len(serialize(half)) < 0.75 * len(serialize(model))


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3)
        self.deep = torch.nn.Conv2d(16, 16, 3, groups=16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.deep(torch.nn.functional.silu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def test_results_are_as_close_as_pytorchs_float16() -> None:
    torch.manual_seed(0)
    module = Small().eval()
    half = checked(export_torch(module, torch.randn(2, 3, 12, 12)).model)
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double()).numpy()
        peer = copy.deepcopy(module).half()(x.half()).float().numpy()
    ours = run_optimized(half, {"x": x.numpy()})[0]
    assert sqnr_db(exact, ours) > sqnr_db(exact, peer) - 6
    assert sqnr_db(peer, ours) > 50


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_pairs_get_float16_scales(dtype: str) -> None:
    model = load_onnx(small_net())
    feeds = feeds_for(model, batch=4)
    quantized = quantize_graph(model, minmax_spec(model, feeds, dtype=dtype), half_scales=True)
    half = checked(quantized.model)
    for node in half.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == node.inputs[1].dtype == HALF
            assert node.outputs[0].dtype == quantized_type(dtype)
        if node.op_type == "DequantizeLinear":
            assert node.inputs[1].dtype == node.outputs[0].dtype == HALF
            scale = node.inputs[1].name.removesuffix(".half")
            original = quantized.model.graph.initializers[scale].const_value.numpy()
            np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), original)
    assert "Cast" not in ops(half)[1:-1]
    want, have = run(quantized.model, feeds)[0], run(half, feeds)[0]
    assert sqnr_db(want, have) > 25


def quantized_type(dtype: str) -> ir.DataType:
    return ir.DataType.INT8 if dtype == "int8" else ir.DataType.UINT8


def test_pairs_need_an_opset_with_float16_scales() -> None:
    model = load_onnx(small_net())
    quantized = quantize_graph(model, minmax_spec(model, feeds_for(model))).model
    quantized.opset_imports[""] = 17
    with pytest.raises(ExportError, match="opset 17 has no float16 QuantizeLinear"):
        to_float16(quantized)
    model.opset_imports[""] = 17
    to_float16(model)  # a float graph needs no pairs


def chain() -> onnx.ModelProto:
    net = Net(x=["n", 8])
    y = "x"
    for name in "abc":
        y = net.op("MatMul", y, net.weight(f"w{name}", 8, 8), out=name)
    return net.build(y)


def test_large_values_stay_in_float32() -> None:
    model = load_onnx(chain())
    half = checked(model, {"b": 40_000.0})
    kinds = {node.outputs[0].name: node.outputs[0].dtype for node in half.graph}
    # "b" needs room of a factor of two: its producer and its reader stay
    assert kinds["b"] == ir.DataType.FLOAT
    assert kinds["a"] == HALF
    reader = next(node for node in half.graph if node.name == "MatMul:c")
    assert reader.inputs[0].name == "b"
    assert reader.inputs[1].dtype == ir.DataType.FLOAT
    assert checked(model, {"b": 30_000.0}).graph.initializers["wb.half"].dtype == HALF


def test_large_values_come_through() -> None:
    net = Net(x=["n", 8])
    big = net.op("Mul", "x", net.const("k", np.float32(1e5)), out="big")
    y = net.op("Mul", big, net.const("k2", np.float32(1e-5)), out="y")
    model = load_onnx(net.build(net.op("Sin", y)))
    feeds = feeds_for(model)
    peak = float(np.abs(values_of(model, ["big"], feeds)["big"]).max())
    half = checked(model, {"big": peak})
    assert sqnr_db(run(model, feeds)[0], run(half, feeds)[0]) > 50
    # the constants alone would have kept only the first product in float32
    spoiled = run(to_float16(model), feeds)[0]
    assert np.isfinite(run(half, feeds)[0]).all()
    assert spoiled.shape == (2, 8)


def test_large_weights_stay_in_float32() -> None:
    net = Net(x=["n", 8])
    weight = np.ones((8, 8), np.float32)
    weight[3, 3] = -7e4
    y = net.op("MatMul", net.op("Tanh", "x"), net.const("w", weight), out="m")
    model = load_onnx(net.build(net.op("Tanh", y)))
    half = checked(model)
    node = next(node for node in half.graph if node.op_type == "MatMul")
    assert node.inputs[1].name == "w"
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), weight)


def test_infinite_constants_are_no_reason() -> None:
    """Masks hold -inf, which float16 has."""
    net = Net(x=["n", 8])
    mask = np.zeros(8, np.float32)
    mask[5:] = -np.inf
    model = load_onnx(net.build(net.op("Softmax", net.op("Add", "x", net.const("m", mask)))))
    half = checked(model)
    assert half.graph.initializers["m.half"].dtype == HALF
    np.testing.assert_allclose(
        run(half, feeds_for(model))[0], run(model, feeds_for(model))[0], atol=2e-3
    )


def test_resize_keeps_its_scales_in_float32() -> None:
    net = Net(x=[1, 3, 4, 4])
    scales = net.const("scales", np.float32([1, 1, 2, 2]))
    model = load_onnx(net.build(net.op("Resize", "x", "", scales, mode="linear")))
    half = checked(model)
    node = next(node for node in half.graph if node.op_type == "Resize")
    assert (node.inputs[0].dtype, node.inputs[2].dtype) == (HALF, ir.DataType.FLOAT)
    feeds = feeds_for(model)
    np.testing.assert_allclose(run(half, feeds)[0], run(model, feeds)[0], atol=2e-3)


@pytest.mark.parametrize("kind", ["from int", "to int", "to float", "and back"])
def test_casts_of_the_models_own(kind: str) -> None:
    net = Net(x=["n", 8])
    if kind == "from int":
        net.inputs.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["n", 8]))
        y = net.op("Add", "x", net.op("Cast", "i", to=FLOAT))
    elif kind == "to int":
        rounded = net.op("Cast", net.op("Mul", "x", net.const("k", np.float32(4))), to=7)
        y = net.op("Add", "x", net.op("Cast", rounded, to=FLOAT))
    elif kind == "to float":
        y = net.op("Cast", net.op("Cast", net.op("Tanh", "x"), to=TensorProto.FLOAT16), to=FLOAT)
    else:
        y = net.op("Cast", net.op("Cast", "x", to=TensorProto.DOUBLE), to=FLOAT)
    model = load_onnx(net.build(net.op("Sin", y)))
    half = checked(model)
    feeds = feeds_for(model)
    if kind == "from int":
        feeds["i"] = np.arange(16).reshape(2, 8)
    np.testing.assert_allclose(run(half, feeds)[0], run(model, feeds)[0], atol=0.02)


def test_constants_of_a_computed_shape() -> None:
    net = Net(x=["n", 8])
    zeros = net.op("ConstantOfShape", net.op("Shape", "x"))
    model = load_onnx(net.build(net.op("Add", "x", zeros)))
    half = checked(model)
    np.testing.assert_allclose(
        run(half, feeds_for(model))[0], run(model, feeds_for(model))[0], atol=2e-3
    )


def test_an_output_that_is_also_read_inside() -> None:
    net = Net(x=["n", 8])
    middle = net.op("MatMul", "x", net.weight("w", 8, 8), out="middle")
    model = load_onnx(net.build(net.op("Tanh", middle, out="end"), middle))
    half = checked(model)
    end, inner = run(half, feeds_for(model))
    assert (end.dtype, inner.dtype) == (np.float32, np.float32)
    tanh = next(node for node in half.graph if node.op_type == "Tanh")
    assert tanh.inputs[0].dtype == HALF, "inside, float16 goes on"


def test_integer_and_untouched_ends() -> None:
    net = Net(x=["n", 8])
    net.outputs = [
        helper.make_tensor_value_info("top", TensorProto.INT64, None),
        helper.make_tensor_value_info("same", FLOAT, None),
    ]
    net.op("ArgMax", "x", out="top", axis=1)
    net.op("Identity", "x", out="same")
    model = load_onnx(net.build())
    half = checked(model)
    feeds = feeds_for(model)
    np.testing.assert_array_equal(run(half, feeds)[0], run(model, feeds)[0])
    np.testing.assert_allclose(run(half, feeds)[1], feeds["x"], atol=2e-3)


def test_one_cast_serves_all_readers() -> None:
    net = Net(x=["n", 8])
    model = load_onnx(net.build(net.op("Sin", "x"), net.op("Cos", "x"), net.op("Tanh", "x")))
    assert ops(checked(model)).count("Cast") == 4


def test_a_constant_that_both_types_read() -> None:
    net = Net(x=["n", 8])
    net.weight("w", 8, 8)
    a = net.op("MatMul", "x", "w", out="a")
    model = load_onnx(net.build(net.op("MatMul", a, "w", out="b")))
    half = checked(model, {"b": 1e6})
    assert {"w", "w.half"} <= set(half.graph.initializers)


def test_control_flow_is_refused() -> None:
    net = Net(x=["n", 8])
    net.inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [f"{op}_y"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_y", FLOAT, None)],
        )
        for op in ("Sin", "Cos")
    ]
    y = net.op("If", "c", then_branch=branches[0], else_branch=branches[1])
    with pytest.raises(ExportError, match=r"control flow \(If\).*use precision float32 or int8"):
        to_float16(load_onnx(net.build(y)))


def test_custom_operators_keep_float32() -> None:
    net = Net(x=["n", 8])
    inner = net.op("FastGelu", net.op("Sin", "x"), domain="com.microsoft")
    proto = net.build(net.op("Sin", inner), infer=False)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    half = to_float16(model)
    gelu = next(node for node in half.graph if node.op_type == "FastGelu")
    assert (gelu.inputs[0].dtype, gelu.outputs[0].dtype) == (ir.DataType.FLOAT,) * 2
    feeds = feeds_for(proto)
    np.testing.assert_allclose(run(half, feeds)[0], run(model, feeds)[0], atol=5e-3)


def allowed(schema: Any, parameter: Any) -> set[str]:
    for constraint in schema.type_constraints:
        if constraint.type_param_str == parameter.type_str:
            return set(constraint.allowed_type_strs)
    return {parameter.type_str}


def test_every_operator_without_float16_is_known() -> None:
    """Goes through ONNX's own list of operators, so that none is forgotten."""
    forgotten = []
    for name in {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}:
        try:
            schema = onnx.defs.get_schema(name, 20)
        except onnx.defs.SchemaError:
            continue
        if schema.deprecated or name in precision.FLOAT32_NODES:
            continue
        fixed = precision.FLOAT32_INPUTS.get(name, frozenset())
        for index, parameter in enumerate(schema.inputs):
            types = allowed(schema, parameter)
            if "tensor(float)" in types and "tensor(float16)" not in types and index not in fixed:
                forgotten.append(f"{name} input {parameter.name}")
        # the type of a Cast is changed; SequenceEmpty makes no tensor
        if {"dtype", "output_datatype"} & set(schema.attributes) and name != "SequenceEmpty":
            forgotten.append(f"{name} by attribute")
    assert not forgotten

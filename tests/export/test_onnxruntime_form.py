"""Lowering for ONNX Runtime: not a single code changes, and the layers really run in INT8."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_graphs import Net, as_it_is, feeds_for, minmax_spec, ops, quantized, run, run_optimized

from octavo.core.errors import ExportError
from octavo.export import (
    KernelDtypes,
    fingerprint,
    load_onnx,
    lower_for_onnxruntime,
    make_session,
    probe_dtypes,
    quantize_graph,
)

FORMS = (
    KernelDtypes("uint8", "int8"),
    KernelDtypes("uint8", "uint8"),
    KernelDtypes("int8", "int8"),
)
every_form = pytest.mark.parametrize("form", FORMS, ids=str)

# On x86 ONNX Runtime has integer kernels for int8 activations only where it can make them uint8.
FAST = FORMS if platform.machine() in ("aarch64", "arm64") else FORMS[:2]
EXACT = tuple(form for form in FAST if probe_dtypes(form))

INTEGER_NODES = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearAdd"}


def conv_then(after: Callable[[Net, str], str]) -> onnx.ModelProto:
    """A convolution, what is behind it, and another convolution that makes it quantized."""
    net = Net(x=["n", 3, 6, 6])
    return net.build(net.conv(after(net, net.conv("x", 8, 3)), 4, 8))


def clipped(low: float | None, high: float | None) -> Callable[[Net, str], str]:
    return lambda net, y: net.clip(y, low, high)


def dense(op: str, relu: bool) -> onnx.ModelProto:
    net = Net(x=["n", 8])
    if op == "Gemm":
        y = net.op("Gemm", "x", net.weight("w", 8, 8), net.weight("b", 8), transB=1)
    else:
        y = net.op("MatMul", "x", net.weight("w", 8, 8))
    y = net.op("Relu", y) if relu else y
    return net.build(net.op("Gemm", y, net.weight("w2", 8, 5), net.weight("b2", 5)))


def residual(relu: bool) -> onnx.ModelProto:
    net = Net(x=["n", 3, 6, 6])
    stem = net.op("Relu", net.conv("x", 8, 3))
    y = net.op("Add", stem, net.conv(stem, 8, 8))
    return net.build(net.conv(net.op("Relu", y) if relu else y, 4, 8))


def two_readers(also_output: bool, two_convs: bool) -> onnx.ModelProto:
    net = Net(x=["n", 3, 6, 6])
    y = net.op("Relu", net.conv("x", 8, 3))
    ends = [net.conv(y, 4, 8), net.conv(y, 4, 8) if two_convs else net.op("Sigmoid", y)]
    return net.build(*ends, *([y] if also_output else []))


def clamp_read_by_two_layers() -> onnx.ModelProto:
    """The float result of a convolution goes into two clamps."""
    net = Net(x=["n", 3, 6, 6])
    y = net.conv("x", 8, 3)
    return net.build(net.conv(net.op("Relu", y), 4, 8), net.conv(net.clip(y, -1, 1), 4, 8))


def pooled() -> onnx.ModelProto:
    net = Net(x=["n", 3, 8, 8])
    y = net.op("Relu", net.conv("x", 8, 3))
    joined = net.op("Concat", y, net.clip(net.conv("x", 8, 3), 0, 6), axis=1)
    y = net.op("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", net.conv(y, 8, 16))))
    return net.build(net.op("Gemm", y, net.weight("w", 8, 5), net.weight("b", 5)))


def branches() -> onnx.ModelProto:
    """Depthwise, grouped and transposed convolutions."""
    net = Net(x=["n", 4, 6, 6])
    y = net.clip(net.conv("x", 4, 4, group=4), 0, 6)
    y = net.op("Relu", net.conv(y, 8, 4, group=2))
    y = net.op("Relu", net.op("ConvTranspose", y, net.weight("t", 8, 4, 3, 3)))
    return net.build(net.conv(y, 4, 4))


GRAPHS: dict[str, onnx.ModelProto] = {
    "nothing behind": conv_then(lambda _net, y: y),
    "Relu": conv_then(lambda net, y: net.op("Relu", y)),
    "Clip(0, 6)": conv_then(clipped(0, 6)),
    "Clip(0, 0.5)": conv_then(clipped(0, 0.5)),
    "Clip(-1, 1)": conv_then(clipped(-1, 1)),
    "Clip(0.25, 0.5)": conv_then(clipped(0.25, 0.5)),
    "Clip(-2, -0.5)": conv_then(clipped(-2, -0.5)),
    "Clip(-0.5)": conv_then(clipped(-0.5, None)),
    "Clip(, 0.5)": conv_then(clipped(None, 0.5)),
    "Clip()": conv_then(clipped(None, None)),
    "Relu, then a sigmoid": conv_then(lambda net, y: net.op("Sigmoid", net.op("Relu", y))),
    "Gemm": dense("Gemm", relu=False),
    "Gemm, Relu": dense("Gemm", relu=True),
    "MatMul": dense("MatMul", relu=False),
    "MatMul, Relu": dense("MatMul", relu=True),
    "Add": residual(relu=False),
    "Add, Relu": residual(relu=True),
    "clamp with two readers": two_readers(also_output=False, two_convs=True),
    "clamp with a float reader": two_readers(also_output=False, two_convs=False),
    "clamp that is an output": two_readers(also_output=True, two_convs=True),
    "two clamps of one layer": clamp_read_by_two_layers(),
    "pooling and Concat": pooled(),
    "kinds of convolutions": branches(),
}
every_graph = pytest.mark.parametrize("name", GRAPHS)


@every_graph
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_not_a_bit_changes(name: str, dtype: str) -> None:
    _, portable, _ = quantized(GRAPHS[name], dtype=dtype, shrink=0.8)
    feeds = [feeds_for(portable.model, seed=seed, batch=3, scale=1 + seed) for seed in range(3)]
    wanted = [run(portable.model, one) for one in feeds]
    for form in FORMS:
        lowered = lower_for_onnxruntime(portable.model, form).model
        onnx.checker.check_model(ir.to_proto(lowered), full_check=True)
        for one, results in zip(feeds, wanted, strict=True):
            for want, have in zip(results, run(lowered, one), strict=True):
                np.testing.assert_array_equal(have, want, err_msg=str(form))


def codes_apart(portable: ir.Model, lowered: ir.Model, feeds: dict[str, Any]) -> np.ndarray:
    """By how many steps the optimized graph's codes differ, over all Q/DQ pairs."""
    apart = []
    for node in portable.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[0].name not in feeds:
            name, scale = f"{node.inputs[0].name}.dq", float(node.inputs[1].const_value.numpy())
            want = run(_with_output(portable, name), feeds)[0]
            have = run_optimized(_with_output(lowered, name), feeds)[0]
            apart.append(np.rint((have - want) / scale).ravel())
    return np.concatenate(apart)


def _with_output(model: ir.Model, name: str) -> ir.Model:
    copy = model.clone()
    copy.graph.outputs[:] = [ir.convenience.create_value_mapping(copy.graph)[name]]
    return copy


@every_graph
@pytest.mark.parametrize("form", EXACT, ids=str)
def test_integer_kernels_differ_by_a_step_at_most_and_rarely(name: str, form: KernelDtypes) -> None:
    _, portable, _ = quantized(GRAPHS[name], shrink=0.8, batch=8)
    lowered = lower_for_onnxruntime(portable.model, form).model
    feeds = feeds_for(portable.model, batch=8, seed=5)
    apart = codes_apart(portable.model, lowered, feeds)
    assert np.abs(apart).max() <= 1
    assert (apart != 0).mean() <= 0.01


def optimized_ops(model: ir.Model, folder: Path) -> list[str]:
    path = folder / "optimized.onnx"
    make_session(model, optimized_path=path)
    return [node.op_type for node in onnx.load(path).graph.node]


LAYERS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add"}
STAYS_FLOAT = {
    "Relu, then a sigmoid": 1,
    "clamp that is an output": 1,
    "two clamps of one layer": 1,
    "kinds of convolutions": 1,
}


@every_graph
@pytest.mark.parametrize("form", FAST, ids=str)
def test_layers_really_run_in_int8(name: str, form: KernelDtypes, tmp_path: Path) -> None:
    _, portable, _ = quantized(GRAPHS[name])
    lowered = lower_for_onnxruntime(portable.model, form)
    outputs = {value.name for value in lowered.model.graph.outputs}
    found = optimized_ops(lowered.model, tmp_path)
    integer = [op for op in found if op in INTEGER_NODES]
    # the last convolution of each graph gives a float output
    last = sum(layer.output in outputs and layer.op == "Conv" for layer in portable.layers)
    assert len(lowered.float_layers) == last + STAYS_FLOAT.get(name, 0)
    assert len(integer) == len(portable.layers) - len(lowered.float_layers), found


def test_an_int8_chain_stays_in_int8_from_end_to_end(tmp_path: Path) -> None:
    net = Net(x=["n", 3, 8, 8])
    y = "x"
    for cin, cout in ((3, 8), (8, 8), (8, 8)):
        y = net.clip(net.conv(y, cout, cin), 0, 6)
    proto = net.build(net.op("Gemm", net.op("Flatten", y), net.weight("w", 512, 4)))
    _, portable, _ = quantized(proto)
    found = optimized_ops(lower_for_onnxruntime(portable.model, FORMS[0]).model, tmp_path)
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") <= 1


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_clamps_that_the_range_holds_already_vanish(dtype: str) -> None:
    _, portable, _ = quantized(GRAPHS["Relu"], dtype=dtype)
    found = ops(lower_for_onnxruntime(portable.model, FORMS[0]).model)
    # int8 spends half of its codes below zero: there the clamp of codes stays
    assert ("Clip" in found) == (dtype == "int8")
    assert "Relu" not in found


def test_biases_are_int32_on_the_accumulators_step() -> None:
    _, portable, _ = quantized(GRAPHS["Relu"])
    lowered = lower_for_onnxruntime(portable.model, FORMS[0]).model
    before = {node.name: node for node in portable.model.graph}
    checked = 0
    for node in lowered.graph:
        if node.op_type != "Conv" or node.name == "Conv:conv_2":
            continue
        dequantize = node.inputs[2].producer()
        assert dequantize.op_type == "DequantizeLinear"
        codes, scale, zero = (value.const_value.numpy() for value in dequantize.inputs)
        assert (codes.dtype, scale.dtype, zero.dtype) == (np.int32, np.float32, np.int32)
        source, weight = (value.producer().inputs[1] for value in node.inputs[:2])
        step = source.const_value.numpy() * weight.const_value.numpy()
        np.testing.assert_array_equal(scale, step)
        bias = before[node.name].inputs[2].const_value.numpy()
        np.testing.assert_array_equal(codes.astype(np.float32) * scale, bias)
        checked += 1
    assert checked == 1


def test_a_dead_channel_with_a_large_bias() -> None:
    """Its bias takes half of the accumulator, more digits than a float32 has."""
    net = Net(x=["n", 3, 6, 6])
    weight = net.random.normal(size=(8, 3, 3, 3)).astype(np.float32)
    weight[3] = 1e-20
    bias = np.full(8, 0.1, np.float32)
    bias[3] = 3.3333
    net.const("w", weight)
    y = net.op("Conv", "x", "w", net.const("b", bias))
    model, portable, feeds = quantized(net.build(net.conv(y, 4, 8)))
    want = run(portable.model, feeds)[0]
    assert np.abs(want - run(model, feeds)[0]).max() < 1
    for form in EXACT:
        lowered = lower_for_onnxruntime(portable.model, form).model
        np.testing.assert_array_equal(run(lowered, feeds)[0], want)
        np.testing.assert_allclose(run_optimized(lowered, feeds)[0], want, atol=0.05)


def test_layers_left_in_float_keep_their_weights_folded_and_say_why() -> None:
    _, portable, _ = quantized(GRAPHS["kinds of convolutions"])
    lowered = lower_for_onnxruntime(portable.model, FORMS[0])
    reasons = list(lowered.float_layers.values())
    assert len(reasons) == 2
    assert "no INT8 kernel for ConvTranspose" in reasons[0]
    assert "needs a quantized output, and this one goes to the model's output" in reasons[1]
    for node in lowered.model.graph:
        if node.name in lowered.float_layers:
            assert node.inputs[1].is_initializer()
            assert node.inputs[1].dtype == ir.DataType.FLOAT
    _, portable, _ = quantized(GRAPHS["Relu, then a sigmoid"])
    (reason, _) = lower_for_onnxruntime(portable.model, FORMS[0]).float_layers.values()
    assert "goes to Relu in float" in reason


@every_form
def test_a_float_model_comes_back_as_it_is(form: KernelDtypes) -> None:
    model = load_onnx(GRAPHS["pooling and Concat"])
    lowered = lower_for_onnxruntime(model, form)
    assert fingerprint(lowered.model) == fingerprint(model)
    assert not lowered.float_layers


def test_the_portable_graph_is_not_changed() -> None:
    _, portable, _ = quantized(GRAPHS["pooling and Concat"])
    before = fingerprint(portable.model)
    lower_for_onnxruntime(portable.model, FORMS[1])
    assert fingerprint(portable.model) == before


def test_scales_that_are_no_constants_are_refused() -> None:
    net = Net(x=["n", 3, 6, 6], scale=[])
    zero = net.const("zero", np.int8(0))
    codes = net.op("QuantizeLinear", "x", "scale", zero)
    model = load_onnx(net.build(net.op("DequantizeLinear", codes, "scale", zero)))
    model.graph.inputs[0].name = "x"
    for node in model.graph:
        node.replace_input_with(2, node.inputs[1])
    with pytest.raises(ExportError, match="not a constant"):
        lower_for_onnxruntime(model, FORMS[0])


@settings(max_examples=40, deadline=None)
@given(
    clamps=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(-3, 3, width=16)),
            st.one_of(st.none(), st.floats(-3, 3, width=16)),
        ),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from(["int8", "uint8"]),
    shrink=st.sampled_from([0.1, 0.9, 1.0]),
)
def test_any_chain_of_clamps(
    clamps: list[tuple[float | None, float | None]], dtype: str, shrink: float
) -> None:
    """Also clamps that are empty or upside down, in which the upper bound wins."""
    net = Net(x=[2, 4])
    y = net.op("Gemm", "x", net.weight("w", 4, 8, scale=2), net.weight("b", 8))
    for low, high in clamps:
        y = net.clip(y, low, high)
    proto = net.build(net.op("Gemm", y, net.weight("w2", 8, 2)))
    model = as_it_is(proto)  # the simplifier of load_onnx would join the clamps
    feeds = feeds_for(proto)
    portable = quantize_graph(model, minmax_spec(model, feeds, dtype=dtype, shrink=shrink)).model
    for form in FORMS:
        lowered = lower_for_onnxruntime(portable, form).model
        np.testing.assert_array_equal(run(lowered, feeds)[0], run(portable, feeds)[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("channels", "filters"), [(3, 16), (3, 8), (1, 16)])
def test_a_pictures_three_channels_get_a_fourth(
    form: KernelDtypes, channels: int, filters: int
) -> None:
    net = Net(x=["batch", channels, 9, 9])
    y = net.op("Relu", net.conv("x", filters, channels))
    _, qdq, _ = quantized(net.build(net.conv(y, 4, filters)))
    lowered = lower_for_onnxruntime(qdq.model, form).model
    assert ops(lowered).count("Gather") == (
        channels == 3 and filters == 16 and form.weight == "int8"
    )
    feeds = feeds_for(qdq.model, batch=3)
    for found, expected in zip(run(lowered, feeds), run(qdq.model, feeds), strict=True):
        np.testing.assert_array_equal(found, expected)

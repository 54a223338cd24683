"""Q/DQ graphs: valid, small, and equal to a fake-quantized reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from tiny_graphs import Net, feeds_for, minmax_spec, ops, quantized, run

from octavo.core.errors import InputError
from octavo.export import (
    QdqModel,
    QuantSpec,
    adjust_weights,
    fingerprint,
    insert_qdq,
    load_onnx,
    place,
    quantize_graph,
    serialize,
)
from octavo.quant import PerChannel, QParams, qparams_from_range

Array = np.ndarray[Any, Any]


def fake(x: Array, qparams: QParams, axis: int | None = None) -> Array:
    """Quantize and dequantize, in float64."""
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    scale = qparams.scale.numpy().astype(np.float64).reshape(shape if axis is not None else ())
    zero = qparams.zero_point.numpy().reshape(shape if axis is not None else ())
    kind = qparams.dtype
    # the division is float32's, as ONNX has it
    code = np.rint(x.astype(np.float32) / scale.astype(np.float32)) + zero
    return (np.clip(code, kind.qmin, kind.qmax) - zero) * scale


SINGLE_LAYERS: dict[str, tuple[list[int], str, tuple[int, ...], int | None, dict[str, Any]]] = {
    "Conv": ([2, 4, 6, 6], "Conv", (6, 4, 3, 3), 0, {}),
    "depthwise": ([2, 4, 6, 6], "Conv", (4, 1, 3, 3), 0, {"group": 4}),
    "ConvTranspose": ([2, 4, 6, 6], "ConvTranspose", (4, 6, 3, 3), 1, {}),
    "grouped ConvTranspose": ([2, 4, 6, 6], "ConvTranspose", (4, 3, 3, 3), None, {"group": 2}),
    "Gemm": ([3, 4], "Gemm", (4, 6), 1, {}),
    "Gemm transB": ([3, 4], "Gemm", (6, 4), 0, {"transB": 1}),
    "MatMul": ([2, 3, 4], "MatMul", (4, 6), 1, {}),
    "stacked MatMul": ([2, 3, 4], "MatMul", (2, 4, 6), None, {}),
}


def float64(op: str, x: Array, w: Array, attributes: dict[str, Any]) -> Array:
    a, b = torch.from_numpy(x), torch.from_numpy(w)
    if op == "Conv":
        return torch.conv2d(a, b, groups=attributes.get("group", 1)).numpy()
    if op == "ConvTranspose":
        return torch.conv_transpose2d(a, b, groups=attributes.get("group", 1)).numpy()
    return (a @ (b.T if attributes.get("transB") else b)).numpy()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", SINGLE_LAYERS)
def test_a_single_layer_equals_its_reference(case: str, bias: bool, dtype: str) -> None:
    shape, op, weight_shape, axis, attributes = SINGLE_LAYERS[case]
    net = Net(x=shape)
    net.weight("w", *weight_shape)
    parts = ["x", "w"]
    channels = 4 if case == "depthwise" else 6
    if bias and op != "MatMul":
        parts.append(net.weight("b", channels))
    y = net.op(op, *parts, **attributes)
    if bias and op == "MatMul":
        y = net.op("Add", y, net.weight("b", channels))
    model, result, feeds = quantized(net.build(y), dtype=dtype, shrink=0.7)

    assert len(result.layers) == 1
    scales, activation = result.weights["w"], minmax_spec(model, feeds, dtype=dtype, shrink=0.7)
    source = activation.activations["x"]
    assert scales.axis == axis
    weight = model.graph.initializers["w"].const_value.numpy()
    expected = float64(op, fake(feeds["x"], source), fake(weight, scales, axis), attributes)
    if bias:
        offset = model.graph.initializers["b"].const_value.numpy().astype(np.float64)
        if op != "MatMul":
            step = (np.float32(source.scale) * scales.scale.numpy()).astype(np.float64)
            offset = np.rint(offset / step) * step
        expected = expected + offset.reshape((-1, 1, 1) if "Conv" in op else -1)
    found = run(result.model, feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - run(model, feeds)[0]).max() > 1e-4, "nothing was quantized"


def small_net(channels: int = 16) -> onnx.ModelProto:
    """Stem, residual block, concatenation, pooling, and a Gemm at the end."""
    net = Net(x=["n", 3, 8, 8])
    stem = net.clip(net.conv("x", channels, 3), 0, 6)
    body = net.conv(net.op("Relu", net.conv(stem, channels, channels)), channels, channels)
    block = net.op("Relu", net.op("Add", stem, body))
    joined = net.op("Concat", block, stem, axis=1)
    pooled = net.op("MaxPool", joined, kernel_shape=[2, 2], strides=[2, 2])
    mean = net.op("GlobalAveragePool", net.conv(pooled, channels, 2 * channels))
    flat = net.op("Flatten", mean)
    return net.build(net.op("Gemm", flat, net.weight("w", 10, channels), transB=1))


@pytest.mark.parametrize("half_scales", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_the_result_passes_the_full_check(dtype: str, half_scales: bool) -> None:
    model = load_onnx(small_net())
    spec = minmax_spec(model, feeds_for(model), dtype=dtype)
    result = quantize_graph(model, spec, half_scales=half_scales)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    scales = [
        node.inputs[1].const_value.numpy()
        for node in result.model.graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    halves = all((scale == scale.astype(np.float16)).all() for scale in scales)
    assert halves == half_scales


def test_the_file_has_about_a_quarter_of_the_size() -> None:
    model, result, _ = quantized(small_net(channels=64))
    share = len(serialize(result.model)) / len(serialize(model))
    assert 0.25 <= share <= 0.29


def test_every_tensor_has_one_pair_and_every_layer_reads_pairs() -> None:
    _, result, _ = quantized(small_net())
    graph = result.model.graph
    pairs = [node.inputs[0].name for node in graph if node.op_type == "QuantizeLinear"]
    assert len(pairs) == len(set(pairs))
    for quantize in graph:
        if quantize.op_type == "QuantizeLinear":
            (reader,) = [user for user, _ in quantize.outputs[0].uses()]
            assert reader.op_type == "DequantizeLinear"
            assert reader.inputs[1:] == quantize.inputs[1:]
    layers = {layer.name for layer in result.layers}
    assert len(layers) == 6
    for node in graph:
        if node.name in layers:
            inputs = node.inputs[:2]
            assert {value.producer().op_type for value in inputs} == {"DequantizeLinear"}


def test_between_a_layer_and_its_clamp_lies_no_pair() -> None:
    _, result, _ = quantized(small_net())
    for node in result.model.graph:
        if node.op_type in ("Relu", "Clip"):
            assert node.inputs[0].producer().op_type in ("Conv", "Add")


@pytest.mark.parametrize("tensor", ["x", "middle"])
def test_a_layer_without_a_scale_stays_float_and_says_so(tensor: str) -> None:
    net = Net(x=["n", 3, 8, 8])
    net.op("Conv", "x", net.weight("w1", 4, 3, 3, 3), out="middle")
    y = net.op("Conv", "middle", net.weight("w2", 4, 4, 3, 3), out="last")
    model = load_onnx(net.build(y))
    feeds = feeds_for(model)
    spec = minmax_spec(model, feeds)
    del spec.activations[tensor]  # type: ignore[attr-defined]
    result = quantize_graph(model, spec)
    left, kept = ("middle", "last") if tensor == "x" else ("last", "middle")
    assert result.reasons == {f"Conv:{left}": f"the calibration table has no scale for {tensor!r}"}
    assert [layer.output for layer in result.layers] == [kept]
    assert ops(result.model).count("QuantizeLinear") == 1
    run(result.model, feeds)


def test_an_empty_table_gives_the_float_graph_back() -> None:
    model = load_onnx(small_net())
    result = quantize_graph(model, QuantSpec({}))
    assert fingerprint(result.model) == fingerprint(model)
    assert len(result.reasons) == 6


def test_an_excluded_layer_reads_float() -> None:
    net = Net(x=["n", 4, 8, 8])
    net.op("Conv", "x", net.weight("w1", 4, 4, 3, 3), out="a")
    net.op("Conv", "a", net.weight("w2", 4, 4, 3, 3), out="b")
    net.op("Conv", "b", net.weight("w3", 4, 4, 3, 3), out="c")
    model = load_onnx(net.build("c"))
    feeds = feeds_for(model)
    result = quantize_graph(model, minmax_spec(model, feeds, exclude=("b",)))
    nodes = {node.name: node for node in result.model.graph}
    assert nodes["Conv:b"].inputs[0].name == "a"
    assert nodes["Conv:b"].inputs[1].name == "w2"
    assert nodes["Conv:c"].inputs[0].name == "b.dq"


def test_shared_weights_are_quantized_for_each_layer() -> None:
    """The bias of the second layer needs a larger weight scale than the first has."""
    net = Net(x=["n", 4, 8, 8])
    net.const("w", np.full((4, 4, 1, 1), 1e-9, np.float32))
    net.const("b", np.array([1e4, 0, 0, 0], np.float32))
    first = net.op("Conv", "x", "w")
    y = net.op("Conv", first, "w", "b")
    model, result, feeds = quantized(net.build(y))
    np.testing.assert_allclose(
        run(result.model, feeds)[0], run(model, feeds)[0], rtol=1e-6, atol=1e-9
    )


def test_weights_that_float_layers_read_too_stay_beside_the_codes() -> None:
    net = Net(x=[4, 4])
    net.weight("w", 4, 4)
    product, other = net.op("MatMul", "x", "w"), net.op("Mul", "x", "w")
    model, result, feeds = quantized(net.build(net.op("Add", product, other)))
    assert {"w:matmul_0.int8"} <= set(result.model.graph.initializers)
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], atol=0.1)


@pytest.mark.parametrize("correct", [False, True])
def test_names_that_clash_with_the_models_own(correct: bool) -> None:
    """torch calls the result of its first Linear "linear", and a module may be called that too."""
    net = Net(x=["n", 8])
    net.op("Gemm", "x", net.weight("fc.weight", 8, 8), net.weight("fc.bias", 8), out="linear")
    names = net.weight("linear.weight", 8, 8), net.weight("linear.bias", 8)
    net.weight("x.scale", 8)
    y = net.op("Mul", net.op("Gemm", "linear", *names, out="linear_1"), "x.scale")
    model = load_onnx(net.build(y))
    feeds = feeds_for(model)
    spec = minmax_spec(model, feeds)
    if correct:
        zeros = dict.fromkeys(("linear", "linear_1"), (0.0,) * 8)
        spec = QuantSpec(spec.activations, bias_correction=zeros)
    result = quantize_graph(model, spec)
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], atol=0.2)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)


# --- corrections


def corrected_net() -> onnx.ModelProto:
    net = Net(x=["n", 4, 8, 8])
    net.op("Conv", "x", net.weight("w1", 4, 4, 1, 1), out="a")
    net.op("Conv", "a", net.weight("w2", 4, 4, 1, 1), net.weight("b2", 4), out="b")
    flat = net.op("Flatten", net.op("GlobalAveragePool", "b"))
    net.op("MatMul", flat, net.weight("w3", 4, 5), out="m")
    net.op("Add", "m", net.weight("b3", 5), out="linear")
    return net.build(
        net.op(
            "Gemm",
            "linear",
            net.weight("w4", 5, 5),
            net.const("b4", np.ones((1, 5), np.float32)),
            out="g",
        )
    )


@pytest.mark.parametrize("output", ["a", "b", "m", "g"])
def test_a_correction_is_added_to_the_layers_output(output: str) -> None:
    model = load_onnx(corrected_net())
    placement, feeds = place(model), feeds_for(model)
    channels = 4 if output in "ab" else 5
    delta = np.linspace(-1, 1, channels).astype(np.float32)
    spec = QuantSpec({}, bias_correction={output: tuple(map(float, delta))})
    before = fingerprint(model)
    adjusted = adjust_weights(model, placement, spec)
    assert fingerprint(model) == before, "the model itself was changed"
    tensor = "linear" if output == "m" else output

    def value(which: ir.Model) -> Array:
        copy = which.clone()
        copy.graph.outputs[:] = [ir.convenience.create_value_mapping(copy.graph)[tensor]]
        return run(copy, feeds)[0]

    added = value(adjusted) - value(model)
    shape = (1, -1, 1, 1) if output in "ab" else (1, -1)
    np.testing.assert_allclose(added, np.broadcast_to(delta.reshape(shape), added.shape), atol=1e-5)


def test_a_shared_bias_is_corrected_for_one_layer_only() -> None:
    net = Net(x=["n", 4])
    net.weight("b", 4)
    net.op("Gemm", "x", net.weight("w1", 4, 4), "b", out="a")
    net.op("Gemm", "a", net.weight("w2", 4, 4), "b", out="c")
    model = load_onnx(net.build("c", "a"))
    feeds, placement = feeds_for(model), place(model)
    spec = QuantSpec({}, bias_correction={"c": (1.0, 2.0, 3.0, 4.0)})
    (c, a), (c2, a2) = run(model, feeds), run(adjust_weights(model, placement, spec), feeds)
    np.testing.assert_array_equal(a2, a)
    np.testing.assert_allclose(c2 - c, np.broadcast_to([1, 2, 3, 4], c.shape), atol=1e-5)


def test_corrections_that_do_not_fit() -> None:
    model = load_onnx(corrected_net())
    placement = place(model)
    with pytest.raises(InputError, match="'nothing', which no quantized layer makes"):
        adjust_weights(model, placement, QuantSpec({}, bias_correction={"nothing": (1.0,)}))
    with pytest.raises(InputError, match="4 biases, not 3"):
        adjust_weights(model, placement, QuantSpec({}, bias_correction={"b": (1.0,) * 3}))
    net = Net(x=["n", 4])
    model = load_onnx(net.build(net.op("MatMul", "x", net.weight("w", 4, 4), out="m")))
    with pytest.raises(InputError, match="no bias to correct"):
        adjust_weights(model, place(model), QuantSpec({}, bias_correction={"m": (1.0,) * 4}))


def test_names_and_granularities_that_do_not_fit() -> None:
    model = load_onnx(small_net())
    good = qparams_from_range(-1.0, 1.0)
    with pytest.raises(InputError, match="no tensor 'flower' that can be quantized"):
        insert_qdq(model, place(model), {"flower": good})
    with pytest.raises(InputError, match=r"no tensor .* that can be quantized"):
        quantize_graph(model, QuantSpec({"x": good}, exclude=("*",)))
    channels = qparams_from_range(-torch.ones(3), torch.ones(3), granularity=PerChannel(1))
    with pytest.raises(InputError, match="per tensor; 'x' is not"):
        insert_qdq(model, place(model), {"x": channels})


def test_quantizing_does_not_change_the_model() -> None:
    model = load_onnx(small_net())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result: QdqModel = quantize_graph(model, minmax_spec(model, feeds_for(model)))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [v.name for v in result.model.graph.outputs] == [v.name for v in model.graph.outputs]


def test_outputs_keep_their_names_where_they_are_quantized_inside() -> None:
    net = Net(x=["n", 4, 8, 8])
    middle = net.op("Relu", net.conv("x", 4, 4))
    proto = net.build(net.conv(middle, 4, 4), middle)
    model, result, feeds = quantized(proto)
    names = [value.name for value in result.model.graph.outputs]
    assert names == [value.name for value in model.graph.outputs]
    # the output itself is not rounded to codes
    inner = run(result.model, feeds)[1]
    assert len(np.unique(inner)) > 128

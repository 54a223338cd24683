"""Which layers and tensors of typical graphs are quantized, and why others are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tiny_graphs import FLOAT, Net, feeds_for, layer_names, minmax_spec, run

from octavo.core.errors import InputError
from octavo.export import Placement, load_onnx, place, quantize_graph


def placed(net: Net, *outputs: str, exclude: tuple[str, ...] = ()) -> Placement:
    """The placement; the graph that it gives must also run."""
    model = load_onnx(net.build(*outputs))
    placement = place(model, exclude)
    feeds = feeds_for(model)
    result = quantize_graph(model, minmax_spec(model, feeds, exclude=exclude))
    for want, have in zip(run(model, feeds), run(result.model, feeds), strict=True):
        assert want.shape == have.shape
        assert np.abs(want - have).max(initial=0) <= 0.2 * np.abs(want).max(initial=1)
    return placement


def only_reason(placement: Placement) -> str:
    (reason,) = placement.reasons.values()
    return reason


# --- single layers


@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        (["n", 4, 9], (6, 4, 3), {}),
        (["n", 4, 9, 9], (6, 4, 3, 3), {"strides": [2, 2]}),
        (["n", 4, 5, 5, 5], (6, 4, 3, 3, 3), {}),
        (["n", 4, 9, 9], (4, 1, 3, 3), {"group": 4}),
        (["n", 4, 9, 9], (6, 2, 3, 3), {"group": 2}),
    ],
    ids=["1-D", "2-D", "3-D", "depthwise", "grouped"],
)
def test_convolutions(
    shape: list[int | str], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    net = Net(x=shape)
    y = net.op("Conv", "x", net.weight("w", *weight), net.weight("b", weight[0]), **attributes)
    placement = placed(net, y)
    (layer,) = placement.layers
    assert (layer.op, layer.weight, layer.weight_axis, layer.bias) == ("Conv", "w", 0, "b")
    assert placement.tensors == {"x": (layer.name,)}
    assert not placement.reasons
    assert not placement.groups


@pytest.mark.parametrize(("group", "axis"), [(1, 1), (2, None)])
def test_transposed_convolutions(group: int, axis: int | None) -> None:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("ConvTranspose", "x", net.weight("w", 4, 6 // group, 3, 3), group=group)
    (layer,) = placed(net, y).layers
    assert (layer.weight_axis, layer.bias) == (axis, None)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (1, 1)])
def test_gemm(transposed: int, bias: tuple[int, ...] | None) -> None:
    net = Net(x=["n", 4])
    parts = ["x", net.weight("w", *((6, 4) if transposed else (4, 6)))]
    if bias is not None:
        parts.append(net.const("b", np.full(bias, 0.7, dtype=np.float32)))
    (layer,) = placed(net, net.op("Gemm", *parts, transB=transposed)).layers
    assert layer.weight_axis == 1 - transposed
    assert layer.bias == (None if bias is None else "b")


@pytest.mark.parametrize(
    ("attributes", "bias", "reason"),
    [
        ({"alpha": 0.5}, (6,), "alpha"),
        ({"beta": 0.5}, (6,), "beta"),
        ({"transA": 1}, (6,), "transA"),
        ({}, (4, 6), "row to row"),
        ({}, (4, 1), "row to row"),
    ],
)
def test_gemm_without_an_int8_kernel(
    attributes: dict[str, Any], bias: tuple[int, ...], reason: str
) -> None:
    net = Net(x=[4, 4])
    y = net.op("Gemm", "x", net.weight("w", 4, 6), net.weight("b", *bias), **attributes)
    placement = placed(net, y)
    assert reason in only_reason(placement)
    assert not placement.layers
    assert not placement.tensors


def test_matmul_by_a_weight_and_its_bias() -> None:
    net = Net(x=["n", 5, 4])
    y = net.op("Add", net.weight("b", 6), net.op("MatMul", "x", net.weight("w", 4, 6), out="m"))
    (layer,) = placed(net, y).layers
    assert (layer.weight_axis, layer.bias, layer.output) == (1, "b", "m")


@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 5, 6)])
def test_what_is_added_to_a_matmul_is_a_bias_only_a_number_a_channel(
    shape: tuple[int, ...],
) -> None:
    net = Net(x=[2, 5, 4])
    y = net.op("Add", net.op("MatMul", "x", net.weight("w", 4, 6)), net.weight("b", *shape))
    (layer,) = placed(net, y).layers
    assert layer.bias is None


def test_a_bias_wider_than_its_matmul_is_no_bias() -> None:
    net = Net(x=["n", 4])
    y = net.op("Add", net.op("MatMul", "x", net.weight("w", 4, 1)), net.weight("b", 6))
    (layer,) = placed(net, y).layers
    assert layer.bias is None


def test_a_matmul_of_stacked_weights_has_one_scale() -> None:
    net = Net(x=[2, 5, 4])
    (layer,) = placed(net, net.op("MatMul", "x", net.weight("w", 2, 4, 6))).layers
    assert (layer.weight, layer.weight_axis) == ("w", None)


def test_a_matmul_of_two_activations() -> None:
    net = Net(x=["n", 5, 4], y=["n", 4, 5])
    placement = placed(net, net.op("MatMul", "x", "y"))
    (layer,) = placement.layers
    assert (layer.weight, layer.activations) == (None, ("x", "y"))
    assert set(placement.tensors) == {"x", "y"}


def test_a_matmul_with_itself_has_one_pair() -> None:
    net = Net(x=[4, 4])
    placement = placed(net, net.op("MatMul", "x", "x"))
    assert placement.layers[0].activations == ("x",)


def test_a_constant_on_the_left_stays_float() -> None:
    net = Net(x=[4, 6])
    assert "left side" in only_reason(placed(net, net.op("MatMul", net.weight("w", 5, 4), "x")))


def test_weights_that_are_computed_stay_float() -> None:
    net = Net(x=["n", 3, 6, 6], w=[4, 3, 3, 3])
    placement = placed(net, net.op("Conv", "x", net.op("Tanh", "w")))
    assert "weights are not constant" in only_reason(placement)
    net = Net(x=["n", 3, 6, 6], b=[4])
    y = net.op("Conv", "x", net.weight("w", 4, 3, 3, 3), "b")
    assert "bias is not constant" in only_reason(placed(net, y))


def test_a_float16_graph_stays_as_it_is() -> None:
    net = Net()
    half = TensorProto.FLOAT16
    net.inputs = [helper.make_tensor_value_info("x", half, [2, 4])]
    net.outputs = [helper.make_tensor_value_info("y", half, None)]
    w = net.const("w", np.ones((4, 4), dtype=np.float16))
    net.op("MatMul", net.op("MatMul", "x", w), "x2", out="y")
    net.nodes.insert(0, helper.make_node("Transpose", ["x"], ["x2"]))
    placement = place(load_onnx(net.build()))
    assert not placement.layers
    assert sorted(placement.reasons.values()) == [
        "it computes in float16",
        "it does not compute in float32",
    ]


# --- residual connections


def test_resnet_like_blocks_add_in_int8() -> None:
    net = Net(x=["n", 4, 8, 8])
    stem = net.op("Relu", net.conv("x", 4, 4))
    body = net.conv(net.op("Relu", net.conv(stem, 4, 4)), 4, 4)
    first = net.op("Relu", net.op("Add", stem, body, out="add1"))
    body2 = net.conv(net.op("Relu", net.conv(first, 8, 4, strides=[2, 2])), 8, 8)
    short = net.conv(first, 8, 4, k=1, strides=[2, 2], pads=[0] * 4)
    last = net.op("Relu", net.op("Add", body2, short, out="add2"))
    placement = placed(net, net.conv(last, 4, 8))
    layers = {layer.output: layer for layer in placement.layers}
    assert set(layers["add1"].activations) == {stem, body}
    assert set(layers["add2"].activations) == {body2, short}
    assert set(placement.tensors[stem]) == {f"Conv:{net.nodes[2].output[0]}", "Add:add1"}
    assert not placement.groups


def test_a_residual_sum_that_no_int8_layer_reads_stays_float() -> None:
    net = Net(x=["n", 4, 8, 8])
    stem = net.conv("x", 4, 4)
    y = net.op("Add", stem, net.conv(stem, 4, 4), out="add")
    assert "add" not in {layer.output for layer in placed(net, net.op("Softmax", y)).layers}


def test_mobilenet_like_blocks() -> None:
    net = Net(x=["n", 4, 8, 8])
    stem = net.clip(net.conv("x", 4, 4), 0, 6)
    wide = net.clip(net.conv(stem, 8, 4, k=1), 0, 6)
    deep = net.clip(net.conv(wide, 8, 8, group=8), 0, 6)
    narrow = net.conv(deep, 4, 8, k=1)
    block = net.op("Add", stem, narrow, out="add")
    pooled = net.op("GlobalAveragePool", net.op("Relu", net.conv(block, 8, 4, k=1)))
    flat = net.op("Flatten", pooled)
    y = net.op("Gemm", flat, net.weight("w", 8, 5))
    placement = placed(net, y)
    assert [layer.op for layer in placement.layers] == ["Conv"] * 4 + ["Add", "Conv", "Gemm"]
    assert "add" in placement.tensors
    # the average is taken of codes, and flattening keeps the scale
    before = net.nodes[[n.op_type for n in net.nodes].index("GlobalAveragePool")].input[0]
    assert before in placement.tensors
    assert placement.groups == ((pooled, flat),)


def attention(net: Net, x: str, name: str) -> str:
    q, k, v = (net.op("MatMul", x, net.weight(f"{name}{part}", 8, 8)) for part in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    mixed = net.op("MatMul", net.op("Softmax", scores), v)
    return net.op("MatMul", mixed, net.weight(f"{name}o", 8, 8))


def norm(net: Net, x: str) -> str:
    n = len(net.nodes)
    scale = net.const(f"g{n}", np.ones(8, dtype=np.float32))
    return net.op("LayerNormalization", x, scale, net.weight(f"s{n}", 8))


def mlp(net: Net, x: str, name: str) -> str:
    inner = net.op("Add", net.op("MatMul", x, net.weight(f"{name}1", 8, 16)), f"{name}b")
    net.weight(f"{name}b", 16)
    return net.op("MatMul", net.op("Gelu", inner), net.weight(f"{name}2", 16, 8))


@pytest.mark.parametrize("pre", [True, False], ids=["pre-LN", "post-LN"])
def test_the_residual_stream_of_a_transformer_stays_float(pre: bool) -> None:
    net = Net(x=["n", 5, 8])
    x = net.op("Add", "x", net.weight("position", 5, 8))
    stream = []
    for block in range(2):
        if pre:
            x = net.op("Add", x, attention(net, norm(net, x), f"a{block}"))
            stream.append(x)
            x = net.op("Add", x, mlp(net, norm(net, x), f"m{block}"))
        else:
            x = norm(net, net.op("Add", x, attention(net, x, f"a{block}")))
            stream.append(x)
            x = norm(net, net.op("Add", x, mlp(net, x, f"m{block}")))
        stream.append(x)
    head = net.op("MatMul", norm(net, x) if pre else x, net.weight("head", 8, 3))
    placement = placed(net, head)
    assert [layer.op for layer in placement.layers] == ["MatMul"] * 17
    if pre:
        assert not set(stream) & set(placement.tensors)
    for tensor in stream:
        # after a normalization the products read codes, the residual path float
        assert not [r for r in placement.tensors.get(tensor, ()) if r.startswith("Add")]


# --- tensors that share a scale


def test_concatenation_shares_one_scale() -> None:
    net = Net(x=["n", 4, 8, 8])
    left, right = net.op("Relu", net.conv("x", 4, 4)), net.conv("x", 4, 4, k=1)
    joined = net.op("Concat", left, right, axis=1)
    placement = placed(net, net.conv(joined, 4, 8))
    assert [set(group) for group in placement.groups] == [{left, right, joined}]
    assert set(placement.tensors["x"]) == {f"Conv:{net.nodes[i].output[0]}" for i in (0, 2)}


def test_concatenation_with_a_constant_has_a_scale_of_its_own() -> None:
    net = Net(x=[2, 4, 8, 8])
    left = net.conv("x", 4, 4)
    net.const("c", np.ones((2, 1, 8, 8), dtype=np.float32))
    joined = net.op("Concat", left, "c", axis=1)
    placement = placed(net, net.conv(joined, 4, 5))
    assert joined in placement.tensors
    assert left not in placement.tensors
    assert not placement.groups


def test_chains_of_layers_that_move_data_share_one_scale() -> None:
    net = Net(x=["n", 4, 8, 8])
    y = net.op("Relu", net.conv("x", 4, 4))
    pooled = net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    turned = net.op("Transpose", pooled, perm=[0, 1, 3, 2])
    placement = placed(net, net.conv(turned, 4, 4))
    assert [set(group) for group in placement.groups] == [{y, pooled, turned}]


def test_indices_of_a_pooling_are_not_quantized() -> None:
    net = Net(x=["n", 4, 8, 8])
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    y = net.conv("x", 4, 4)
    net.nodes.append(helper.make_node("MaxPool", [y], ["pooled", "where"], **attributes))
    index = net.op("Cast", "where", to=FLOAT)
    placement = placed(net, net.conv("pooled", 4, 4), index)
    assert set(placement.tensors) == {"x", y, "pooled"}


@pytest.mark.parametrize("op", ["AveragePool", "GlobalAveragePool", "ReduceMean"])
def test_averages_of_codes(op: str) -> None:
    net = Net(x=["n", 4, 8, 8])
    y = net.op("Relu", net.conv("x", 4, 4))
    if op == "ReduceMean":
        pooled = net.op(op, y, net.const("axes", np.array([-1, 2])), keepdims=1)
    else:
        pooled = net.op(op, y, **({"kernel_shape": [2, 2]} if op == "AveragePool" else {}))
    placement = placed(net, net.conv(pooled, 4, 4, k=1))
    assert {y, pooled} <= set(placement.tensors)
    assert not placement.groups, "an average has a range of its own"


@pytest.mark.parametrize("axes", [[1], [0, 2], [1, 2, 3]])
def test_means_over_other_axes_stay_float(axes: list[int]) -> None:
    net = Net(x=[2, 4, 8, 8])
    y = net.conv("x", 4, 4)
    mean = net.op("ReduceMean", y, net.const("axes", np.array(axes)), keepdims=1)
    assert set(placed(net, mean).tensors) == {"x"}


def test_averages_of_float_tensors_stay_float() -> None:
    net = Net(x=["n", 4, 8, 8])
    y = net.op("GlobalAveragePool", net.op("Softmax", "x"))
    assert set(placed(net, net.conv(y, 4, 4, k=1)).tensors) == {y}


# --- sharing


def test_weights_that_two_layers_share() -> None:
    net = Net(x=["n", 4, 8, 8])
    w, b = net.weight("w", 4, 4, 3, 3), net.weight("b", 4)
    first = net.op("Conv", "x", w, b, pads=[1] * 4)
    placement = placed(net, net.op("Conv", first, w, b, pads=[1] * 4))
    assert [layer.weight for layer in placement.layers] == ["w", "w"]


def test_a_weight_that_is_also_looked_up() -> None:
    """A tied embedding: rows are gathered in float, the product runs in INT8."""
    net = Net(x=["n", 4])
    table = net.weight("table", 4, 9)
    net.const("rows", np.array([0, 2]))
    looked_up = net.op("Gather", table, "rows", axis=0)
    placement = placed(net, net.op("MatMul", "x", table), looked_up)
    assert [layer.weight for layer in placement.layers] == ["table"]


def test_an_input_that_two_layers_read_has_one_pair() -> None:
    net = Net(x=["n", 4, 8, 8])
    y = net.op("Sigmoid", "x")
    a, b = net.conv("x", 4, 4), net.conv("x", 2, 4, k=1)
    placement = placed(net, a, b, y)
    assert placement.tensors == {"x": (f"Conv:{a}", f"Conv:{b}")}, "Sigmoid reads it in float"


def test_all_readers_of_an_int8_layer_read_its_codes() -> None:
    net = Net(x=["n", 4, 8, 8])
    middle = net.conv("x", 4, 4)
    gate = net.op("Sigmoid", middle)
    last = net.conv(middle, 4, 4)
    placement = placed(net, last, gate)
    assert set(placement.tensors[middle]) == {f"Conv:{last}", f"Sigmoid:{gate}"}


def test_a_tensor_that_is_also_an_output() -> None:
    net = Net(x=["n", 4, 8, 8])
    middle = net.op("Relu", net.conv("x", 4, 4))
    last = net.conv(middle, 4, 4)
    placement = placed(net, last, middle)
    assert middle in placement.tensors


# --- exclusion


def three_layers() -> Net:
    net = Net(x=["n", 4, 8, 8])
    y = net.op("Conv", "x", net.weight("stem.weight", 4, 4, 3, 3), pads=[1] * 4, out="a")
    y = net.op("Conv", y, net.weight("body.weight", 4, 4, 3, 3), pads=[1] * 4, out="b")
    net.op("Conv", y, net.weight("head.weight", 4, 4, 3, 3), pads=[1] * 4, out="c")
    return net


@pytest.mark.parametrize("pattern", ["Conv:b", "b", "body.*", "*:b", "bod?.weight"])
def test_excluding_by_node_output_or_weight(pattern: str) -> None:
    placement = placed(three_layers(), "c", exclude=(pattern,))
    assert [layer.output for layer in placement.layers] == ["a", "c"]
    assert placement.reasons == {"Conv:b": "excluded by the caller"}


def test_excluding_a_residual_sum() -> None:
    net = Net(x=["n", 4, 8, 8])
    stem = net.conv("x", 4, 4)
    add = net.op("Add", stem, net.conv(stem, 4, 4), out="sum")
    y = net.conv(add, 4, 4)
    assert "sum" in layer_names(load_onnx(net.build(y)))
    assert "sum" not in layer_names(load_onnx(net.build(y)), exclude=["sum"])


@pytest.mark.parametrize("pattern", ["nothing", "A", "body", ""])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=f"nothing is called '{pattern}'"):
        place(load_onnx(three_layers().build("c")), ["a", pattern])


def test_placing_does_not_change_the_graph() -> None:
    model = load_onnx(three_layers().build("c"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    place(model, ["b"])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before

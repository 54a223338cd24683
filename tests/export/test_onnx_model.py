"""Reading user models: what comes out computes the same, in a form that quantization can use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import FLOAT, Net, feeds_for, ops, quantized, run

from octavo.core.errors import ArtifactError, ExportError
from octavo.export import (
    extract_model,
    fingerprint,
    input_specs,
    load_onnx,
    onnx_model,
    output_specs,
    place,
    save_onnx,
    serialize,
    size_bytes,
)

OPSETS = (11, 13, 17, 19, 20, 21)


def batch_norm(net: Net, x: str, channels: int) -> str:
    n = len(net.nodes)
    scale = net.const(f"s{n}", net.random.uniform(0.5, 1.5, channels).astype(np.float32))
    shift, mean = net.weight(f"t{n}", channels), net.weight(f"m{n}", channels)
    spread = net.const(f"v{n}", net.random.uniform(0.2, 2, channels).astype(np.float32))
    return net.op("BatchNormalization", x, scale, shift, mean, spread)


def conv_bn_relu(opset: int = 20) -> onnx.ModelProto:
    net = Net(x=["n", 3, 8, 8])
    return net.build(net.op("Relu", batch_norm(net, net.conv("x", 4, 3), 4)), opset=opset)


def assert_same_function(
    before: onnx.ModelProto, after: ir.Model, *, tolerance: float = 2e-6
) -> None:
    feeds = feeds_for(before, batch=3)
    expected, found = run(before, feeds), run(after, feeds)
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.output]
    for want, have in zip(expected, found, strict=True):
        assert want.shape == have.shape
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("opset", OPSETS)
def test_old_opsets_are_lifted_and_batch_norm_is_folded(opset: int) -> None:
    proto = conv_bn_relu(opset)
    model = load_onnx(proto)
    assert ops(model) == ["Conv", "Relu"]
    assert model.opset_imports[""] == max(opset, 20) if opset != 19 else 19
    assert_same_function(proto, model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("op", ["Conv", "grouped Conv", "ConvTranspose", "grouped", "Gemm"])
def test_batch_norm_folds_into_every_kind_of_layer(op: str) -> None:
    net = Net(x=["n", 4] if op == "Gemm" else ["n", 4, 6, 6])
    if op == "Gemm":
        y = net.op("Gemm", "x", net.weight("w", 6, 4), net.weight("b", 6), transB=1, beta=2.0)
    elif op == "Conv":
        y = net.conv("x", 6, 4, bias=False)
    elif op == "grouped Conv":
        y = net.conv("x", 6, 4, group=2)
    else:
        group = 2 if op == "grouped" else 1
        y = net.op("ConvTranspose", "x", net.weight("w", 4, 6 // group, 3, 3), group=group)
    proto = net.build(batch_norm(net, y, 6))
    model = load_onnx(proto)
    assert len(ops(model)) == 1
    assert_same_function(proto, model)


@pytest.mark.parametrize("reader", ["output", "add"])
def test_batch_norm_stays_where_others_read_the_convolution(reader: str) -> None:
    net = Net(x=["n", 3, 8, 8])
    conv = net.conv("x", 4, 3)
    y = batch_norm(net, conv, 4)
    proto = net.build(y, conv) if reader == "output" else net.build(net.op("Add", y, conv))
    model = load_onnx(proto)
    assert "BatchNormalization" in ops(model)
    assert_same_function(proto, model)


def test_shared_weights_survive_folding() -> None:
    net = Net(x=["n", 4, 8, 8])
    w, b = net.weight("w", 4, 4, 3, 3), net.weight("b", 4)
    first = batch_norm(net, net.op("Conv", "x", w, b, pads=[1] * 4), 4)
    proto = net.build(net.op("Conv", first, w, b, pads=[1] * 4))
    assert_same_function(proto, load_onnx(proto))


def padded(mode: str, value: float, pads: list[int]) -> onnx.ModelProto:
    net = Net(x=["n", 3, 8, 8])
    parts = ["x", net.const("pads", np.array(pads))]
    if mode == "constant":
        parts.append(net.const("value", np.float32(value)))
    return net.build(net.conv(net.op("Pad", *parts, mode=mode), 4, 3 + pads[1] + pads[5]))


@pytest.mark.parametrize(
    ("mode", "value", "pads", "folds"),
    [
        ("constant", 0.0, [0, 0, 1, 2, 0, 0, 1, 0], True),
        ("constant", 1.5, [0, 0, 1, 2, 0, 0, 1, 0], False),
        ("constant", 0.0, [0, 0, -1, -1, 0, 0, -1, -1], False),
        ("constant", 0.0, [0, 1, 0, 0, 0, 0, 0, 0], False),
        ("reflect", 0.0, [0, 0, 1, 1, 0, 0, 1, 1], False),
        ("edge", 0.0, [0, 0, 1, 1, 0, 0, 1, 1], False),
    ],
)
def test_pads(mode: str, value: float, pads: list[int], folds: bool) -> None:
    proto = padded(mode, value, pads)
    model = load_onnx(proto)
    assert ops(model) == (["Conv"] if folds else ["Pad", "Conv"])
    assert_same_function(proto, model)


BOUNDS = (None, -1.0, 0.0, 1.0, 6.0)


def overlapping() -> list[tuple[float | None, ...]]:
    """Chains of two clamps whose ranges have a value in common, as all real ones do."""
    chains = []
    for chain in itertools.product(BOUNDS, repeat=4):
        low = max((x for x in chain[::2] if x is not None), default=-np.inf)
        high = min((x for x in chain[1::2] if x is not None), default=np.inf)
        if low <= high:
            chains.append(chain)
    return chains[::7]


def test_chains_of_clamps_keep_their_function() -> None:
    for low, high, low2, high2 in overlapping():
        net = Net(x=[2, 40])
        y = net.clip(net.op("Relu", net.clip("x", low, high)), low2, high2)
        if high is not None and high < 0:
            continue
        proto = net.build(y)
        feeds = feeds_for(proto, scale=5)
        want, have = run(proto, feeds)[0], run(load_onnx(proto), feeds)[0]
        np.testing.assert_array_equal(have, want, err_msg=f"clip {low, high} then {low2, high2}")


def test_constant_nodes_become_constants() -> None:
    net = Net(x=["n", 8])
    weight = net.random.normal(size=(8, 4)).astype(np.float32)
    net.nodes.append(
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight, "w"))
    )
    net.nodes.append(helper.make_node("Constant", [], ["c"], value_float=2.0))
    proto = net.build(net.op("Mul", net.op("MatMul", "x", "w"), "c"))
    model = load_onnx(proto)
    assert ops(model) == ["MatMul", "Mul"]
    assert [layer.weight for layer in place(model).layers] == ["w"]
    assert_same_function(proto, model)


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 11), (4, 11), (8, 17), (9, 20)])
def test_weights_listed_as_inputs_become_constants(ir_version: int, opset: int) -> None:
    net = Net(x=["n", 3, 8, 8])
    y = net.conv(net.op("Relu", batch_norm(net, net.conv("x", 16, 3), 16)), 16, 16)
    proto = net.build(y, opset=opset, ir_version=ir_version, infer=False)
    for weight in proto.graph.initializer:
        proto.graph.input.append(
            helper.make_tensor_value_info(weight.name, FLOAT, list(weight.dims))
        )
    model, quantized_model, _ = quantized(proto)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [spec.name for spec in input_specs(model)] == ["x"]
    assert ops(model) == ["Conv", "Relu", "Conv"]
    assert_same_function(proto, model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    floats = [
        value.name
        for value in quantized_model.model.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and value.const_value.size > 16
    ]
    assert not floats, "float weights are left in the quantized file"


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_external_data_is_found(tmp_path: Path, opset: int) -> None:
    net = Net(x=["n", 3, 8, 8])
    proto = net.build(net.conv("x", 40, 3), opset=opset)
    feeds = feeds_for(proto)
    expected = run(proto, feeds)[0]
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = load_onnx(path)
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-6, atol=1e-6)
    saved = save_onnx(model, tmp_path / "elsewhere" / "copy.onnx")
    np.testing.assert_allclose(run(load_onnx(saved), feeds)[0], expected, rtol=1e-6, atol=1e-6)


def with_function(opset: int) -> onnx.ModelProto:
    body = [
        helper.make_node("MatMul", ["a", "b"], ["m"]),
        helper.make_node("Relu", ["m"], ["y"]),
    ]
    function = helper.make_function(
        "mine", "Dense", ["a", "b"], ["y"], body, [helper.make_opsetid("", opset)]
    )
    net = Net(x=["n", 8])
    net.weight("w", 8, 8)
    y = net.op("Dense", net.op("Dense", "x", "w", domain="mine"), "w", domain="mine")
    output = helper.make_tensor_value_info(y, FLOAT, ["n", 8])
    graph = helper.make_graph(net.nodes, "net", net.inputs, [output], net.constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)


@pytest.mark.parametrize("opset", [17, 20])
def test_functions_are_inlined(opset: int) -> None:
    proto = with_function(opset)
    model = load_onnx(proto)
    assert ops(model) == ["MatMul", "Relu"] * 2
    assert_same_function(proto, model)


def with_branches(opset: int = 20) -> onnx.ModelProto:
    """If whose branches read an outer tensor and an outer weight."""
    net = Net(x=["n", 8])
    net.weight("w", 8, 8)
    net.weight("inner", 8, 8)
    net.inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    y = net.op("MatMul", "x", "w")

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
        return helper.make_graph(list(nodes), name, [], [output])

    then = branch("then", helper.make_node("MatMul", [y, "inner"], ["then_y"]))
    other = branch(
        "other",
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", [y, "two"], ["other_y"]),
    )
    z = net.op("If", "c", then_branch=then, else_branch=other)
    return net.build(net.op("MatMul", z, "w"), opset=opset)


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("taken", [True, False])
def test_branches_are_left_alone(opset: int, taken: bool) -> None:
    proto = with_branches(opset)
    model = load_onnx(proto)
    assert "If" in ops(model)
    feeds = {"x": np.ones((2, 8), np.float32), "c": np.array(taken)}
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=1e-6, atol=1e-6)


def test_a_loop_is_left_alone() -> None:
    net = Net(x=[2, 8])
    net.weight("w", 8, 8)
    step = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    trips, go = net.const("trips", np.int64(3)), net.const("go0", np.array(True))
    proto = net.build(net.op("Loop", trips, go, "x", body=step), infer=False)
    feeds = {"x": np.ones((2, 8), np.float32)}
    model = load_onnx(proto)
    np.testing.assert_allclose(run(model, feeds)[0], run(proto, feeds)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["the same tensor twice", "an input", "a constant"])
def test_odd_outputs_keep_names_and_values(kind: str) -> None:
    net = Net(x=["n", 4])
    y = net.op("Relu", "x")
    if kind == "an input":
        proto = net.build(net.op("Identity", "x"), y)
    elif kind == "a constant":
        proto = net.build(net.op("Relu", net.weight("w", 3)), y)
    else:
        proto = net.build(y, net.op("Identity", y))
    model = load_onnx(proto)
    assert_same_function(proto, model)
    assert fingerprint(load_onnx(ir.from_proto(ir.to_proto(model)))) == fingerprint(model)


def test_unnamed_nodes_get_unique_names() -> None:
    net = Net(x=["n", 3, 8, 8])
    y = net.conv(net.conv("x", 4, 3), 4, 4)
    proto = net.build(y)
    assert {node.name for node in proto.graph.node} == {""}
    assert [node.name for node in load_onnx(proto).graph] == ["Conv:conv_0", "Conv:conv_1"]


def test_nodes_without_a_first_output_get_unique_names() -> None:
    net = Net(x=[5, 2, 3])
    ends = []
    for index in range(2):
        parts = net.weight(f"w{index}", 1, 16, 3), net.weight(f"r{index}", 1, 16, 4)
        net.nodes.append(helper.make_node("LSTM", ["x", *parts], ["", f"h{index}"], hidden_size=4))
        ends.append(f"h{index}")
    proto = net.build(*ends)
    model = load_onnx(proto)
    names = [node.name for node in model.graph]
    assert len(set(names)) == 2
    assert_same_function(proto, model)


@pytest.mark.parametrize("shape", [[None, 3, None, 8], ["n", 3, "h", 8], [2, 3, 8, 8]])
def test_input_specs_name_every_dynamic_axis(shape: list[int | str | None]) -> None:
    net = Net(x=shape)
    model = load_onnx(net.build(net.conv("x", 4, 3)))
    spec = input_specs(model)[0]
    assert (spec.name, spec.dtype, len(spec.shape)) == ("x", "float32", 4)
    for given, found in zip(shape, spec.shape, strict=True):
        assert found == given if given is not None else isinstance(found, str)


def test_unknown_axes_of_two_inputs_need_not_be_equal() -> None:
    net = Net(x=[None, None], y=[None, None])
    total = net.op("Concat", "x", "y", axis=1)
    x, y = input_specs(load_onnx(net.build(total)))
    assert x.shape[0] == y.shape[0], "the first axis is the batch"
    assert x.shape[1] != y.shape[1], "nothing says that these are equal"


def test_an_input_of_unknown_rank_is_refused() -> None:
    net = Net()
    net.inputs = [helper.make_tensor_value_info("x", FLOAT, None)]
    model = load_onnx(net.build(net.op("Relu", "x")))
    with pytest.raises(ExportError, match="'x' is not known"):
        input_specs(model)


def test_metadata_that_holds_paths_is_removed() -> None:
    net = Net(x=["n", 4])
    y = net.op("Relu", "x")
    proto = net.build(y)
    proto.doc_string = "made in /home/somebody"
    proto.graph.node[0].doc_string = "/home/somebody/net.py line 3"
    for name in ("pkg.torch.onnx.stack_trace", "namespace"):
        proto.graph.node[0].metadata_props.add(key=name, value="/home/somebody/net.py")
    assert b"somebody" not in serialize(load_onnx(proto))


def test_module_scopes_survive_lifting() -> None:
    net = Net(x=["n", 4])
    proto = net.build(net.op("Softmax", "x"), opset=18)
    proto.graph.node[0].metadata_props.add(key=onnx_model.SCOPES, value="['', 'act', 'softmax']")
    assert onnx_model.node_scopes(load_onnx(proto).graph[0]) == ["", "act"]


@pytest.mark.parametrize("text", ["", "[", "['a'", "5", "[1, 2]", "__import__('os')", "(" * 500])
def test_broken_module_scopes_are_no_scopes(text: str) -> None:
    node = ir.node("Relu", [ir.Value(name="x")])
    node.metadata_props[onnx_model.SCOPES] = text
    assert onnx_model.node_scopes(node) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no nodes"),
        (b"not a model at all", "readable|no nodes"),
        (b"\x08\x09", "holds no nodes|readable"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        load_onnx(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "short.onnx"
    data = conv_bn_relu().SerializeToString()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError):
        load_onnx(path)


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="there is no file"):
        load_onnx(tmp_path / name)


def test_an_opset_that_cannot_be_lifted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no adapter for Unheard")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fails)
    with pytest.raises(ExportError, match=r"opset 11 .* no adapter for Unheard"):
        load_onnx(conv_bn_relu(11))
    assert load_onnx(conv_bn_relu(17)).opset_imports[""] == 17, "17 is good enough as it is"


def test_loading_leaves_the_given_model_alone() -> None:
    proto = conv_bn_relu(17)
    before = proto.SerializeToString(deterministic=True)
    model = load_onnx(proto)
    assert proto.SerializeToString(deterministic=True) == before
    mark = fingerprint(model)
    load_onnx(model).graph.outputs[0].name = "changed"
    assert fingerprint(model) == mark


# --- fingerprint


def test_fingerprint_is_of_what_a_model_computes(tmp_path: Path) -> None:
    proto = conv_bn_relu()
    mark = fingerprint(load_onnx(proto))
    for index, node in enumerate(proto.graph.node):
        node.name = f"renamed {index}"
        node.doc_string = "words"
    proto.producer_name, proto.doc_string = "another exporter", "more words"
    assert fingerprint(load_onnx(proto)) == mark
    again = load_onnx(save_onnx(load_onnx(proto), tmp_path / "saved.onnx"))
    assert fingerprint(again) == mark, "saving and loading changed the fingerprint"


CHANGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "a weight's last bit": lambda m: m.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(
            np.nextafter(numpy_helper.to_array(m.graph.initializer[0]), np.float32(9)), "w0"
        )
    ),
    "an attribute": lambda m: m.graph.node[0].attribute.append(
        helper.make_attribute("strides", [2, 2])
    ),
    "an operator": lambda m: setattr(m.graph.node[1], "op_type", "Sigmoid"),
    "the input's name": lambda m: (
        setattr(m.graph.input[0], "name", "z"),
        m.graph.node[0].input.__setitem__(0, "z"),
    )[0],
    "the input's shape": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 9
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_sees(change: str) -> None:
    net = Net(x=["n", 3, 8, 8])
    proto = net.build(net.op("Relu", net.conv("x", 4, 3)), infer=False)
    before = fingerprint(load_onnx(proto))
    CHANGES[change](proto)
    assert fingerprint(load_onnx(proto)) != before


def test_fingerprint_sees_the_inside_of_branches() -> None:
    one, two = with_branches(), with_branches()
    branch = helper.get_node_attr_value(two.graph.node[1], "else_branch")
    branch.node[0].attribute[0].f = 2.5
    for index, attribute in enumerate(two.graph.node[1].attribute):
        if attribute.name == "else_branch":
            two.graph.node[1].attribute[index].g.CopyFrom(branch)
    assert fingerprint(load_onnx(one)) == fingerprint(load_onnx(with_branches()))
    assert fingerprint(load_onnx(one)) != fingerprint(load_onnx(two))


# --- writing


def test_saving_over_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x" * 100_000)
    model = load_onnx(conv_bn_relu())
    assert save_onnx(model, path) == path
    assert fingerprint(load_onnx(path)) == fingerprint(model)
    save_onnx(load_onnx(path), path)
    assert fingerprint(load_onnx(path)) == fingerprint(model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_large_models_keep_their_weights_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(x=["n", 3, 8, 8])
    proto = net.build(net.conv("x", 40, 3))
    model, feeds = load_onnx(proto), feeds_for(proto)
    expected = run(model, feeds)[0]
    monkeypatch.setattr(onnx_model, "PROTOBUF_LIMIT", 1000)
    assert size_bytes(model) > 1000
    with pytest.raises(ExportError, match="external data"):
        serialize(model)
    path = save_onnx(model, tmp_path / "new folder" / "large.onnx")
    assert {entry.name for entry in path.parent.iterdir()} == {"large.onnx", "large.onnx.data"}
    assert path.stat().st_size < 1000
    again = load_onnx(path)
    save_onnx(again, path)  # over the very file that its weights lie in
    monkeypatch.undo()
    np.testing.assert_array_equal(run(load_onnx(path), feeds)[0], expected)
    np.testing.assert_array_equal(run(model, feeds)[0], expected)


def test_a_part_of_a_model_shares_weights_and_leaves_the_whole_alone() -> None:
    net = Net(x=["n", 3, 8, 8])
    first = net.op("Relu", net.conv("x", 4, 3))
    second = net.op("Relu", net.conv(first, 4, 4))
    model = load_onnx(net.build(second))
    mark, feeds = fingerprint(model), feeds_for(model)
    head = extract_model(model, ["x"], [first])
    tail = extract_model(model, [first], [second])
    middle = run(head, feeds)[0]
    np.testing.assert_array_equal(run(tail, {first: middle})[0], run(model, feeds)[0])
    assert fingerprint(model) == mark
    assert [str(spec) for spec in output_specs(tail)] == [f"{second}: float32[n, 4, 8, 8]"]


def test_a_node_without_its_inputs_is_refused() -> None:
    broken = Net(x=["batch", 3, 8, 8])
    broken.op("Conv", "x", out="y")
    for source in (proto := broken.build("y", infer=False), ir.from_proto(proto)):
        with pytest.raises(
            ArtifactError, match=r"broken at node 'Conv'.* input size 1 not in range"
        ):
            load_onnx(source)


def test_a_tensor_that_nothing_makes_is_refused(tmp_path: Path) -> None:
    broken = Net(x=["batch", 3])
    broken.op("Add", "x", "lost", out="y")
    onnx.save(broken.build("y", infer=False), tmp_path / "broken.onnx")
    with pytest.raises(ArtifactError, match=r"node 'Add' reads 'lost', which nothing makes"):
        load_onnx(tmp_path / "broken.onnx")


def test_an_output_that_nothing_makes_is_refused(tmp_path: Path) -> None:
    broken = Net(x=["batch", 3])
    broken.op("Relu", "x", out="y")
    model = broken.build("y", infer=False)
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ArtifactError, match=r"its output 'z' is made by nothing; export it again"):
        load_onnx(tmp_path / "broken.onnx")

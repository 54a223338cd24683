"""Rescaling channels between layers leaves the float function as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_graphs import Net, as_it_is, feeds_for, minmax_spec, quantized, run

from octavo.core.errors import InputError
from octavo.export import (
    Chain,
    QuantSpec,
    adjust_weights,
    equalize,
    find_chains,
    fingerprint,
    load_onnx,
    place,
    quantize_graph,
)
from octavo.export.equalization import clamp_bounds


def chains_of(proto: onnx.ModelProto) -> tuple[ir.Model, tuple[Chain, ...]]:
    model = load_onnx(proto)
    return model, find_chains(model, place(model))


def equalized(model: ir.Model, factors: dict[str, np.ndarray]) -> ir.Model:
    spec = QuantSpec({}, equalization={n: tuple(map(float, f)) for n, f in factors.items()})
    return adjust_weights(model, place(model), spec)


def convs(
    between: Callable[[Net, str], str], *, cin: int = 4, middle: int = 8, group: int = 1
) -> onnx.ModelProto:
    net = Net(x=["n", cin, 6, 6])
    y = between(net, net.conv("x", middle, cin))
    return net.build(net.conv(y, 8, middle, group=group))


def separable() -> onnx.ModelProto:
    net = Net(x=["n", 4, 6, 6])
    wide = net.op("Relu", net.conv("x", 8, 4))
    deep = net.op("Relu", net.conv(wide, 8, 8, group=8, bias=False))
    return net.build(net.conv(deep, 4, 8, k=1))


def dense(trans: int, trans2: int) -> onnx.ModelProto:
    net = Net(x=["n", 4])
    w = net.weight("w", *((8, 4) if trans else (4, 8)))
    y = net.op("Relu", net.op("Gemm", "x", w, net.weight("b", 8), transB=trans))
    w2 = net.weight("w2", *((5, 8) if trans2 else (8, 5)))
    return net.build(net.op("Gemm", y, w2, net.weight("b2", 5), transB=trans2))


def transposed() -> onnx.ModelProto:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("ConvTranspose", "x", net.weight("w", 4, 8, 3, 3), net.weight("b", 8))
    return net.build(net.conv(net.op("Relu", y), 4, 8))


def one_dimension() -> onnx.ModelProto:
    net = Net(x=["n", 4, 9])
    y = net.op("Relu", net.op("Conv", "x", net.weight("w", 8, 4, 3), net.weight("b", 8)))
    return net.build(net.op("Conv", y, net.weight("w2", 4, 8, 3)))


def two_consumers() -> onnx.ModelProto:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("Relu", net.conv("x", 8, 4))
    return net.build(net.conv(y, 4, 8), net.conv(y, 8, 8, group=8))


EXACT: dict[str, tuple[onnx.ModelProto, int]] = {
    "Conv-ReLU-Conv": (convs(lambda net, y: net.op("Relu", y)), 1),
    "Conv-Conv": (convs(lambda _net, y: y), 1),
    "Conv-ReLU-depthwise-ReLU-Conv": (separable(), 2),
    "Conv-ReLU-grouped": (convs(lambda net, y: net.op("Relu", y), group=2), 1),
    "grouped-ReLU-Conv": (convs(lambda net, y: net.op("Relu", y), cin=8, group=4), 1),
    "Gemm-ReLU-Gemm": (dense(0, 0), 1),
    "Gemm-ReLU-Gemm, transposed": (dense(1, 1), 1),
    "ConvTranspose-ReLU-Conv": (transposed(), 1),
    "1-D": (one_dimension(), 1),
    "two consumers": (two_consumers(), 1),
    "Clip from below": (convs(lambda net, y: net.clip(y, 0, None)), 1),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_float_function_is_unchanged(name: str) -> None:
    proto, count = EXACT[name]
    model, chains = chains_of(proto)
    assert len(chains) == count
    random = np.random.default_rng(3)
    factors = {chain.tensor: random.uniform(0.2, 5, 8) for chain in chains}
    after = equalized(model, factors)
    assert fingerprint(after) != fingerprint(model)
    feeds = feeds_for(model)
    for want, have in zip(run(model, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_the_tensors_channels_are_multiplied(name: str) -> None:
    model, chains = chains_of(EXACT[name][0])
    factors = {chain.tensor: np.linspace(0.5, 4, 8) for chain in chains}
    after, feeds = equalized(model, factors), feeds_for(model)
    for chain in chains:
        values = []
        for which in (model, after):
            copy = which.clone()
            copy.graph.outputs[:] = [ir.convenience.create_value_mapping(copy.graph)[chain.tensor]]
            values.append(run(copy, feeds)[0])
        shape = [1, 8] + [1] * (values[0].ndim - 2)
        np.testing.assert_allclose(
            values[1], values[0] * np.linspace(0.5, 4, 8).reshape(shape), rtol=1e-4, atol=1e-5
        )


def relu6_net() -> onnx.ModelProto:
    return convs(lambda net, y: net.clip(y, 0, 6))


def test_relu6_is_unchanged_while_nothing_saturates() -> None:
    model, (chain,) = chains_of(relu6_net())
    assert chain.bound == 6
    feeds = feeds_for(model, scale=0.3)
    factors = np.linspace(0.5, 2, 8)
    want, have = run(model, feeds)[0], run(equalized(model, {chain.tensor: factors}), feeds)[0]
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
    large = feeds_for(model, scale=50)
    want, have = run(model, large)[0], run(equalized(model, {chain.tensor: factors}), large)[0]
    assert np.abs(have - want).max() > 0.1, "the bound does not follow the factors"


def test_the_tighter_of_two_bounds_counts() -> None:
    # not through the simplifier, which would join the clamps
    model = as_it_is(convs(lambda net, y: net.clip(net.clip(y, None, 3), 0, 6)))
    (chain,) = find_chains(model, place(model))
    assert chain.bound == 3


@pytest.mark.parametrize(
    "between",
    [
        lambda net, y: net.op("Sigmoid", y),
        lambda net, y: net.clip(y, -1, 1),
        lambda net, y: net.clip(y, 0.5, 6),
        lambda net, y: net.op("MaxPool", y, kernel_shape=[1, 1]),
        lambda net, y: net.op("Mul", y, y),
        lambda net, y: net.op("Softmax", y),
    ],
    ids=["Sigmoid", "Clip(-1, 1)", "Clip(0.5, 6)", "MaxPool", "Mul", "Softmax"],
)
def test_what_cannot_be_equalized(between: Callable[[Net, str], str]) -> None:
    assert not chains_of(convs(between))[1]


def test_tensors_that_others_read_cannot_be_equalized() -> None:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("Relu", net.conv("x", 8, 4))
    assert not chains_of(net.build(net.conv(y, 8, 8), y))[1], "it is an output"
    net = Net(x=["n", 4, 6, 6])
    y = net.op("Relu", net.conv("x", 8, 4))
    assert not chains_of(net.build(net.conv(y, 8, 8), net.op("Sigmoid", y)))[1], "Sigmoid reads it"
    net = Net(x=["n", 4, 6, 6])
    y = net.conv("x", 4, 4)
    add = net.op("Add", y, net.conv(y, 4, 4))
    names = {chain.tensor for chain in chains_of(net.build(net.conv(add, 4, 4)))[1]}
    assert y not in names, "a residual Add reads it"


def test_a_grouped_transposed_convolution_is_no_producer() -> None:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("ConvTranspose", "x", net.weight("w", 4, 4, 3, 3), group=2)
    assert not chains_of(net.build(net.conv(net.op("Relu", y), 4, 8)))[1]


def test_products_on_words_are_left_alone() -> None:
    net = Net(x=["n", 5, 8])
    y = net.op("Relu", net.op("MatMul", "x", net.weight("w", 8, 8)))
    assert not chains_of(net.build(net.op("MatMul", y, net.weight("w2", 8, 8))))[1]


def test_depthwise_consumers_are_told_apart() -> None:
    first, second = chains_of(separable())[1]
    assert (first.depthwise, second.depthwise) == (True, False)
    assert not chains_of(two_consumers())[1][0].depthwise


@pytest.mark.parametrize("shared", ["weights", "biases", "both"])
def test_shared_constants_are_copied(shared: str) -> None:
    net = Net(x=["n", 8, 6, 6])
    for index in range(3):
        net.weight(f"w{index}", 8, 8, 3, 3)
        net.weight(f"b{index}", 8)
    y = "x"
    for index in range(3):
        w = "w0" if shared != "biases" else f"w{index}"
        b = "b0" if shared != "weights" else f"b{index}"
        y = net.op("Relu", net.op("Conv", y, w, b, pads=[1] * 4))
    net.constants = [c for c in net.constants if any(c.name in n.input for n in net.nodes)]
    model, chains = chains_of(net.build(y))
    assert len(chains) == 2
    before, feeds = fingerprint(model), feeds_for(model)
    after = equalized(model, {chain.tensor: np.linspace(0.5, 4, 8) for chain in chains})
    np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)
    assert fingerprint(model) == before


def test_a_single_bias_for_all_channels_is_spread() -> None:
    net = Net(x=["n", 4])
    y = net.op("Gemm", "x", net.weight("w", 4, 8), net.const("b", np.float32([0.5])))
    model, (chain,) = chains_of(net.build(net.op("Gemm", y, net.weight("w2", 8, 3))))
    feeds = feeds_for(model)
    after = equalized(model, {chain.tensor: np.linspace(0.5, 4, 8)})
    np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ({"nothing": [1.0] * 8}, "'nothing' does not lie between two layers"),
        ({"x": [1.0] * 4}, "'x' does not lie between two layers"),
        ({"relu_1": [1.0] * 7}, "8 channels and needs as many positive factors"),
        ({"relu_1": [1.0] * 7 + [0.0]}, "positive"),
        ({"relu_1": [1.0] * 7 + [-1.0]}, "positive"),
        ({"relu_1": [1.0] * 7 + [np.nan]}, "positive"),
        ({"relu_1": [1.0] * 7 + [np.inf]}, "positive"),
        ({"relu_1": []}, "not 0"),
    ],
)
def test_factors_that_do_not_fit(factors: dict[str, list[float]], reason: str) -> None:
    model, _ = chains_of(EXACT["Conv-ReLU-Conv"][0])
    with pytest.raises(InputError, match=reason):
        equalize(model.clone(), place(model), factors)


def test_equalizing_a_quiet_channel_helps_the_quantized_model() -> None:
    """One loud channel of eight: the others use a few codes only, until they are equalized."""
    net = Net(x=["n", 4, 6, 6])
    weight = net.random.normal(size=(8, 4, 3, 3)).astype(np.float32) / 6
    weight[1:] /= 50
    y = net.op("Relu", net.op("Conv", "x", net.const("w", weight), pads=[1] * 4))
    proto = net.build(net.conv(y, 8, 8, group=8))
    model, plain, feeds = quantized(proto, batch=8)
    factors = tuple([1.0] + [40.0] * 7)
    activations = minmax_spec(model, feeds).activations
    spec = QuantSpec(activations, equalization={y: factors})
    want = run(model, feeds)[0][:, 1:]
    noise = [
        np.square(run(which, feeds)[0][:, 1:] - want).mean()
        for which in (plain.model, quantize_graph(model, spec).model)
    ]
    assert noise[1] < noise[0] / 5


@settings(max_examples=60, deadline=None)
@given(low=st.one_of(st.none(), st.floats(width=32, allow_nan=False)), high=st.just(1.5))
def test_clamp_bounds_are_read_as_they_are(low: float | None, high: float) -> None:
    net = Net(x=[2])
    net.clip("x", low, high)
    model = ir.from_proto(net.build("clip_0"))
    assert clamp_bounds(model.graph[0]) == (-np.inf if low is None else np.float32(low), high)


def test_clamps_whose_bounds_are_computed_are_no_clamps() -> None:
    net = Net(x=[2], low=[])
    net.op("Clip", "x", "low")
    model = ir.from_proto(net.build("clip_0"))
    assert clamp_bounds(model.graph[0]) is None
    assert clamp_bounds(ir.node("Relu", [ir.Value(name="x")])) == (0, np.inf)
    assert clamp_bounds(ir.node("Sigmoid", [ir.Value(name="x")])) is None

"""Bias correction brings the mean of every channel back, and helps where weights are biased."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_graphs import Net, feeds_for, minmax_spec, run, values_of

from octavo.calibration.bias_correction import correct_biases
from octavo.core.progress import NoProgress
from octavo.export import QuantSpec, adjust_weights, fingerprint, load_onnx, place, quantize_graph
from octavo.quant import sqnr_db

Array = np.ndarray[Any, Any]


def biased_weight(net: Net, name: str, *shape: int) -> str:
    """Weights that all round the same way: most are 0.4 steps above a code."""
    weight = np.full(shape, 0.4 / 127, np.float32)
    weight.reshape(shape[0], -1)[:, 0] = 1.0
    return net.const(name, weight / np.float32(np.sqrt(np.prod(shape[1:]))))


def convolutions() -> onnx.ModelProto:
    net = Net(x=["n", 4, 6, 6])
    y = net.op("Relu", net.op("Conv", "x", biased_weight(net, "w1", 8, 4, 3, 3), out="no bias"))
    deep = net.op(
        "Conv",
        y,
        biased_weight(net, "w2", 8, 1, 3, 3),
        net.weight("b2", 8),
        group=8,
        pads=[1] * 4,
        out="depthwise",
    )
    y = net.op("Relu", net.op("Add", y, deep))
    y = net.op("ConvTranspose", y, biased_weight(net, "w3", 8, 4, 2, 2), out="transposed")
    flat = net.op("Flatten", net.op("GlobalAveragePool", y))
    gemm = net.op("Gemm", flat, biased_weight(net, "w4", 5, 4), "b4", transB=1, out="gemm")
    net.const("b4", np.float32(0.3))
    return net.build(gemm)


def words() -> onnx.ModelProto:
    net = Net(x=["n", 5, 8])
    first = net.op("MatMul", "x", net.weight("w1", 8, 8), out="no bias")
    net.op("MatMul", net.op("Relu", first), net.weight("w2", 8, 6), out="second")
    y = net.op("Add", "second", net.weight("b2", 6))
    return net.build(y)


GRAPHS = {
    "convolutions": (convolutions(), ["no bias", "depthwise", "transposed", "gemm"]),
    "words": (words(), ["second"]),
}


def positive(model: ir.Model, batch: int, seed: int) -> dict[str, Array]:
    return {name: np.abs(x) for name, x in feeds_for(model, batch=batch, seed=seed).items()}


def corrected(
    model: ir.Model, spec: QuantSpec, batches: list[dict[str, Array]]
) -> tuple[QuantSpec, dict[str, tuple[float, ...]]]:
    found = correct_biases(model, place(model), spec, batches, NoProgress())
    return QuantSpec(spec.activations, spec.equalization, found), found


def channel_means(model: ir.Model, names: list[str], feeds: dict[str, Array]) -> dict[str, Array]:
    values = values_of(model, names, feeds)
    return {
        name: x.astype(np.float64).mean(
            axis=(0, *range(2, x.ndim)) if x.ndim == 4 else tuple(range(x.ndim - 1))
        )
        for name, x in values.items()
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_the_means_of_all_layers_are_restored(name: str) -> None:
    proto, layers = GRAPHS[name]
    model = load_onnx(proto)
    feeds = positive(model, 20, seed=3)
    spec = minmax_spec(model, feeds)
    fixed, found = corrected(model, spec, [feeds])
    assert list(found) == layers
    # a MatMul is corrected in the Add behind it
    tensors = ["add_3" if layer == "second" else layer for layer in layers]
    want = channel_means(model, tensors, feeds)
    before = channel_means(quantize_graph(model, spec).model, tensors, feeds)
    after = channel_means(quantize_graph(model, fixed).model, tensors, feeds)
    for tensor in tensors:
        off_before = np.abs(before[tensor] - want[tensor]).max()
        off_after = np.abs(after[tensor] - want[tensor]).max()
        size = np.abs(want[tensor]).max()
        assert off_after < 2e-4 * size, f"{tensor}: {off_after} of {size}"
        assert off_after < off_before / 5, tensor


def test_it_improves_a_net_with_biased_weights_on_other_data() -> None:
    model = load_onnx(GRAPHS["convolutions"][0])
    feeds, others = positive(model, 24, seed=3), positive(model, 40, seed=99)
    spec = minmax_spec(model, feeds)
    fixed, _ = corrected(model, spec, [feeds])
    want = run(model, others)[0]
    plain, better = (
        sqnr_db(want, run(quantize_graph(model, which).model, others)[0]) for which in (spec, fixed)
    )
    assert better > plain + 10


def test_how_samples_are_batched_does_not_matter() -> None:
    model = load_onnx(GRAPHS["convolutions"][0])
    feeds = positive(model, 11, seed=3)
    spec = minmax_spec(model, feeds)
    parts = [{"x": feeds["x"][start : start + 3]} for start in range(0, 11, 3)]
    _, one = corrected(model, spec, [feeds])
    _, two = corrected(model, spec, parts)
    for layer, delta in one.items():
        np.testing.assert_allclose(delta, two[layer], rtol=1e-3, atol=1e-5)


def test_samples_of_different_sizes_weigh_by_their_values() -> None:
    net = Net(x=["n", "t", 8])
    net.op("MatMul", net.op("Abs", "x"), net.weight("w", 8, 4), out="m")
    model = load_onnx(net.build(net.op("Add", "m", net.weight("b", 4), out="y")))
    random = np.random.default_rng(0)
    batches = [{"x": random.normal(size=(1, t, 8)).astype(np.float32)} for t in (2, 50)]
    whole = {"x": np.concatenate([batch["x"] for batch in batches], axis=1)}
    spec = minmax_spec(model, whole)
    _, found = corrected(model, spec, batches)
    _, expected = corrected(model, spec, [whole])
    np.testing.assert_allclose(found["m"], expected["m"], rtol=1e-4, atol=1e-7)


def test_it_works_on_top_of_equalization() -> None:
    net = Net(x=["n", 4, 6, 6])
    hidden = net.op("Relu", net.op("Conv", "x", biased_weight(net, "w1", 8, 4, 3, 3)))
    net.op("Conv", hidden, biased_weight(net, "w2", 4, 8, 1, 1), out="y")
    model = load_onnx(net.build("y"))
    feeds = positive(model, 16, seed=3)
    factors = tuple(np.linspace(1, 3, 8).tolist())
    equalized = QuantSpec({}, {hidden: factors})
    scaled = adjust_weights(model, place(model), equalized)
    spec = QuantSpec(minmax_spec(scaled, feeds).activations, {hidden: factors})
    fixed, _ = corrected(model, spec, [feeds])
    want = channel_means(model, ["y"], feeds)["y"]
    after = channel_means(quantize_graph(model, fixed).model, ["y"], feeds)["y"]
    np.testing.assert_allclose(after, want, rtol=1e-3)  # the steps of the bias


def test_an_earlier_correction_is_replaced() -> None:
    model = load_onnx(words())
    feeds = positive(model, 8, seed=3)
    spec = minmax_spec(model, feeds)
    fixed, found = corrected(model, spec, [feeds])
    _, again = corrected(model, fixed, [feeds])
    assert again == found


def test_layers_without_a_scale_are_left_out() -> None:
    model = load_onnx(GRAPHS["convolutions"][0])
    feeds = positive(model, 4, seed=3)
    spec = minmax_spec(model, feeds)
    some = QuantSpec({"x": spec.activations["x"]})
    _, found = corrected(model, some, [feeds])
    assert list(found) == ["no bias"]
    assert corrected(model, QuantSpec({}), [feeds])[1] == {}


def test_products_without_a_bias_have_nothing_to_correct() -> None:
    net = Net(x=["n", 5, 8])
    y = net.op("MatMul", "x", net.weight("w", 8, 8))
    model = load_onnx(net.build(net.op("MatMul", y, net.op("Transpose", "x", perm=[0, 2, 1]))))
    feeds = feeds_for(model)
    assert corrected(model, minmax_spec(model, feeds), [feeds])[1] == {}


@pytest.mark.parametrize("order", [("x", "s"), ("s", "x")])
def test_inputs_without_a_batch(order: tuple[str, str]) -> None:
    shapes: dict[str, list[int | str]] = {"x": ["n", 8], "s": []}
    net = Net(**{name: shapes[name] for name in order})
    net.op("MatMul", net.op("Mul", "x", "s"), net.weight("w", 8, 4), out="m")
    model = load_onnx(net.build(net.op("Add", "m", net.weight("b", 4))))
    feeds = feeds_for(model, batch=8)
    feeds["s"] = np.full((), 1.5, np.float32)
    assert list(corrected(model, minmax_spec(model, feeds), [feeds])[1]) == ["m"]


def test_neither_the_model_nor_the_samples_are_changed() -> None:
    model = load_onnx(GRAPHS["convolutions"][0])
    feeds = positive(model, 4, seed=3)
    before, copy = fingerprint(model), {name: x.copy() for name, x in feeds.items()}
    spec = minmax_spec(model, feeds)
    corrected(model, spec, [feeds])
    assert fingerprint(model) == before
    assert spec.bias_correction == {}
    np.testing.assert_array_equal(feeds["x"], copy["x"])

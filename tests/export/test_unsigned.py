"""Unsigned codes behind a ReLU: the same ranges, finer steps, and no clamp left to run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from tiny_graphs import Net, as_it_is, feeds_for, minmax_spec, ops, run, run_optimized, values_of

from octavo.core.errors import InputError
from octavo.export import (
    KernelDtypes,
    QuantSpec,
    load_onnx,
    lower_for_onnxruntime,
    place,
    probe_dtypes,
    quantize_graph,
    unsigned_spec,
)
from octavo.export.unsigned import never_negative
from octavo.quant import QTYPES, QParams, sqnr_db

FORMS = (
    KernelDtypes("uint8", "int8"),
    KernelDtypes("uint8", "uint8"),
    KernelDtypes("int8", "int8"),
)


def inverted_residual() -> onnx.ModelProto:
    """As in EfficientNet-Lite: ReLU6 twice, a linear projection and a residual, then the head."""
    net = Net(x=["n", 3, 8, 8])
    stem = net.clip(net.conv("x", 8, 3), 0, 6)
    y = net.clip(net.conv(net.clip(net.conv(stem, 16, 8), 0, 6), 16, 16, group=16), 0, 6)
    y = net.op("Add", net.conv(y, 8, 16), net.conv(stem, 8, 8))
    y = net.clip(net.conv(y, 16, 8), 0, 6)
    mean = net.op("ReduceMean", y, net.const("axes", np.array([-1, -2])), keepdims=1)
    return net.build(net.op("Gemm", net.op("Flatten", mean), net.weight("w", 16, 5)))


def joined(second: str) -> onnx.ModelProto:
    """Two branches that share a scale through Concat and max pooling; one of them is a ReLU's."""
    net = Net(x=["n", 3, 8, 8])
    other = net.conv("x", 8, 3)
    other = net.op("Relu", other) if second == "Relu" else net.clip(other, -1, 1)
    y = net.op("Concat", net.op("Relu", net.conv("x", 8, 3)), other, axis=1)
    return net.build(net.conv(net.op("MaxPool", y, kernel_shape=[2, 2]), 4, 16))


def kinds(spec: QuantSpec) -> list[str]:
    return [qparams.dtype.name for qparams in spec.activations.values()]


def test_ranges_stay_and_steps_get_finer() -> None:
    model = load_onnx(inverted_residual())
    signed = minmax_spec(model, feeds_for(model))
    unsigned = unsigned_spec(model, signed)
    assert list(unsigned.activations) == list(signed.activations)
    assert set(kinds(unsigned)) == {"int8", "uint8"}
    positive = never_negative(model)
    for name, was in signed.activations.items():
        now = unsigned.activations[name]
        if name not in positive:
            assert now == was
            continue
        assert (now.dtype.name, int(now.zero_point)) == ("uint8", 0)
        assert float(now.scale) * 255 == pytest.approx(float(was.scale) * 127, rel=1e-6)


def test_only_tensors_that_cannot_be_negative() -> None:
    """Also after a long run on other data, so whatever calibration saw."""
    for proto in (inverted_residual(), joined("Relu"), joined("Clip")):
        model = load_onnx(proto)
        positive = sorted(never_negative(model))
        assert positive
        for seed in range(4):
            values = values_of(model, positive, feeds_for(model, seed=seed, scale=5, batch=8))
            assert min(value.min() for value in values.values()) >= 0


@pytest.mark.parametrize(
    ("op", "low", "high", "positive"),
    [
        ("Relu", None, None, True),
        ("Sigmoid", None, None, True),
        ("Clip", 0.0, 6.0, True),
        ("Clip", 0.5, None, True),
        ("Clip", -0.5, 6.0, False),
        ("Clip", None, 6.0, False),
        ("Clip", 0.0, -1.0, False),  # upside down: the upper bound wins
        ("Tanh", None, None, False),
        ("LeakyRelu", None, None, False),
    ],
)
def test_what_makes_a_tensor_positive(
    op: str, low: float | None, high: float | None, positive: bool
) -> None:
    net = Net(x=["n", 4])
    y = net.clip("x", low, high) if op == "Clip" else net.op(op, "x")
    moved = net.op("Transpose", y, perm=[1, 0])
    found = never_negative(as_it_is(net.build(moved)))
    assert found == ({y, moved} if positive else set())


@pytest.mark.parametrize(("second", "all_of_them"), [("Relu", True), ("Clip", False)])
def test_tensors_that_share_a_scale_change_together(second: str, all_of_them: bool) -> None:
    model = load_onnx(joined(second))
    spec = unsigned_spec(model, minmax_spec(model, feeds_for(model)))
    for group in place(model).groups:
        members = {spec.activations[name] for name in group}
        assert len(members) == 1
        assert (members.pop().dtype.name == "uint8") == all_of_them


def test_affine_tables_and_what_else_calibration_decided_stay() -> None:
    model = load_onnx(inverted_residual())
    affine = minmax_spec(model, feeds_for(model), dtype="uint8")
    assert unsigned_spec(model, affine) == affine
    name = place(model).layers[0].output
    signed = QuantSpec(
        minmax_spec(model, feeds_for(model)).activations, {}, {name: [0.1] * 8}, ("w",)
    )
    unsigned = unsigned_spec(model, signed)
    assert unsigned.bias_correction == signed.bias_correction
    assert unsigned.exclude == signed.exclude
    with pytest.raises(InputError, match="nothing is called 'flower'"):
        unsigned_spec(model, QuantSpec({}, exclude=("flower",)))


def test_the_smallest_scale_stays_a_scale() -> None:
    model = load_onnx(inverted_residual())
    smallest = QParams(torch.tensor(2.0**-63), torch.tensor(0), QTYPES["int8"])
    tensors = place(model).tensors
    spec = unsigned_spec(model, QuantSpec(dict.fromkeys(tensors, smallest)))
    assert min(float(qparams.scale) for qparams in spec.activations.values()) == 2.0**-63


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_clamp_is_left_and_no_code_changes(form: KernelDtypes) -> None:
    """In every form, also where all activations have to become int8."""
    model = load_onnx(inverted_residual())
    feeds = feeds_for(model, scale=3, batch=4)
    signed = minmax_spec(model, feeds)
    portable = quantize_graph(model, unsigned_spec(model, signed)).model
    lowered = lower_for_onnxruntime(portable, form).model
    assert not {"Clip", "Relu"} & set(ops(lowered))
    assert "Clip" in ops(lower_for_onnxruntime(quantize_graph(model, signed).model, form).model)
    types = {
        node.inputs[2].dtype.numpy().name
        for node in lowered.graph
        if node.op_type == "QuantizeLinear"
    }
    assert types == {form.activation}, "kernels take one type for input and output"
    found, wanted = (run(graph, feeds)[0] for graph in (lowered, portable))
    np.testing.assert_array_equal(found, wanted)
    if probe_dtypes(form):
        assert sqnr_db(wanted, run_optimized(lowered, feeds)[0]) > 35


def test_a_range_that_ends_beyond_the_clamp_keeps_it() -> None:
    """A scale whose last code lies above 6: the clamp is a clamp of codes then."""
    model = load_onnx(inverted_residual())
    feeds = feeds_for(model, scale=8)
    wide = QParams(torch.tensor(0.1), torch.tensor(0), QTYPES["int8"])
    spec = unsigned_spec(model, QuantSpec(dict.fromkeys(place(model).tensors, wide)))
    portable = quantize_graph(model, spec).model
    lowered = lower_for_onnxruntime(portable, FORMS[0]).model
    assert "Clip" in ops(lowered)
    np.testing.assert_array_equal(run(lowered, feeds)[0], run(portable, feeds)[0])


def test_finer_steps_leave_less_noise() -> None:
    model = load_onnx(inverted_residual())
    feeds = feeds_for(model, batch=32)
    signed = minmax_spec(model, feeds)
    want = run(model, feeds)[0]
    noise = [
        sqnr_db(want, run(quantize_graph(model, spec).model, feeds)[0])
        for spec in (signed, unsigned_spec(model, signed))
    ]
    assert noise[1] > noise[0]

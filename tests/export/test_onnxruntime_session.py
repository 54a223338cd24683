"""Sessions that keep INT8 exact, and the probe that notices a processor that does not."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_graphs import Net, feeds_for, run, run_optimized

from octavo.core.errors import BuildError, UnsupportedError
from octavo.export import (
    KernelDtypes,
    kernel_dtypes,
    load_onnx,
    lower_for_onnxruntime,
    make_session,
    onnxruntime_session,
    probe_dtypes,
    save_onnx,
)

Array = np.ndarray[Any, Any]
FORMS = (
    KernelDtypes("uint8", "int8"),
    KernelDtypes("uint8", "uint8"),
    KernelDtypes("int8", "int8"),
)
PROBES = [partial(onnxruntime_session._probe, *case) for case in onnxruntime_session.PROBES]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forgets which form was found, before and after."""
    kernel_dtypes.cache_clear()
    yield
    kernel_dtypes.cache_clear()


def test_the_form_of_this_processor_is_exact() -> None:
    assert probe_dtypes(kernel_dtypes())


def test_unsigned_weights_are_exact_everywhere() -> None:
    assert probe_dtypes(FORMS[1])


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_the_probe_runs_integer_kernels(probe: Any, form: KernelDtypes, tmp_path: Path) -> None:
    graph, _, _ = probe()
    path = tmp_path / "optimized.onnx"
    make_session(lower_for_onnxruntime(ir.from_proto(graph), form).model, optimized_path=path)
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops & {"QLinearConv", "QGemm"}


@pytest.mark.parametrize("probe", PROBES)
def test_the_probe_expects_what_float_arithmetic_gives(probe: Any) -> None:
    graph, feeds, expected = probe()
    np.testing.assert_array_equal(run(graph, feeds)[0], expected)
    assert np.abs(expected).max() > 0


class Saturating:
    """A processor that adds products of the types in `saturates` in 16 bits, as vpmaddubsw does.

    In groups of four, not its two, so that int8 by int8 overflows too.
    """

    def __init__(self, model: ir.Model, saturates: tuple[tuple[str, str], ...]) -> None:
        nodes = {node.op_type: node for node in model.graph}
        self.layer = next(nodes[op] for op in ("Conv", "Gemm") if op in nodes)
        source, weight = (value.producer() for value in self.layer.inputs[:2])
        self.x_zero = source.inputs[2].const_value.numpy()
        self.w = weight.inputs[0].const_value.numpy()
        self.w_zero = weight.inputs[2].const_value.numpy().reshape(-1)[0]
        self.step = nodes["QuantizeLinear"].inputs[1].const_value.numpy()
        for node in model.graph:
            if node.op_type == "QuantizeLinear" and node.inputs[0].name == "y":
                self.step = node.inputs[1].const_value.numpy()
        types = str(self.x_zero.dtype), str(self.w.dtype)
        self.sixteen = types in saturates

    def run(self, _outputs: None, feeds: Mapping[str, Array]) -> list[Array]:
        x = feeds["x"].astype(np.int64) + int(self.x_zero)
        w = self.w.astype(np.int64)
        if self.layer.op_type == "Gemm":
            rows, columns = x, w
        elif self.layer.attributes.get_int("group", 1) == 1:
            rows, columns = x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1]), w[:, :, 0, 0]
        else:
            rows, columns = x.reshape(x.shape[1], -1), w.reshape(len(w), -1)
            sums = self.dot(rows, columns)
            sums -= int(self.x_zero) * columns.sum(1) + int(self.w_zero) * rows.sum(1)
            sums += int(self.x_zero) * int(self.w_zero) * rows.shape[1]
            return [self.finish(sums.reshape(1, -1, 1, 1))]
        sums = np.stack([self.dot(rows, column[None]) for column in columns], axis=1)
        sums -= int(self.x_zero) * columns.sum(1) + int(self.w_zero) * rows.sum(1)[:, None]
        sums += int(self.x_zero) * int(self.w_zero) * rows.shape[1]
        if self.layer.op_type == "Conv":
            sums = sums.reshape(1, *x.shape[2:], -1).transpose(0, 3, 1, 2)
        return [self.finish(sums)]

    def dot(self, left: Array, right: Array) -> Array:
        products = left * right
        products = np.pad(products, ((0, 0), (0, -products.shape[1] % 4)))
        groups = products.reshape(len(products), -1, 4).sum(2)
        if self.sixteen:
            groups = groups.clip(-(2**15), 2**15 - 1)
        return groups.sum(1)

    def finish(self, sums: Array) -> Array:
        return (np.rint(sums.astype(np.float32) / self.step) * self.step).astype(np.float32)


def on_processor(monkeypatch: pytest.MonkeyPatch, *saturates: tuple[str, str]) -> None:
    monkeypatch.setattr(
        onnxruntime_session, "make_session", lambda model, **_: Saturating(model, saturates)
    )


def test_the_stand_in_without_saturation_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the tests below would show nothing."""
    on_processor(monkeypatch)
    assert [probe_dtypes(form) for form in FORMS] == [True, True, True]


def test_the_probe_notices_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    on_processor(monkeypatch, ("uint8", "int8"))
    assert [probe_dtypes(form) for form in FORMS] == [False, True, True]


@pytest.mark.parametrize("case", onnxruntime_session.PROBES)
def test_every_probe_notices_it(monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    on_processor(monkeypatch, ("uint8", "int8"))
    assert not onnxruntime_session._is_exact(FORMS[0], *case)
    assert onnxruntime_session._is_exact(FORMS[1], *case)


@pytest.mark.parametrize(
    ("machine", "saturates", "chosen"),
    [
        ("x86_64", (), FORMS[0]),
        ("AMD64", (), FORMS[0]),
        ("aarch64", (), FORMS[2]),
        ("x86_64", (("uint8", "int8"),), FORMS[1]),
        ("x86_64", (("uint8", "int8"), ("uint8", "uint8")), FORMS[2]),
        ("aarch64", (("int8", "int8"),), FORMS[1]),
    ],
)
def test_the_first_exact_form_wins(
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
    machine: str,
    saturates: tuple[tuple[str, str], ...],
    chosen: KernelDtypes,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    on_processor(monkeypatch, *saturates)
    assert kernel_dtypes() == chosen


def test_a_processor_without_an_exact_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    on_processor(monkeypatch, *((form.activation, form.weight) for form in FORMS))
    with pytest.raises(UnsupportedError, match="use precision float32"):
        kernel_dtypes()


# --- sessions


def small_model() -> ir.Model:
    net = Net(x=["n", 3, 6, 6])
    return load_onnx(net.build(net.op("Relu", net.conv("x", 4, 3))))


def test_a_session_from_a_graph_its_bytes_or_a_file(tmp_path: Path) -> None:
    model = small_model()
    path = save_onnx(model, tmp_path / "model.onnx")
    feeds = feeds_for(model)
    expected = run(model, feeds)[0]
    for source in (model, path.read_bytes(), path):
        found = make_session(source).run(None, feeds)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set(threads: int) -> None:
    session = make_session(small_model(), threads=threads)
    options = session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_model_that_cannot_run_gives_its_reason() -> None:
    with pytest.raises(BuildError, match="ONNX Runtime cannot run this model: "):
        make_session(b"not a model")
    net = Net(x=["n", 4])
    model = load_onnx(net.build(net.op("Relu", "x")))
    model.graph[0].op_type = "Unheard"
    with pytest.raises(BuildError, match="Unheard"):
        make_session(model)


def test_weights_of_float_layers_between_pairs_stay_as_they_are() -> None:
    """ONNX Runtime would quantize them anew, with one scale for all channels."""
    net = Net(x=["n", 4, 6, 6])
    scale, zero = net.const("scale", np.float32(0.02)), net.const("zero", np.uint8(128))

    def pair(value: str) -> str:
        codes = net.op("QuantizeLinear", value, scale, zero)
        return net.op("DequantizeLinear", codes, scale, zero)

    weight = net.random.normal(size=(8, 4, 3, 3)).astype(np.float32)
    weight *= np.logspace(-4, -1, 8, dtype=np.float32).reshape(-1, 1, 1, 1)
    y = net.op("Conv", pair("x"), net.const("w", weight))
    model = load_onnx(net.build(pair(net.op("Relu", y))))
    feeds = feeds_for(model)
    np.testing.assert_array_equal(run_optimized(model, feeds)[0], run(model, feeds)[0])

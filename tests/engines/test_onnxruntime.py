from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from tiny_models import (
    cnn,
    cnn_artifact,
    cnn_table,
    fake_artifact,
    gated,
    images,
    plain,
    tokens,
    two,
)

import octavo
from octavo.core.errors import ArtifactError, BuildError, InputError, OctavoError, UnsupportedError
from octavo.engines import BACKENDS, BuildRequest, Engine, Profile, get_backend
from octavo.engines.onnxruntime import backend
from octavo.export import fingerprint, kernel_dtypes, load_onnx, make_session
from octavo.quant import sqnr_db


def opened(precision: str) -> Engine:
    return Engine(cnn_artifact(precision), backend.open)


def reference(model: onnx.ModelProto, *arrays: np.ndarray) -> list[np.ndarray]:
    """What plain ONNX Runtime makes of the model as it was given."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {i.name: a for i, a in zip(model.graph.input, arrays, strict=True)})


def build(model: onnx.ModelProto, calibration: list[np.ndarray] | None = None) -> Engine:
    precision = "int8" if calibration else "float32"
    table = None
    if calibration:
        table = octavo.calibrate(model, calibration, observer="minmax", verbose=False)
    return octavo.build(model, calibration=table, precision=precision)


def test_it_is_always_there() -> None:
    assert get_backend("onnxruntime") is backend
    assert backend.missing() == ""
    assert backend.version() == onnxruntime.__version__
    assert backend.environment(()) == {"architecture": "cpu"}


def test_a_float_engine_computes_what_the_model_says() -> None:
    x = images(5)
    np.testing.assert_allclose(opened("float32")(x), reference(cnn(), x)[0], atol=1e-5)
    ids = np.array([[0, 6, 3], [1, 1, 1]])
    for got, expected in zip(build(tokens())(ids), reference(tokens(), ids), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_int8_engine_is_close_and_a_float16_engine_closer() -> None:
    x = images(16, seed=3)
    expected = reference(cnn(), x)[0]
    half = octavo.build(cnn(), precision="float16", example_inputs=x)
    assert sqnr_db(expected, opened("int8")(x)) > 25
    assert sqnr_db(expected, half(x)) > 50
    assert half(x).dtype == np.float32, "inputs and outputs keep the type of the model"
    assert half.size_bytes < 0.75 * opened("float32").size_bytes


def test_results_are_the_same_every_time_and_for_every_number_of_threads() -> None:
    engine, x = opened("int8"), images(8)
    expected = engine(x)
    np.testing.assert_array_equal(engine(x), expected)
    np.testing.assert_array_equal(np.concatenate([engine(x[:3]), engine(x[3:])]), expected)
    model = engine.open().model  # type: ignore[attr-defined]
    for threads in (1, 2):
        session = make_session(model, threads=threads)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)


def test_the_artifact_holds_the_portable_graph() -> None:
    """The form for one processor is made where the engine is opened."""
    artifact = cnn_artifact("int8")
    model = onnx.ModelProto.FromString(artifact.members["model.onnx"])
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["x.zero_point"] == TensorProto.INT8, "moved to uint8 where the kernels want that"
    assert TensorProto.INT32 not in kinds.values(), "biases are float"
    operators = {node.op_type for node in model.graph.node}
    assert operators >= {"QuantizeLinear", "DequantizeLinear", "Relu"}, "clamps are those of floats"
    assert artifact.members["table.json"].decode() == cnn_table().dumps()
    assert artifact.manifest.model == fingerprint(load_onnx(cnn()))
    assert artifact.manifest.reasons == {}
    assert list(cnn_artifact("float32").members) == ["model.onnx"]
    assert cnn_artifact("float32").manifest.calibration is None


def test_layers_of_an_int8_engine() -> None:
    report = opened("int8").layers()
    assert report.counts()["int8"] >= 4, "two convolutions, the pooling and the Gemm"
    assert "float32" not in report.counts()
    assert report.not_int8() == ()
    integer = {layer.op for layer in report.layers if layer.precision == "int8"}
    assert integer >= {"QLinearConv", "QLinearGlobalAveragePool", "QGemm"}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_layers_of_a_float_engine_have_nothing_to_explain(precision: str) -> None:
    report = octavo.build(cnn(), precision=precision, example_inputs=images(2)).layers()
    assert set(report.counts()) <= {"float16", "float32", "reformat"}
    assert report.not_int8() == ()


def test_a_layer_that_stays_in_float_is_named() -> None:
    engine = build(gated(), [images(8, channels=4, size=6)])
    report = engine.layers()
    assert report.counts()["int8"] >= 1
    named = {layer.name: layer.reason for layer in report.not_int8()}
    assert named["Mul:m"] == "Mul stays in float"
    assert sum(layer.op in ("Conv", "FusedConv") for layer in report.not_int8()) == 2
    assert all(reason for reason in named.values())


def test_the_reason_is_what_the_layers_output_goes_to() -> None:
    engine = build(gated(), [images(8, channels=4, size=6)])
    reasons = " ".join(layer.reason for layer in engine.layers().not_int8())
    assert "INT8 Conv needs a quantized output, and this one goes to Sigmoid in float" in reasons
    assert "goes to the model's output in float" in reasons


def test_a_layer_without_a_scale_is_named_with_its_reason() -> None:
    tensors = {name: e for name, e in cnn_table().tensors.items() if name != "r0"}
    table = cnn_table().model_copy(update={"tensors": tensors})
    engine = octavo.build(cnn(), calibration=table)
    assert engine.manifest.reasons == {"Conv:c1": "the calibration table has no scale for 'r0'"}


def test_an_excluded_layer_is_named_with_its_reason() -> None:
    table = octavo.calibrate(
        cnn(), [images(8)], observer="minmax", exclude=["Conv:c1"], verbose=False
    )
    engine = octavo.build(cnn(), calibration=table)
    assert engine.manifest.reasons == {"Conv:c1": "excluded by the caller"}
    assert engine.layers().counts()["float32"] >= 1


def test_what_this_backend_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"target 'sm_86' .* runs on any CPU; leave the tar"):
        octavo.build(cnn(), precision="float32", targets=["sm_86"])
    with pytest.raises(UnsupportedError, match=r"int8\+float16 .* slower; use precision int8"):
        octavo.build(cnn(), precision="int8+float16", calibration=cnn_table())


def test_an_int8_engine_in_which_nothing_runs_in_int8_is_an_error() -> None:
    """One convolution whose output stays in float: no integer kernel takes it."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [gated().graph.initializer[0]],
    )
    graph.initializer[0].name = "w"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(BuildError, match=r"no layer of it would run in INT8 \(.*float32"):
        build(model, [images(4, channels=4, size=6)])


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(OctavoError, match="no layer that can run in INT8: no Conv, Gemm or MatMul"):
        build(plain(), [np.zeros((2, 4), np.float32)])
    assert build(plain()).layers().counts() == {"float32": 1}


def test_weights_over_the_limit_of_protobuf_lie_beside_the_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, expected = images(3), {p: opened(p)(images(3)) for p in ("float32", "int8")}
    small = {p: cnn_artifact(p).size_bytes for p in expected}
    monkeypatch.setattr("octavo.export.onnx_model.PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr("octavo.engines.onnxruntime.PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for precision, result in expected.items():
        engine = octavo.build(
            cnn(), precision=precision, calibration=cnn_table() if precision == "int8" else None
        )
        assert "model.onnx.data" in engine.artifact.members
        assert engine.size_bytes < small[precision] + 2000
        with octavo.load(engine.save(tmp_path / f"{precision}.octavo")) as loaded:
            np.testing.assert_array_equal(loaded(x), result)
            assert loaded.layers().counts()
        engine.close()
    folders = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert folders == [], "closing an engine removes what it unpacked"


def test_float_graphs_keep_their_form() -> None:
    engine = build(two())
    model = engine.open().model  # type: ignore[attr-defined]
    assert {node.op_type for node in model.graph} == {"Sub", "MatMul"}


def test_the_form_of_the_kernels_is_one_that_is_exact_here() -> None:
    form = kernel_dtypes()
    assert form.activation in ("int8", "uint8")
    assert form.weight in ("int8", "uint8")
    assert kernel_dtypes() is form, "probed once"


@pytest.mark.parametrize("members", [{}, {"model.onnx": b"junk"}], ids=["missing", "junk"])
def test_an_engine_file_that_holds_no_model_is_refused(members: dict[str, bytes]) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        backend.open(fake_artifact(members=members, precision="float32"))


@pytest.mark.parametrize(
    ("low", "best", "high"),
    [((0,), (1,), (1,)), ((2,), (1,), (3,)), ((1,), (4,), (3,)), ((1, 1), (1,), (1,))],
)
def test_a_profile_has_to_be_in_order(low: Any, best: Any, high: Any) -> None:
    with pytest.raises(InputError, match=r"is not in order; every axis needs 1 <= min"):
        Profile(low, best, high)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=f"no backend is called 'tvm'; .*{', '.join(BACKENDS)}"):
        get_backend("tvm")


def test_a_request_may_be_built_without_the_pipeline() -> None:
    graph = load_onnx(cnn())
    artifact = backend.build(BuildRequest(graph, None, "float32", fingerprint(graph)))
    assert artifact == cnn_artifact("float32")

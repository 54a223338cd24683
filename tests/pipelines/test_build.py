from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import cnn, cnn_artifact, cnn_table, fake_artifact, gated, images, plain, two
from torch import nn

import octavo
from octavo.calibration import CalibrationTable, TorchCollector
from octavo.core.errors import (
    ArtifactError,
    CalibrationError,
    ExportError,
    InputError,
    OctavoError,
    UnsupportedError,
)
from octavo.core.progress import NoProgress
from octavo.engines import Artifact, Profile, get_backend, write_artifact
from octavo.engines.onnxruntime import OnnxRuntimeBackend
from octavo.pipelines.build import build, load
from octavo.pipelines.calibrate import calibrate
from octavo.quant import sqnr_db

X = images(12)


class Net(nn.Module):
    """A convolution, a ReLU, pooling and a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.conv(x).relu().mean((2, 3))))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(cnn(), path)
    return path


@pytest.fixture(scope="module")
def reference_table() -> CalibrationTable:
    return calibrate(cnn(), [X], observer="minmax", verbose=False)


def quick(model: Any = None, **arguments: Any) -> octavo.Engine:
    given = {"progress": NoProgress(), "verbose": False, **arguments}
    return build(cnn() if model is None else model, **given)


def test_the_public_names_are_these() -> None:
    assert octavo.build is build
    assert octavo.load is load
    assert octavo.calibrate is calibrate


def test_a_model_may_be_a_path_or_a_model_in_memory(path: Path) -> None:
    before = cnn().SerializeToString()
    model = cnn()
    engines = [quick(source, precision="float32") for source in (path, str(path), model)]
    assert all(engine.artifact == engines[0].artifact for engine in engines)
    assert model.SerializeToString() == before, "the caller's model is left as it is"


@pytest.mark.slow
def test_a_module_becomes_an_engine(net: Net) -> None:
    net.train()
    x = torch.as_tensor(X)
    exact = quick(net, precision="float32", example_inputs=x[:1])
    table = calibrate(net, [x[:6], x[6:]], observer="minmax", verbose=False)
    int8 = quick(net, calibration=table, example_inputs=x)
    assert net.training, "the module is left in the mode it was in"
    with torch.no_grad():
        expected = net.eval()(x)
    torch.testing.assert_close(exact(x), expected)
    assert sqnr_db(expected.numpy(), int8(X)) > 25
    assert int8.layers().counts()["int8"] >= 2
    assert int8(X[:1]).shape == (1, 4), "the batch is dynamic"


@pytest.mark.parametrize(
    "form",
    [
        lambda: [X],
        lambda: [torch.as_tensor(X)],
        lambda: [(X,)],
        lambda: [{"x": X}],
        lambda: iter([X[:6], X[6:]]),
        lambda: torch.utils.data.DataLoader(torch.as_tensor(X), batch_size=5),
    ],
    ids=["list", "tensor", "tuple", "dict", "generator", "dataloader"],
)
def test_calibration_data_in_every_form(form: Any, reference_table: CalibrationTable) -> None:
    assert calibrate(cnn(), form(), observer="minmax", verbose=False) == reference_table


def test_a_generator_is_read_to_its_end(net: Net) -> None:
    def batches() -> Iterator[np.ndarray]:
        yield from np.split(X, 4)

    for model in (cnn(), net):  # the first batch of a module's data also exports it
        assert calibrate(model, batches(), observer="minmax", verbose=False).samples == 12


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_data_and_tables_may_be_files(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", X)
    from_data = quick(calibration=tmp_path / "data.npy")
    table = calibrate(cnn(), str(tmp_path / "data.npy"), observer="minmax", verbose=False)
    table.save(tmp_path / "table.json")
    one = quick(calibration=tmp_path / "table.json")
    two = quick(calibration=str(tmp_path / "table.json"))
    three = quick(calibration=table)
    assert one.artifact == two.artifact == three.artifact
    assert one.manifest.calibration is not None
    assert from_data.precision == "int8"
    chosen = CalibrationTable.loads(from_data.artifact.members["table.json"])
    assert {entry.dtype for entry in chosen.tensors.values()} == {"uint8"}, "as ONNX Runtime likes"


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_the_table_of_an_engine_builds_it_again() -> None:
    engine = quick(calibration=[X])
    table = CalibrationTable.loads(engine.artifact.members["table.json"])
    assert quick(calibration=table).artifact == engine.artifact


@pytest.mark.slow
def test_the_table_of_a_module_serves_its_onnx_and_the_other_way_round(net: Net) -> None:
    example = torch.as_tensor(X[:2])
    table = calibrate(net, [X], observer="minmax", verbose=False)
    assert set(table.fingerprint) == {"onnx", "torch"}
    engine = quick(net, calibration=table, example_inputs=example)
    graph = onnx.ModelProto.FromString(
        quick(net, precision="float32", example_inputs=example).artifact.members["model.onnx"]
    )
    bare = calibrate(graph, [X], observer="minmax", verbose=False)
    assert set(bare.fingerprint) == {"onnx"}
    assert {name: entry.scale for name, entry in bare.tensors.items()} == {
        name: entry.scale for name, entry in table.tensors.items()
    }
    np.testing.assert_array_equal(quick(graph, calibration=table)(X), engine(X))


@pytest.mark.slow
def test_a_table_collected_with_hooks_builds_an_engine() -> None:
    net, other = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        for head in (nn.Linear(8, 4), nn.Linear(8, 4))
    )
    with TorchCollector(net, ["0.input", "1.output", "4.input"]) as collector, torch.no_grad():
        for part in (X[:6], X[6:]):
            net(torch.as_tensor(part))
    table = collector.table()
    assert table.samples == len(X)
    expected = calibrate(net, [X[:6], X[6:]], observer="minmax", verbose=False)
    known = {port: entry for entry in expected.tensors.values() for port in entry.aliases}
    for port, entry in table.tensors.items():
        assert entry.scale == pytest.approx(known[port].scale, rel=1e-5)  # sums in another order
    engine = quick(net, calibration=table, example_inputs=torch.as_tensor(X[:2]))
    assert engine.layers().counts()["int8"] >= 2
    with torch.no_grad():
        reference = net(torch.as_tensor(X)).numpy()
    assert sqnr_db(reference, engine(X)) > 25
    with pytest.raises(CalibrationError, match="this table belongs to another model"):
        quick(other, calibration=table, example_inputs=torch.as_tensor(X[:2]))


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_a_module_is_exported_and_calibrated_with_the_same_batches(net: Net) -> None:
    assert quick(net, calibration=iter([X[:6], X[6:]])).layers().counts()["int8"] >= 2


def test_an_engine_is_saved_where_asked(tmp_path: Path) -> None:
    target = tmp_path / "new" / "net.octavo"
    engine = quick(precision="float32", output=target)
    with load(target) as loaded:
        assert loaded.artifact == engine.artifact
        np.testing.assert_array_equal(loaded(X), engine(X))


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_verbose_prints_the_comparison_and_quiet_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(cnn(), [X], verbose=False)
    assert capfd.readouterr() == ("", "")
    calibrate(cnn(), [X])
    shown = capfd.readouterr()
    assert "minmax" in shown.out + shown.err


def test_building_leaves_logging_alone(net: Net) -> None:
    logger = logging.getLogger("torch.onnx")
    logger.setLevel(logging.INFO)
    quick(net, precision="float32", example_inputs=torch.as_tensor(X))
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int4"}, InputError, r"no precision 'int4'; choose from float32, float16"),
        ({"backend": "tvm", "precision": "float32"}, InputError, "no backend is called 'tvm'"),
        ({}, InputError, "precision int8 needs calibration: give batches of real data, a Calib"),
        ({"precision": "int8+float16"}, InputError, r"int8\+float16 needs calibration"),
        ({"calibration": []}, CalibrationError, "no calibration batches; give at least one batch"),
        ({"calibration": [X[:0]]}, OctavoError, "batch 0 is empty; leave empty batches out"),
        ({"calibration": [X * np.nan]}, CalibrationError, "batch 0 has NaN or infinity"),
        ({"calibration": 5}, InputError, "calibration data is a int; give an iterable of batches"),
        ({"calibration": {"x": X}}, InputError, "calibration data is a dict; give an iterable"),
        ({"calibration": [X[0]]}, InputError, r"'x' has shape \[3, 8, 8\], the model takes"),
        ({"calibration": [X, X.astype(np.float64)]}, InputError, "batch 1: input 'x' is float64"),
        ({"calibration": "gone.json"}, ArtifactError, "cannot read the calibration table gone.js"),
        ({"calibration": "gone.npy"}, InputError, r"there is no data file gone\.npy"),
        ({"calibration": "data.xyz"}, InputError, r"data\.xyz"),
        ({"model": 5}, InputError, "the model is a int; give a torch.nn.Module or the path"),
        ({"model": "gone.onnx"}, ArtifactError, r"there is no file gone\.onnx"),
        ({"model": Net()}, InputError, "a torch module needs example_inputs to be exported"),
        ({"model": Net(), "example_inputs": ()}, InputError, "example_inputs hold no tensor"),
        ({"model": Net(), "example_inputs": 3}, InputError, "example_inputs is a int; give"),
        (
            {"model": Net(), "example_inputs": torch.zeros(2, 5)},
            ExportError,
            "torch cannot export Net: ",
        ),
        ({"example_inputs": X[:, :1]}, InputError, r"example_inputs: input 'x' has shape"),
        ({"profiles": {"y": [X.shape] * 3}}, InputError, "a profile names input 'y', the model"),
        ({"profiles": {"x": [X.shape] * 2}}, InputError, r"is not three shapes; give"),
        ({"profiles": {"x": [(1, 3, 8)] * 3}}, InputError, "does not fit x: float32"),
        (
            {"profiles": {"x": [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 9, 9)]}},
            InputError,
            "only axes with a name may vary",
        ),
        (
            {"profiles": {"x": [(2, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8)]}},
            InputError,
            "is not in order",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(
    arguments: dict[str, Any], error: type[OctavoError], message: str
) -> None:
    floats = {"model", "example_inputs", "profiles"} & set(arguments)
    with pytest.raises(error, match=message):
        quick(**({"precision": "float32"} if floats else {}), **arguments)


def test_the_table_of_another_model_is_refused() -> None:
    for model in (cnn(seed=5), gated()):
        with pytest.raises(CalibrationError, match="this table belongs to another model"):
            quick(model, calibration=cnn_table())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {}}, "the calibration table has no tensor of this model"),
        ({"exclude": ("nope",)}, "nothing is called 'nope'"),
        ({"bias_correction": {"nope": (1.0,)}}, "bias correction names 'nope'"),
        ({"bias_correction": {"c0": (1.0, 2.0)}}, "Conv:c0 has 8 biases, not 2"),
        ({"equalization": {"nope": (1.0,)}}, "'nope' does not lie between two layers"),
        ({"equalization": {"r0": (1.0,)}}, "Conv:c0 has 8 channels"),
    ],
)
def test_an_edited_table_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quick(calibration=cnn_table().model_copy(update=changes))


def test_a_part_of_a_table_quantizes_a_part_of_the_model() -> None:
    table = cnn_table().model_copy(update={"tensors": {"f": cnn_table().tensors["f"]}})
    engine = quick(calibration=table)
    assert set(engine.manifest.reasons) == {"Conv:c0", "Conv:c1"}
    assert engine.layers().counts()["int8"] == 1


def test_int8_of_a_model_without_layers_for_it_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no layer that can run in INT8"):
        quick(plain(), calibration=[np.zeros((2, 4), np.float32)])


def test_profiles_may_be_shapes_or_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = OnnxRuntimeBackend.build

    def spy(self: OnnxRuntimeBackend, request: Any) -> Any:
        seen.append(dict(request.profiles))
        return real(self, request)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", spy)
    shapes = ((1, 3, 8, 8), (4, 3, 8, 8), (9, 3, 8, 8))
    quick(precision="float32", profiles={"x": shapes})
    quick(precision="float32", profiles={"x": Profile(*shapes)})
    assert seen == [{"x": Profile(*shapes)}] * 2
    quick(precision="float32", example_inputs=X)
    assert seen[-1] == {"x": Profile((1, 3, 8, 8), X.shape, X.shape)}
    quick(precision="float32")
    quick(cnn(batch=2), precision="float32", example_inputs=X[:2])
    assert seen[-2:] == [{}, {}]


def test_float16_keeps_in_float32_what_float16_cannot_hold() -> None:
    a, b = np.full((2, 5), 1e6, np.float32), np.zeros((2, 5), np.float32)
    engine = quick(two(), precision="float16", example_inputs=(a, b))
    d, y = engine(a, b)
    np.testing.assert_array_equal(d, a)
    assert np.isfinite(y).all()


def test_loading_checks_the_file(tmp_path: Path) -> None:
    path = write_artifact(cnn_artifact(), tmp_path / "net.octavo")
    with pytest.raises(ArtifactError, match="there is no engine file"):
        load(tmp_path / "gone.octavo")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"net\.octavo is not an Octavo engine file, or it is"):
        load(path)


def test_the_engine_of_an_unknown_backend_names_the_octavo_that_wrote_it(tmp_path: Path) -> None:
    manifest = cnn_artifact().manifest.model_copy(
        update={"backend": "abacus", "octavo_version": "9.0"}
    )
    path = write_artifact(Artifact(manifest, cnn_artifact().members), tmp_path / "net.octavo")
    with pytest.raises(ArtifactError, match=r"backend 'abacus'.*install Octavo 9\.0, which wrote"):
        load(path)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_of_backends_that_are_missing_here_say_so(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_artifact(fake_artifact(backend=backend), tmp_path / "net.octavo")
    monkeypatch.setattr(type(get_backend(backend)), "missing", lambda self: "install it")
    with pytest.raises(UnsupportedError, match=rf"net\.octavo needs backend {backend}: install it"):
        load(path)
    with pytest.raises(UnsupportedError, match="install it"):
        quick(backend=backend, precision="float32")


def test_the_manifest_of_another_machine_does_not_matter_on_a_cpu(tmp_path: Path) -> None:
    """An engine of ONNX Runtime is portable; other backends refuse such files when they open."""
    artifact = cnn_artifact()
    elsewhere = {"backend_version": "1.0.0", "octavo_version": "0.0.1"}
    moved = type(artifact)(artifact.manifest.model_copy(update=elsewhere), artifact.members)
    with load(write_artifact(moved, tmp_path / "net.octavo")) as engine:
        assert engine(X).shape == (12, 4)


def _built_types(monkeypatch: pytest.MonkeyPatch, activations: str) -> set[str]:
    """Integer types of the activations in the graph that a backend is given for an int8 table."""
    table = calibrate(cnn(), [X], observer="minmax", verbose=False)
    assert {entry.dtype for entry in table.tensors.values()} == {"int8"}
    requests = []
    real = OnnxRuntimeBackend.build

    def spy(self: OnnxRuntimeBackend, request: Any) -> Any:
        requests.append(request)
        return real(self, request)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", spy)
    monkeypatch.setattr(OnnxRuntimeBackend, "activations", activations)
    quick(calibration=table)
    assert requests[0].table == table.dumps(), "the table in the engine is the one that was given"
    return {
        node.inputs[2].dtype.numpy().name
        for node in requests[0].quantized.model.graph
        if node.op_type == "QuantizeLinear"
    }


def test_tensors_behind_a_relu_get_unsigned_codes_where_the_backend_likes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _built_types(monkeypatch, "uint8") == {"int8", "uint8"}


def test_a_backend_of_int8_gets_the_codes_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_backend("tensorrt").activations == "int8"
    assert _built_types(monkeypatch, "int8") == {"int8"}


def test_an_engine_for_onnx_runtime_has_no_clamp_left_to_run() -> None:
    with quick(calibration=calibrate(cnn(), [X], observer="minmax", verbose=False)) as engine:
        assert not {"Clip", "Relu"} & {layer.op for layer in engine.layers().layers}


def _count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    builds: list[str] = []
    real = OnnxRuntimeBackend.build

    def spy(self: OnnxRuntimeBackend, request: Any) -> Any:
        builds.append(request.precision)
        return real(self, request)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", spy)
    return builds


@pytest.mark.filterwarnings("ignore:there are .* calibration samples")
def test_the_cache_serves_engines_calibrated_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = _count_builds(monkeypatch)
    for _ in range(2):
        quick(calibration=[X], cache_dir=tmp_path)
    assert builds == ["int8"]


def test_the_cache_knows_what_a_float16_engine_was_guarded_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = _count_builds(monkeypatch)
    for scale in (1.0, 1e6):
        quick(precision="float16", example_inputs=X * np.float32(scale), cache_dir=tmp_path)
    assert builds == ["float16", "float16"]

"""Backend `tensorrt` from request to results, on fakes of TensorRT 10 and 11."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from fake_machine import GPU, RTX, TENSORRT_10, TENSORRT_11, Machine, make_machine
from onnx import helper
from tensorrt_samples import PROFILE, cnn, model_of, pictures, request

import octavo
from octavo.core.errors import (
    ArtifactError,
    BuildError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from octavo.engines import Engine, RunOptions, read_artifact
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest
from octavo.engines.tensorrt.api import find_api
from octavo.engines.tensorrt.backend import backend
from octavo.engines.tensorrt.base import RUNNERS
from octavo.engines.tensorrt.build import PLAN, typed_graph
from octavo.engines.tensorrt.cuda_driver import Gpu
from octavo.export.onnx_model import serialize

TORCH = RunOptions("torch")


@pytest.fixture(params=[TENSORRT_10, TENSORRT_11])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch, request.param)


@pytest.fixture
def eleven(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch, TENSORRT_11)


def expected(wanted: BuildRequest, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialize(typed_graph(wanted)), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int8+float16"])
def test_builds_and_runs_every_precision(machine: Machine, precision: str) -> None:
    wanted = request(precision)
    artifact = backend.build(wanted)
    with Engine(artifact, lambda item: backend.open(item, TORCH)) as engine:
        x = pictures(3)
        np.testing.assert_array_equal(engine(x), expected(wanted, x))
        counts = engine.layers().counts()
    inner = "float16" if "float16" in precision else "float32"
    wanted_counts = {"int8": 3, inner: 1, "reformat": 1} if "int8" in precision else {inner: 4}
    assert counts == wanted_counts, "two convolutions, pooling and Gemm"


@pytest.mark.parametrize("quirk", ["", "no typed flag"])
def test_networks_are_strongly_typed(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, quirk: str
) -> None:
    version = find_api("tensorrt").version
    if quirk and version == TENSORRT_10:
        pytest.skip("TensorRT 10 has the flag")
    machine.world.quirks.add(quirk)
    machine.install(version)
    backend.build(request())
    flags = 2 if version == TENSORRT_10 else 0 if quirk else 1
    assert ("create_network", flags) in machine.world.calls


def test_manifest_says_what_the_engine_is_for(machine: Machine) -> None:
    wanted = request("int8")
    manifest = backend.build(wanted).manifest
    assert manifest.backend == "tensorrt"
    assert manifest.backend_version == find_api("tensorrt").version
    assert (manifest.architecture, manifest.device) == (("sm_86",), GPU.name)
    assert manifest.profiles == {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    assert set(manifest.members) == {PLAN, "table.json"}
    assert list(map(str, manifest.inputs)) == ["x: float32[batch, 3, 8, 8]"]
    assert manifest.reasons["Gemm:y"] == "excluded by the caller"


def test_reports_why_a_layer_is_not_int8(machine: Machine) -> None:
    artifact = backend.build(request("int8"))
    with Engine(artifact, lambda item: backend.open(item, TORCH)) as engine:
        reasons = {layer.name: layer.reason for layer in engine.layers().not_int8()}
    assert reasons == {"Gemm:y": "excluded by the caller"}


@pytest.mark.parametrize(
    ("precision", "message"), [("int8", "no layer of it would run in INT8"), ("float16", "4 float")]
)
def test_an_engine_of_another_precision_than_asked_for_is_refused(
    machine: Machine, precision: str, message: str
) -> None:
    machine.world.quirks.add("all float")
    with pytest.raises(BuildError, match=message):
        backend.build(request(precision))
    assert machine.world.alive == 0, "the engine that was looked at has to be freed"


def test_environment_is_what_a_plan_depends_on(machine: Machine) -> None:
    found = backend.environment([])
    assert (found["architecture"], found["device"]) == ("sm_86", GPU.name)
    assert found["cuda_driver"] == "13.0"
    assert "cuda_runtime" in found
    assert backend.environment(["sm_86"]) == found


def test_other_targets_are_refused_and_the_other_backend_named(machine: Machine) -> None:
    for call in (backend.environment, lambda targets: backend.check("int8", targets)):
        with pytest.raises(UnsupportedError, match=r"'sm_120'.*tensorrt-rtx"):
            call(["sm_120"])
    with pytest.raises(UnsupportedError, match="sm_86"):
        backend.build(request(targets=("sm_90",)))


def test_missing_names_the_command_or_the_gpu(machine: Machine) -> None:
    assert backend.missing() == ""
    machine.has(None)
    assert "needs an NVIDIA GPU and its driver" in backend.missing()
    with pytest.raises(UnsupportedError, match="NVIDIA GPU"):
        backend.build(request())


def test_stubs_alone_count_as_missing(eleven: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert 'pip install "octavo[tensorrt]"' in backend.missing()
    assert "stubs" in backend.missing()


def test_a_library_that_does_not_load_says_why(
    eleven: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"octavo\[tensorrt\]"):
        backend.version()


def test_unknown_versions_are_refused(eleven: Machine) -> None:
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.6\.1 is installed.*10 and 11"):
        eleven.install("8.6.1")
    assert "8.6.1" in backend.missing()


def test_errors_of_the_parser_are_all_reported(machine: Machine) -> None:
    graph = cnn()
    for node in graph.graph:
        if node.op_type == "Relu":
            node.op_type = "Mystery"
    message = r"cannot read the graph: Mystery Relu:r0: no importer; Mystery Relu:r1: no importer"
    with pytest.raises(BuildError, match=message):
        backend.build(BuildRequest(graph, None, "float32", "f" * 64, profiles=PROFILE))


def test_profiles_that_tensorrt_refuses_are_an_error(machine: Machine) -> None:
    machine.world.quirks.add("bad profile")
    with pytest.raises(BuildError, match="refuses the profiles"):
        backend.build(request())


def test_inputs_that_decide_shapes_are_refused(machine: Machine) -> None:
    nodes = [helper.make_node("Add", ["a", "shape"], ["y"])]
    graph = model_of(nodes, {"a": (2,), "shape": (2,)}, {"y": (2,)})
    with pytest.raises(UnsupportedError, match="'shape' decides the shape of other tensors"):
        backend.build(BuildRequest(graph, None, "float32", "f" * 64))


def test_the_build_runs_on_torchs_current_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda index: chosen.append((index, threading.current_thread().name)),
    )
    backend.build(request())
    assert chosen == [(3, "octavo-build")], "a new thread would start on GPU 0"


def test_a_library_that_does_not_start_gives_its_reason(machine: Machine) -> None:
    artifact = backend.build(request())
    machine.world.quirks.add("no start")
    with pytest.raises(BuildError, match="error: 35"):
        backend.build(request())
    with pytest.raises(BuildError, match="error: 35"):
        backend.open(artifact, TORCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend_version": "10.0.1"}, r"by TensorRT 10\.0\.1, and 11.* is installed"),
        ({"architecture": ("sm_90",)}, "for sm_90, and this machine's .* is sm_86"),
        ({"device": "NVIDIA L4"}, "on a NVIDIA L4 and is tied to that model"),
        ({"backend": "tensorrt-rtx"}, "for backend tensorrt-rtx, not tensorrt"),
    ],
)
def test_engines_for_something_else_are_refused_unread(
    eleven: Machine, change: dict[str, object], message: str
) -> None:
    artifact = backend.build(request())
    eleven.world.calls.clear()
    other = Artifact(artifact.manifest.model_copy(update=change), artifact.members)
    with pytest.raises(ArtifactError, match=message):
        backend.open(other, TORCH)
    assert "deserialize" not in eleven.world.names()


def test_engines_need_a_gpu(eleven: Machine) -> None:
    artifact = backend.build(request())
    eleven.has(None)
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        backend.open(artifact, TORCH)


def test_an_engine_not_tied_to_a_model_runs_on_its_siblings(eleven: Machine) -> None:
    artifact = backend.build(request())
    portable = Artifact(artifact.manifest.model_copy(update={"device": None}), artifact.members)
    eleven.has(Gpu(0, "NVIDIA RTX A6000", "sm_86"))
    backend.open(portable, TORCH).close()


def test_a_plan_that_tensorrt_cannot_read_is_refused(eleven: Machine) -> None:
    artifact = backend.build(request())
    damaged = Artifact(artifact.manifest, {PLAN: b"\x00"})
    with pytest.raises(ArtifactError, match="magic tag; build it again"):
        backend.open(damaged, TORCH)


def test_a_file_without_a_plan_is_refused(eleven: Machine) -> None:
    artifact = backend.build(request())
    with pytest.raises(ArtifactError, match=r"holds no model\.plan"):
        backend.open(Artifact(artifact.manifest, {}), TORCH)


def test_a_plan_of_other_types_than_its_manifest_is_refused(eleven: Machine) -> None:
    artifact = backend.build(request())
    eleven.world.quirks.add("other types")
    with pytest.raises(ArtifactError, match="'x' as int32, its manifest as float32"):
        backend.open(artifact, TORCH)


def test_too_little_memory_is_an_error_with_a_remedy(eleven: Machine) -> None:
    artifact = backend.build(request())
    eleven.world.quirks.add("no memory")
    with pytest.raises(BuildError, match="free GPU memory"):
        backend.open(artifact, TORCH)


def test_an_inspector_that_writes_something_else_is_an_error(eleven: Machine) -> None:
    eleven.world.quirks.add("bad inspector")
    with pytest.raises(BuildError, match="something else than layers"):
        backend.build(request())


def test_runners_are_chosen_by_name_or_by_what_is_there(
    eleven: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = backend.build(request())
    with pytest.raises(InputError, match="no runner 'cupy'; choose from torch, pycuda"):
        backend.open(artifact, RunOptions("cupy"))
    for available, takes_torch in ((True, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        runner = backend.open(artifact)
        assert runner.takes_torch is takes_torch
        runner.close()


def test_a_runner_asked_for_by_name_does_not_fall_back(eleven: Machine) -> None:
    artifact = backend.build(request())
    eleven.cuda.available = False
    with pytest.raises(UnsupportedError, match="choose runner='pycuda'"):
        backend.open(artifact, TORCH)


def test_octavo_build_and_load_go_through_the_backend(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.octavo"
    x = pictures(2)
    for _ in range(2):  # the second comes from the cache
        octavo.build(
            cnn(),
            backend="tensorrt",
            precision="float16",
            example_inputs=x,
            profiles=PROFILE,
            cache_dir=tmp_path / "cache",
            output=path,
        )
    assert machine.world.names().count("create_network") == 1, "the second build is cached"
    assert read_artifact(path).manifest.device == GPU.name
    for runner in ("torch", "pycuda"):
        with octavo.load(path, runner=runner) as engine:
            assert np.isfinite(engine(x)).all()
            assert isinstance(engine(torch.from_numpy(x)), torch.Tensor)
    assert list((tmp_path / "cache").glob("tensorrt.timing")), "timings are kept in the cache"


def test_targets_are_refused_before_anything_is_calibrated(eleven: Machine) -> None:
    with pytest.raises(UnsupportedError, match="sm_120"):
        octavo.build(
            cnn(), backend="tensorrt", calibration="there-is-no-such-file.npy", targets=["sm_120"]
        )


def test_rtx_records_graphs_through_its_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.engines.tensorrt.rtx import backend as rtx

    machine = make_machine(monkeypatch, RTX)
    artifact = rtx.build(request("float16"))
    assert ("target", "SM86", 0) in machine.world.calls, "this machine's GPU is the target"
    runner = rtx.open(artifact, RunOptions("torch", cuda_graph=True))
    call = next(c for c in machine.world.calls if c[0] == "create_execution_context")
    assert call[1].cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    result = runner.run({"x": torch.from_numpy(pictures())})["y"]
    assert result.shape == (2, 4)
    assert "capture" not in machine.world.names()


def test_rtx_reports_a_target_that_the_library_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.engines.tensorrt.rtx import backend as rtx

    machine = make_machine(monkeypatch, RTX)
    machine.world.quirks.add("bad target")
    with pytest.raises(BuildError, match="refuses target sm_120"):
        rtx.build(request(targets=("sm_120",)))


def test_a_runner_may_be_shared_by_threads(eleven: Machine) -> None:
    runner = backend.open(backend.build(request()), TORCH)
    inputs = [pictures(1 + seed % 4, seed) for seed in range(4)]
    right = [expected(request(), x) for x in inputs]
    equal: list[bool] = []

    def work(seed: int) -> None:
        for _ in range(5):
            found = runner.run({"x": torch.from_numpy(inputs[seed])})["y"].numpy()
            equal.append(np.array_equal(found, right[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 20, "a thread saw another thread's numbers"


def test_messages_are_kept_for_the_log_not_printed(
    eleven: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    eleven.world.quirks.add("no build")
    with pytest.raises(BuildError, match="no implementation for node Conv:c1") as caught:
        backend.build(request())
    assert not re.search("a warning", str(caught.value))
    assert capfd.readouterr().err == ""


def test_every_runner_is_known_by_name() -> None:
    assert set(RUNNERS) == {"torch", "pycuda"}

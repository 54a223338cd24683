"""Backend `tensorrt-rtx` on the real library: ahead-of-time builds, refusals, real settings."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tensorrt_samples import PROFILE, cnn, model_of, pictures, quantized, request

import octavo
from octavo.core.errors import (
    ArtifactError,
    BuildError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from octavo.core.progress import Advance
from octavo.engines import read_artifact, write_artifact
from octavo.engines.backend import BuildRequest
from octavo.engines.tensorrt import rtx as rtx_backend
from octavo.engines.tensorrt.api import TensorRTApi, find_api
from octavo.engines.tensorrt.build import (
    PLAN,
    WORKSPACE,
    build_artifact,
    make_config,
    parse_network,
    typed_graph,
)
from octavo.engines.tensorrt.cuda_driver import Gpu, current_gpu
from octavo.engines.tensorrt.layers import parse_layers
from octavo.engines.tensorrt.rtx import backend
from octavo.export import onnx_model

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

TARGETS = ("sm_86",)


@pytest.fixture
def api() -> TensorRTApi:
    return find_api("tensorrt-rtx")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_backend, "current_gpu", lambda: None)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_builds_ahead_of_time_without_a_gpu(precision: str, tmp_path: Path) -> None:
    artifact = backend.build(request(precision, targets=("sm_120", "sm_86")))
    path = write_artifact(artifact, tmp_path / "small.octavo")
    manifest = read_artifact(path).manifest
    assert manifest.architecture == ("sm_86", "sm_120"), "in the order of the architectures"
    assert (manifest.backend, manifest.device) == ("tensorrt-rtx", None)
    assert manifest.backend_version == trt.__version__
    assert manifest.precision == precision
    assert list(map(str, manifest.inputs)) == ["x: float32[batch, 3, 8, 8]"]
    assert list(map(str, manifest.outputs)) == ["y: float32[batch, 4]"]
    assert manifest.profiles == {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}
    assert len(artifact.members[PLAN]) > 1000


def test_octavo_build_takes_targets(tmp_path: Path) -> None:
    engine = octavo.build(
        cnn(),
        backend="tensorrt-rtx",
        precision="float16",
        example_inputs=pictures(4),
        targets=["sm_89"],
        cache_dir=tmp_path,
        output=tmp_path / "out.octavo",
    )
    assert engine.manifest.architecture == ("sm_89",)
    assert engine.manifest.profiles["x"] == ((1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU here")
def test_loading_without_a_gpu_says_what_is_needed(tmp_path: Path) -> None:
    path = write_artifact(backend.build(request(targets=TARGETS)), tmp_path / "a.octavo")
    with pytest.raises(UnsupportedError, match=r"needs an NVIDIA GPU \(sm_86\) and its driver"):
        octavo.load(path)


def test_a_damaged_file_is_refused_before_the_library_sees_it(tmp_path: Path) -> None:
    path = write_artifact(backend.build(request(targets=TARGETS)), tmp_path / "a.octavo")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="build it again"):
        octavo.load(path)


def parsed(api: TensorRTApi, builder: Any, graph: ir.Model, folder: Path) -> tuple[Any, Any]:
    """The network that TensorRT makes of a graph, and the parser that owns its weights."""
    return parse_network(api, builder, onnx_model.save_onnx(graph, folder / "model.onnx"))


def layer_types(graph: ir.Model, folder: Path) -> Counter[str]:
    """How many layers of each type TensorRT for RTX reads, before it fuses them."""
    api = find_api("tensorrt-rtx")
    network, _parser = parsed(api, api.builder(), graph, folder)
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def test_settings_arrive_in_the_real_config(api: TensorRTApi, tmp_path: Path) -> None:
    wanted = request("float16", targets=("sm_80", "sm_89"))
    builder = api.builder()
    network, _parser = parsed(api, builder, typed_graph(wanted), tmp_path)
    config = make_config(api, builder, network, wanted, wanted.targets)
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == WORKSPACE
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.num_optimization_profiles == 1
    assert config.num_compute_capabilities == 2
    found = [config.get_compute_capability(index).name for index in range(2)]
    assert found == ["SM80", "SM89"]


def test_float16_is_in_the_network_itself(api: TensorRTApi, tmp_path: Path) -> None:
    for precision, dtype in (("float32", "FLOAT"), ("float16", "HALF")):
        graph = typed_graph(request(precision))
        network, _parser = parsed(api, api.builder(), graph, tmp_path)
        convolutions = [
            network.get_layer(index).get_output(0)
            for index in range(network.num_layers)
            if network.get_layer(index).type.name == "CONVOLUTION"
        ]
        assert [tensor.dtype.name for tensor in convolutions] == [dtype, dtype]
        assert network.get_input(0).dtype.name == "FLOAT", "inputs stay float32"


def test_a_float16_engine_without_float16_is_an_error() -> None:
    model = model_of([helper.make_node("Add", ["a", "a"], ["y"])], {"a": (4,)}, {"y": (4,)})
    huge = BuildRequest(
        model, None, "float16", "f" * 64, peaks={"a": 1e6, "y": 1e6}, targets=TARGETS
    )
    with pytest.raises(BuildError, match=r"no layer of the network .* float16"):
        backend.build(huge)


class Recorder:
    """A progress that keeps its steps, and may break off."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.fail_at = fail_at

    @contextlib.contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Advance]:
        assert (title, total) == ("Building with TensorRT for RTX", 100)
        yield self._step

    def _step(self, steps: int) -> None:
        self.steps.append(steps)
        if self.fail_at is not None and sum(self.steps) >= self.fail_at:
            raise KeyError("stop here")


def test_a_real_build_reports_its_progress() -> None:
    progress = Recorder()
    backend.build(request(targets=TARGETS, progress=progress))
    assert sum(progress.steps) == 100
    assert len(progress.steps) > 3


def test_a_real_build_ends_cleanly_when_it_is_stopped() -> None:
    progress = Recorder(fail_at=5)
    with pytest.raises(KeyError, match="stop here"):
        backend.build(request(targets=TARGETS, progress=progress))
    assert sum(progress.steps) < 100, "the build was stopped early"
    backend.build(request(targets=TARGETS))


def test_ctrl_c_ends_a_real_build(monkeypatch: pytest.MonkeyPatch) -> None:
    # a shell starts background jobs with this signal ignored, and CI may be one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    progress = Recorder()

    def interrupt(steps: int) -> None:
        if not progress.steps:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)  # until the main thread has taken it and asked TensorRT to stop
        progress.steps.append(steps)

    monkeypatch.setattr(progress, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        backend.build(request(targets=TARGETS, progress=progress))
    assert sum(progress.steps) < 100, "the build was stopped early"


def test_layers_as_the_real_compiler_lists_them(
    api: TensorRTApi, caplog: pytest.LogCaptureFixture
) -> None:
    """It lists the layers of a Q/DQ build in its log, in the words of an engine inspector of 11."""
    caplog.set_level(logging.DEBUG, "octavo.tensorrt-rtx")
    wanted = request("int8", targets=TARGETS)
    build_artifact(api, wanted, architecture=TARGETS, device=None)
    lists = [text for text in caplog.messages if text.startswith("Layers:")]
    reasons = wanted.quantized.reasons if wanted.quantized else {}
    report = parse_layers(as_json(lists[-1]), reasons, quantized=True)
    heavy = {layer.op: layer for layer in report.layers if layer.op in ("Conv", "Gemm")}
    assert heavy["Conv"].precision == "int8"
    assert report.counts()["int8"] >= 2, "both convolutions read int8"
    assert heavy["Gemm"].precision == "float32"
    assert heavy["Gemm"].reason == "excluded by the caller"
    assert report.counts()["reformat"] >= 1, "the input is quantized first"


def as_json(text: str) -> str:
    """The log's list of layers in the form that an engine inspector gives."""
    layers = []
    for line in text.splitlines():
        found = re.match(
            r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[.*\], "
            r"Outputs: \[(.*)\], TacticName: (.*?), StreamId: \d+, Metadata: (.*)",
            line,
        )
        if found is None:
            continue
        name, kind, inputs, outputs, tactic, metadata = found.groups()
        types = [
            [{"Datatype": dtype} for dtype in re.findall(r"Datatype: (\w+)", part)]
            for part in (inputs, outputs)
        ]
        layers.append(
            {"Name": name, "LayerType": kind, "Inputs": types[0], "Outputs": types[1]}
            | {"TacticName": tactic, "Metadata": metadata}
        )
    return json.dumps({"Layers": layers})


@pytest.mark.parametrize("precision", ["int8", "int8+float16"])
def test_int8_is_refused_with_the_reason(precision: str) -> None:
    message = "INT8 for weights only, not for activations.*backend tensorrt or onnxruntime"
    with pytest.raises(UnsupportedError, match=message):
        backend.build(request(precision, targets=TARGETS))
    with pytest.raises(UnsupportedError, match=message):
        octavo.build(
            cnn(),
            backend="tensorrt-rtx",
            precision=precision,
            calibration="there-is-no-such-file.npy",
            targets=TARGETS,
        )


def test_targets_that_it_lacks_are_refused_with_those_it_has() -> None:
    with pytest.raises(UnsupportedError, match=r"'sm_90'; it builds for sm_75, sm_80, sm_86"):
        backend.environment(["sm_86", "sm_90"])
    with pytest.raises(InputError, match="given twice"):
        backend.environment(["sm_86", "sm_86"])


def test_targets_have_to_be_given_where_there_is_no_gpu(no_gpu: None) -> None:
    with pytest.raises(InputError, match=r"targets=\['sm_86'\], from sm_75, sm_80"):
        backend.build(request())


def test_this_machines_gpu_is_the_target_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_backend, "current_gpu", lambda: Gpu(0, "NVIDIA L4", "sm_89"))
    assert backend.environment([]) == {"architecture": "sm_89"}
    monkeypatch.setattr(rtx_backend, "current_gpu", lambda: Gpu(0, "NVIDIA H100", "sm_90"))
    with pytest.raises(UnsupportedError, match="'sm_90'"):
        backend.environment([])


def test_environment_does_not_depend_on_the_order_of_targets() -> None:
    assert backend.environment(["sm_120", "sm_75"]) == {"architecture": "sm_75,sm_120"}


def test_missing_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.missing() == ""
    assert backend.version() == trt.__version__
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert 'pip install "octavo[tensorrt-rtx]"' in backend.missing()
    with pytest.raises(MissingDependencyError, match="octavo"):
        backend.build(request(targets=TARGETS))


@pytest.mark.parametrize("half", [False, True])
def test_the_parser_sees_every_pair_of_a_qdq_graph(half: bool, tmp_path: Path) -> None:
    from octavo.export.precision import to_float16

    graph = quantized(cnn(), half=half).model
    ops = [node.op_type for node in graph.graph]
    found = layer_types(to_float16(graph) if half else graph, tmp_path)
    assert found["QUANTIZE"] == ops.count("QuantizeLinear") >= 3
    assert found["DEQUANTIZE"] == ops.count("DequantizeLinear")
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(layer_types(cnn(), tmp_path))


def test_a_dynamic_input_without_a_profile_says_what_to_pass() -> None:
    message = r"'x' has shape \[\?, 3, 8, 8\].*profiles=\{'x': \(\(1, 3, 8, 8\), \(8, 3, 8, 8\)"
    with pytest.raises(InputError, match=message):
        backend.build(request(targets=TARGETS, profiles={}))


def test_fixed_shapes_need_no_profile() -> None:
    artifact = backend.build(request(batch=2, targets=TARGETS))
    assert artifact.manifest.profiles == {}


def test_errors_of_the_parser_are_all_reported() -> None:
    graph = cnn()
    for index, node in enumerate(graph.graph):
        if node.op_type == "Relu":
            node.op_type, node.domain = f"Mystery{index}", "nowhere"
            node.name = f"mystery:{index}"
    graph.opset_imports["nowhere"] = 1
    with pytest.raises(BuildError, match=r"cannot read the graph: .*Mystery") as caught:
        backend.build(
            BuildRequest(graph, None, "float32", "f" * 64, profiles=PROFILE, targets=TARGETS)
        )
    assert "mystery:1" in str(caught.value)


def test_errors_of_the_build_are_reported() -> None:
    """Turing has no float32 matrix product in TensorRT for RTX."""
    with pytest.raises(BuildError, match=r"could not build the engine: .*SM75"):
        backend.build(request(targets=("sm_75",)))


def test_weights_beyond_protobufs_limit_lie_beside_the_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_model, "PROTOBUF_LIMIT", 1000)
    assert layer_types(cnn(), tmp_path)["CONVOLUTION"] == 2
    assert (tmp_path / "model.onnx.data").exists()
    artifact = backend.build(request(targets=TARGETS))
    assert len(artifact.members[PLAN]) > 1000


def test_affine_activations_are_refused_with_the_remedy() -> None:
    wanted = request("int8", quantized=quantized(cnn(), dtype="uint8"))
    with pytest.raises(UnsupportedError, match=r"'x' is quantized to uint8.*with dtype int8"):
        typed_graph(wanted)


def test_int8_with_a_zero_point_is_refused_too() -> None:
    pairs = quantized(cnn())
    zero = pairs.model.graph.initializers["r0.zero_point"]
    zero.const_value = ir.tensor(np.asarray(3, dtype=np.int8))
    with pytest.raises(UnsupportedError, match="'r0' is quantized to int8 with a zero point"):
        typed_graph(request("int8", quantized=pairs))


def test_int8_needs_a_quantized_graph() -> None:
    with pytest.raises(InputError, match="needs a Q/DQ graph; calibrate first"):
        typed_graph(request("int8", quantized=None))


def test_types_that_tensorrt_lacks_are_refused() -> None:
    nodes = [helper.make_node("Add", ["a", "a"], ["y"])]
    model = model_of(nodes, {"a": (4,)}, {"y": (4,)}, dtype=TensorProto.DOUBLE)
    with pytest.raises(UnsupportedError, match="'a' is float64, which TensorRT for RTX does not"):
        backend.build(BuildRequest(model, None, "float32", "f" * 64, targets=TARGETS))

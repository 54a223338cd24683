"""Real builds and runs, where there is a GPU with TensorRT; elsewhere the fakes stand in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tensorrt_samples import pictures, request

import octavo
from octavo.core.errors import MissingDependencyError
from octavo.engines import write_artifact
from octavo.engines.backend import Backend, BuildRequest
from octavo.engines.tensorrt.backend import backend as tensorrt
from octavo.engines.tensorrt.build import typed_graph
from octavo.engines.tensorrt.rtx import backend as rtx
from octavo.export.onnx_model import serialize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

TOLERANCE = {"float32": 1e-2, "float16": 2e-2, "int8": 5e-2, "int8+float16": 5e-2}
"""Largest error over the largest result; float32 convolutions may run in TF32."""


def need(backend: Backend, targets: tuple[str, ...] = ()) -> None:
    if backend.missing():
        pytest.skip(backend.missing())
    backend.check("float16", targets)


def reference(wanted: BuildRequest, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(serialize(typed_graph(wanted))).run(None, {"x": x})[0]


def check(engine: octavo.Engine, wanted: BuildRequest) -> None:
    for count in (2, 4, 1, 2):
        x = pictures(count, seed=count)
        right = reference(wanted, x)
        for found in (engine(x), engine(torch.from_numpy(x).cuda()).cpu().numpy()):
            error = np.abs(found - right).max() / np.abs(right).max()
            assert error < TOLERANCE[wanted.precision], f"batch {count} is off by {error:.3g}"


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int8+float16"])
@pytest.mark.parametrize("runner", ["torch", "torch with graphs", "pycuda"])
def test_tensorrt_builds_and_runs(precision: str, runner: str, tmp_path: Path) -> None:
    need(tensorrt)
    wanted = request(precision, timing_cache=str(tmp_path / "timings"))
    path = write_artifact(tensorrt.build(wanted), tmp_path / "small.octavo")
    try:
        engine = octavo.load(path, runner=runner.split()[0], cuda_graph="graphs" in runner)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    with engine:
        check(engine, wanted)
        counts = engine.layers().counts()
    if precision.startswith("int8"):
        assert counts["int8"] >= 2, f"both convolutions should run in INT8: {counts}"
    else:
        assert counts[precision] >= 2, f"both convolutions should run in {precision}: {counts}"


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tensorrt_for_rtx_builds_and_runs(precision: str, cuda_graph: bool, tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    if rtx.missing() or f"sm_{major}{minor}" not in rtx_targets():
        pytest.skip(rtx.missing() or f"TensorRT for RTX does not build for sm_{major}{minor}")
    wanted = request(precision)
    path = write_artifact(rtx.build(wanted), tmp_path / "small.octavo")
    with octavo.load(path, cuda_graph=cuda_graph) as engine:
        check(engine, wanted)
        assert engine.layers().counts()


def rtx_targets() -> tuple[str, ...]:
    from octavo.engines.tensorrt.api import find_api

    return find_api("tensorrt-rtx").targets()


def test_runs_in_the_callers_stream_and_inside_the_callers_graph() -> None:
    need(tensorrt)
    wanted = request("float16")
    runner = tensorrt.open(tensorrt.build(wanted))
    x = torch.from_numpy(pictures(2)).cuda()
    eager = runner.run({"x": x})["y"]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.testing.assert_close(runner.run({"x": x})["y"], eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runner.run({"x": x})["y"]
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, eager)
    runner.close()

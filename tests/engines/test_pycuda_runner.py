"""The runner on PyCUDA, on a fake driver: context, memory, stream, errors."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import pytest
from fake_machine import TENSORRT_10, Machine, make_machine
from tensorrt_samples import cnn, model_of, pictures, request

from octavo.core.errors import (
    ArtifactError,
    BuildError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from octavo.engines import RunOptions
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest, Profile
from octavo.engines.tensorrt.api import find_api
from octavo.engines.tensorrt.backend import backend
from octavo.engines.tensorrt.build import PLAN
from octavo.engines.tensorrt.pycuda_runner import PyCudaRunner
from octavo.export.onnx_model import serialize

PYCUDA = RunOptions("pycuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch, TENSORRT_10)


@pytest.fixture
def runner(machine: Machine) -> PyCudaRunner:
    runner = PyCudaRunner(find_api("tensorrt"), backend.build(request()))
    machine.world.calls.clear()
    return runner


def model(x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(serialize(cnn())).run(None, {"x": x})[0]


def test_results_are_those_of_the_model(machine: Machine, runner: PyCudaRunner) -> None:
    for count in (1, 4, 2):
        x = pictures(count, seed=count)
        result = runner.run({"x": x})["y"]
        np.testing.assert_array_equal(result, model(x))
    assert machine.driver.pushed == 0, "every push of the context has its pop"
    names = machine.world.names()
    assert names[-2:] == ["execute", "synchronize"]
    assert ("execute", 7) in machine.world.calls, "in the runner's own stream"


def test_strided_arrays_are_read_right(runner: PyCudaRunner) -> None:
    x = pictures(4)[::2, :, ::-1]
    np.testing.assert_array_equal(runner.run({"x": x})["y"], model(np.ascontiguousarray(x)))


def test_buffers_are_kept_and_grow(machine: Machine, runner: PyCudaRunner) -> None:
    for count in (1, 1, 2, 1):
        runner.run({"x": pictures(count)})
    sizes = [call[1] for call in machine.world.calls if call[0] == "mem_alloc"]
    assert sizes == [768, 16, 1536, 32]
    assert machine.driver.allocated == 1536 + 32, "a buffer that grew frees the old one"


def test_closing_gives_everything_back(machine: Machine, runner: PyCudaRunner) -> None:
    runner.run({"x": pictures()})
    runner.close()
    runner.close()
    assert (machine.driver.allocated, machine.driver.retained, machine.driver.pushed) == (0, 0, 0)
    assert machine.world.names()[-2:] == ["free context", "free engine"]
    for call in (lambda: runner.run({"x": pictures()}), runner.layers):
        with pytest.raises(BuildError, match="closed"):
            call()


def test_layers_are_read_in_the_context(machine: Machine, runner: PyCudaRunner) -> None:
    assert runner.layers().counts() == {"float32": 4}
    assert machine.driver.pushed == 0


def test_shapes_and_dtypes_are_checked(machine: Machine, runner: PyCudaRunner) -> None:
    with pytest.raises(InputError, match=r"\[9, 3, 8, 8\], the engine takes"):
        runner.run({"x": pictures(9)})
    with pytest.raises(InputError, match="'x' is float64, not float32"):
        runner.run({"x": pictures().astype(np.float64)})
    machine.world.quirks.add("no run")
    with pytest.raises(BuildError, match="out of memory"):
        runner.run({"x": pictures()})
    assert machine.driver.pushed == 0, "an error leaves no context behind"


def test_several_inputs_and_scalars(machine: Machine) -> None:
    from onnx import helper

    nodes = [helper.make_node("Mul", ["a", "factor"], ["y"])]
    graph = model_of(nodes, {"a": ("n", 5), "factor": ()}, {"y": ("n", 5)})
    wanted = BuildRequest(
        graph, None, "float32", "f" * 64, profiles={"a": Profile((1, 5), (2, 5), (3, 5))}
    )
    runner = backend.open(backend.build(wanted), PYCUDA)
    a = np.arange(10, dtype=np.float32).reshape(2, 5)
    result = runner.run({"a": a, "factor": np.asarray(3.0, dtype=np.float32)})["y"]
    np.testing.assert_array_equal(result, 3 * a)
    runner.close()


def test_graphs_are_refused(machine: Machine) -> None:
    artifact = backend.build(request())
    with pytest.raises(UnsupportedError, match="choose runner='torch'"):
        backend.open(artifact, RunOptions("pycuda", cuda_graph=True))


def test_an_engine_that_cannot_be_opened_gives_the_context_back(machine: Machine) -> None:
    artifact = backend.build(request())
    with pytest.raises(ArtifactError, match="build it again"):
        backend.open(Artifact(artifact.manifest, {PLAN: b"\x00"}), PYCUDA)
    assert (machine.driver.retained, machine.driver.pushed) == (0, 0)


def test_a_missing_pycuda_is_explained(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = backend.build(request())
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingDependencyError, match=r"octavo\[pycuda\].*CUDA headers.*driver"):
        backend.open(artifact, PYCUDA)

"""The fakes hold nothing that the real libraries do not have, so neither do our calls."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

FAKES = {
    "Builder": "Builder",
    "BuilderConfig": "IBuilderConfig",
    "CudaEngine": "ICudaEngine",
    "EngineInspector": "EngineInspector",
    "ExecutionContext": "IExecutionContext",
    "HostMemory": "IHostMemory",
    "ILogger": "ILogger",
    "IProgressMonitor": "IProgressMonitor",
    "Layer": "ILayer",
    "Network": "INetworkDefinition",
    "OnnxParser": "OnnxParser",
    "OptimizationProfile": "IOptimizationProfile",
    "ParserError": "ParserError",
    "Runtime": "Runtime",
    "Tensor": "ITensor",
    "TimingCache": "ITimingCache",
}
RTX_ONLY = {"TargetConfig": "IBuilderConfig", "RtxEngine": "ICudaEngine"} | {
    "RuntimeConfig": "IRuntimeConfig"
}


def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def stub_of_10(name: str) -> set[str]:
    """Members of a class in the stubs of TensorRT 10.13, which are no valid Python as a whole."""
    try:
        files = importlib.metadata.files("tensorrt-stubs")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    path = next(file for file in files or () if file.name == "tensorrt.pyi")
    text = Path(str(path.locate())).read_text()
    found = re.search(rf"^class {name}\b.*?(?=^class |^def |\Z)", text, re.M | re.S)
    assert found, f"TensorRT 10.13 has no class {name}"
    return set(re.findall(r"^    (?:def )?(\w+)(?=[(:])", found.group(), re.M))


def own_members(kind: type) -> set[str]:
    """Public names of a class and its annotated attributes, without what a base gives it."""
    base = next((one for one in (bytes,) if issubclass(kind, one)), object)
    names = {name for name in dir(kind) if not name.startswith("_")} - set(dir(base))
    return names | {name for name in inspect.get_annotations(kind) if not name.startswith("_")}


@pytest.mark.parametrize("fake", FAKES)
def test_fakes_of_10_have_only_what_its_stubs_have(fake: str) -> None:
    unknown = own_members(getattr(fake_tensorrt, fake)) - stub_of_10(FAKES[fake])
    assert not unknown, f"TensorRT 10.13's {FAKES[fake]} has no {sorted(unknown)}"


@pytest.mark.parametrize("fake", FAKES | RTX_ONLY)
def test_fakes_have_only_what_tensorrt_for_rtx_has(fake: str) -> None:
    name = (FAKES | RTX_ONLY)[fake]
    unknown = own_members(getattr(fake_tensorrt, fake)) - set(dir(getattr(rtx(), name)))
    assert not unknown, f"TensorRT for RTX's {name} has no {sorted(unknown)}"


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("ProfilingVerbosity", ["DETAILED", "LAYER_NAMES_ONLY", "NONE"]),
        ("MemoryPoolType", ["WORKSPACE"]),
        ("LayerInformationFormat", ["JSON", "ONELINE"]),
        ("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"]),
        ("DataType", ["FLOAT", "HALF", "INT8", "UINT8", "INT32", "INT64", "BOOL"]),
        ("LayerType", ["CAST", "CONSTANT", "QUANTIZE", "DEQUANTIZE"]),
    ],
)
def test_enumerations_have_the_names_that_are_used(kind: str, members: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for member in members:
            assert getattr(rtx(), kind).__members__[member].name == member
            assert member in stub_of_10(kind), f"TensorRT 10.13 has no {kind}.{member}"


def test_rtx_has_what_only_its_backend_uses() -> None:
    assert "WHOLE_GRAPH_CAPTURE" in rtx().CudaGraphStrategy.__members__
    assert {"SM75", "SM80", "SM86", "SM89", "SM120"} <= set(rtx().ComputeCapability.__members__)


def test_the_fake_of_11_lacks_what_11_removed() -> None:
    module = fake_tensorrt.make_module("11.4.1.2", fake_tensorrt.World())
    for name in ("INT8", "FP16"):
        assert name not in module.BuilderFlag.__members__
        assert name not in rtx().BuilderFlag.__members__
    assert not hasattr(module, "IInt8EntropyCalibrator2")

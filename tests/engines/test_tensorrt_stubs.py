"""mypy holds the protocols that we call TensorRT through against the published stubs of 10.13.

The stubs do not parse as they are: a few methods have parameters called `in`. A copy without what
does not parse, none of which we call, is given to mypy.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.engines.tensorrt import types

SHADOW = """
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

from tensorrt import Builder as Builder
from tensorrt import EngineInspector as EngineInspector
from tensorrt import IBuilderConfig as BuilderConfig
from tensorrt import ICudaEngine as CudaEngine
from tensorrt import IExecutionContext as ExecutionContext
from tensorrt import IHostMemory as HostMemory
from tensorrt import ILayer as Layer
from tensorrt import ILogger as Logger
from tensorrt import INetworkDefinition as Network
from tensorrt import IOptimizationProfile as OptimizationProfile
from tensorrt import IProgressMonitor as ProgressMonitor
from tensorrt import ITensor as Tensor
from tensorrt import ITimingCache as TimingCache
from tensorrt import OnnxParser as Parser
from tensorrt import ParserError as ParserError
from tensorrt import Runtime as Runtime

Shape = tuple[int, ...]
TargetConfig: TypeAlias = Any

class Module(Protocol):
    __version__: str
    ILogger: type[Any]
    IProgressMonitor: type[Any]
    BuilderFlag: Any
    ComputeCapability: Any
    CudaGraphStrategy: Any
    LayerInformationFormat: Any
    MemoryPoolType: Any
    NetworkDefinitionCreationFlag: Any
    ProfilingVerbosity: Any
    def Builder(self, logger: Logger) -> Builder: ...
    def OnnxParser(self, network: Network, logger: Logger) -> Parser: ...
    def Runtime(self, logger: Logger) -> Runtime: ...
"""
"""The protocols' names, standing for TensorRT's own classes."""

KNOWN = (
    '"Dims"; expected "Iterable',  # Dims is a sequence, which its stub leaves out,
    "Need type annotation for",  # so what is made of one has no type
    '"BuildMonitor"; expected "IProgressMonitor"',  # api.monitor wraps ours in a subclass
    '"phase_start" of "IProgressMonitor"',  # a phase without a parent has None
)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tensorrt-stubs is not installed")
    folder = tmp_path_factory.mktemp("stubs")
    for file in files:
        if file.suffix == ".pyi" and file.parts[0] in ("tensorrt", "tensorrt_bindings"):
            target = folder.joinpath(*file.parts)
            target.parent.mkdir(exist_ok=True)
            target.write_text(_parsing(file.locate().read_text()))
    (folder / "tensorrt_libs.pyi").touch()
    return folder


def _parsing(text: str) -> str:
    """The text without the lines that no Python parser takes."""
    lines = text.splitlines()
    for _ in range(20):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines[(error.lineno or 1) - 1] = ""
        else:
            return "\n".join(lines) + "\n"
    raise AssertionError("the stubs have changed beyond repair")


@pytest.mark.slow
def test_our_calls_of_tensorrt_10_fit_its_stubs(stubs: Path, tmp_path: Path) -> None:
    root = Path(types.__file__).parents[3]
    shadow = tmp_path / "types.py"
    shadow.write_text(SHADOW)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file="]
    done = subprocess.run(
        [
            *command,
            "--implicit-reexport",
            "--shadow-file",
            types.__file__,
            str(shadow),
            str(root / "octavo"),
        ],
        env={"MYPYPATH": str(stubs), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=root,
    )
    ours = [line for line in done.stdout.splitlines() if line.startswith("octavo/engines/tensorrt")]
    wrong = [line for line in ours if not any(known in line for known in KNOWN)]
    assert not wrong, "\n".join(wrong)
    assert len(ours) > len(wrong), "mypy saw the stubs"

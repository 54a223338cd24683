"""The part of TensorRT's Python interface that Octavo calls, as types.

TensorRT 10, 11 and TensorRT for RTX all offer it. The published stubs of TensorRT do not parse, so
these protocols are what the type checker sees in a checkout; a test repairs a copy of the stubs
and has mypy check our calls against that too.
"""

# ruff: noqa: D102 - the methods are TensorRT's, whose manual describes them

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

__all__ = [
    "Builder",
    "BuilderConfig",
    "CudaEngine",
    "EngineInspector",
    "ExecutionContext",
    "HostMemory",
    "Layer",
    "Logger",
    "Module",
    "Network",
    "OptimizationProfile",
    "Parser",
    "ParserError",
    "ProgressMonitor",
    "Runtime",
    "Shape",
    "TargetConfig",
    "Tensor",
    "TimingCache",
]

Shape = tuple[int, ...]


class HostMemory(Protocol):
    """Bytes that TensorRT holds (IHostMemory); `bytes()` copies them."""

    @property
    def nbytes(self) -> int: ...

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Logger(Protocol):
    """Where TensorRT writes to (ILogger)."""

    def log(self, severity: Any, msg: str) -> None: ...


class ProgressMonitor(Protocol):
    """What TensorRT tells how far a build has come (IProgressMonitor); may be called by threads."""

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool: ...

    def phase_finish(self, phase_name: str) -> None: ...


class Tensor(Protocol):
    """A tensor of a network (ITensor); -1 in its shape is a dynamic axis."""

    name: str
    shape: Iterable[int]
    dtype: Any

    @property
    def is_shape_tensor(self) -> bool: ...


class Layer(Protocol):
    """A layer of a network (ILayer)."""

    name: str

    @property
    def type(self) -> Any: ...

    @property
    def num_outputs(self) -> int: ...

    def get_output(self, index: int) -> Tensor | None: ...


class Network(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    def get_input(self, index: int) -> Tensor: ...

    def get_layer(self, index: int) -> Layer: ...


class ParserError(Protocol):
    """IParserError."""

    def desc(self) -> str: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...


class Parser(Protocol):
    """OnnxParser; it has to live until the engine is built."""

    @property
    def num_errors(self) -> int: ...

    def parse(self, model: bytes) -> bool: ...

    def parse_from_file(self, model: str) -> bool: ...

    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """IOptimizationProfile."""

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...  # noqa: A002


class TimingCache(Protocol):
    """ITimingCache."""

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool: ...

    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    """IBuilderConfig."""

    profiling_verbosity: Any
    progress_monitor: ProgressMonitor

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...

    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...

    def get_timing_cache(self) -> TimingCache | None: ...


class TargetConfig(BuilderConfig, Protocol):
    """What IBuilderConfig has in addition in TensorRT for RTX."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...


class Builder(Protocol):
    """Builder."""

    def create_network(self, flags: int) -> Network: ...

    def create_builder_config(self) -> BuilderConfig: ...

    def create_optimization_profile(self) -> OptimizationProfile: ...

    def build_serialized_network(
        self, network: Network, config: BuilderConfig
    ) -> HostMemory | None: ...


class ExecutionContext(Protocol):
    """IExecutionContext; not for two threads at once."""

    def set_input_shape(self, name: str, shape: Shape) -> bool: ...

    def get_tensor_shape(self, name: str) -> Iterable[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class EngineInspector(Protocol):
    """EngineInspector."""

    execution_context: ExecutionContext

    def get_engine_information(self, format: Any) -> str: ...  # noqa: A002


class CudaEngine(Protocol):
    """ICudaEngine."""

    def create_execution_context(self, *args: Any) -> ExecutionContext | None: ...

    def create_engine_inspector(self) -> EngineInspector: ...

    def get_tensor_dtype(self, name: str) -> Any: ...


class Runtime(Protocol):
    """Runtime."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class Module(Protocol):
    """The module `tensorrt` or `tensorrt_rtx`: its classes, and its enumerations as they are."""

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

    def Builder(self, logger: Logger) -> Builder: ...  # noqa: N802 - TensorRT's names

    def OnnxParser(self, network: Network, logger: Logger) -> Parser: ...  # noqa: N802

    def Runtime(self, logger: Logger) -> Runtime: ...  # noqa: N802

"""TensorRT 10, TensorRT 11 and TensorRT for RTX without a GPU, as far as Octavo calls them.

The fakes hold only names that the real libraries have (test_tensorrt_fakes.py compares them), so
a call of something else fails. Their engines compute: memory is read and written at the addresses
that they are given, through ONNX Runtime on the graph that was parsed.
"""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime

NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT8": "int8", "BOOL": "bool"}
ONNX = {1: "FLOAT", 10: "HALF", 7: "INT64", 3: "INT8", 2: "UINT8", 9: "BOOL", 11: "DOUBLE"}
LAYERS = {
    "Conv": "CONVOLUTION",
    "Gemm": "MATRIX_MULTIPLY",
    "Relu": "ACTIVATION",
    "Cast": "CAST",
} | {
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
FORMATS = {
    "Int8": "Thirty-two wide channel vectorized row major Int8 format",
    "Half": "Channel major FP16 format where channel % 8 == 0",
    "Float": "Row major linear FP32",
}


@dataclass
class World:
    """The one GPU: what was called in which order, and graphs that are being captured."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    capturing: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    quirks: set[str] = field(default_factory=set)
    alive: int = 0

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        if stream in self.capturing:
            self.capturing[stream].append(work)
        else:
            work()

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Enum:
    """A member of an enumeration as pybind makes them: a name, and a number through int()."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return self.name


def enumeration(kind: str, **members: int) -> type:
    made = {name: Enum(name, value) for name, value in members.items()}
    return type(kind, (), {**made, "__members__": made})


DataType = enumeration("DataType", FLOAT=0, HALF=1, INT8=2, INT32=3, BOOL=4, UINT8=5, INT64=8)


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, shapes: bool = False) -> None:
        self.name, self.shape, self.is_shape_tensor = name, shape, shapes
        self.dtype = getattr(DataType, dtype)


class Layer:
    def __init__(self, name: str, kind: str, outputs: list[Tensor | None]) -> None:
        self.name, self._outputs = name, outputs
        self.type = Enum(kind, 0)
        self.num_outputs = len(outputs)

    def get_output(self, index: int) -> Tensor | None:
        return self._outputs[index]


class Network:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._proto = onnx.ModelProto()
        self._inputs: list[Tensor] = []
        self._layers: list[Layer] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]


class ParserError:
    def __init__(self, desc: str, name: str = "", operator: str = "") -> None:
        self._parts = desc, name, operator

    def desc(self) -> str:
        return self._parts[0]

    def node_name(self) -> str:
        return self._parts[1]

    def node_operator(self) -> str:
        return self._parts[2]


class OnnxParser:
    def __init__(self, network: Network, logger: Any) -> None:
        self._network, self._errors = network, []
        assert hasattr(logger, "log")

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        return self._read(onnx.load(model))

    def parse(self, model: bytes) -> bool:
        return self._read(onnx.load_from_string(bytes(model)))

    def _read(self, proto: onnx.ModelProto) -> bool:
        network = self._network
        network._proto = onnx.shape_inference.infer_shapes(proto)
        graph = network._proto.graph
        values = [*graph.value_info, *graph.output, *graph.input]
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        for value in graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
            dtype = ONNX[kinds[value.name]]
            network._inputs.append(Tensor(value.name, shape, dtype, value.name == "shape"))
        for node in graph.node:
            if node.op_type == "Mystery":
                self._errors.append(ParserError("no importer", node.name, node.op_type))
                continue
            kind = LAYERS.get(node.op_type, node.op_type.upper())
            outputs = [Tensor(name, (), ONNX[kinds[name]]) for name in node.output]
            network._layers.append(Layer(node.name, kind, outputs))
        return not self._errors


class OptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._shapes[input] = (min, opt, max)


class TimingCache:
    """Holds a set of words; its bytes begin with the GPU and version that wrote them."""

    def __init__(self, owner: str, words: set[str]) -> None:
        self._owner, self._words = owner, words

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._owner != self._owner and not ignore_mismatch:
            return False
        self._words |= input_cache._words
        return True

    def serialize(self) -> HostMemory:
        return HostMemory(" ".join([self._owner, *sorted(self._words)]).encode())


class BuilderConfig:
    profiling_verbosity: Any = None
    progress_monitor: Any = None

    def __init__(self, world: World, owner: str) -> None:
        self._world, self._owner = world, owner
        self._pools: dict[str, int] = {}
        self._profiles: list[OptimizationProfile] = []
        self._cache: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        raise AssertionError(f"flag {flag} was set; precision belongs into the graph")

    def set_memory_pool_limit(self, pool: Enum, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        if "bad profile" in self._world.quirks:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None:
        owner, *words = serialized_timing_cache.decode().split() or [self._owner]
        if owner == "old":
            raise RuntimeError("cannot read this timing cache")
        return None if owner == "unreadable" else TimingCache(owner, set(words))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache._owner != self._owner and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache


class TargetConfig(BuilderConfig):
    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: Enum, index: int) -> bool:
        self._world.calls.append(("target", compute_capability.name, index))
        return "bad target" not in self._world.quirks


class Builder:
    def __init__(self, world: World, version: str, logger: Any) -> None:
        self._world, self._version, self._logger = world, version, logger

    def create_network(self, flags: int = 0) -> Network:
        self._world.calls.append(("create_network", flags))
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        kind = TargetConfig if self._version.startswith("1.") else BuilderConfig
        self._config = kind(self._world, f"gpu-{self._version}")
        return self._config

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(
        self, network: Network, config: BuilderConfig
    ) -> HostMemory | None:
        error = Enum("ERROR", 1)
        dynamic = any(-1 in tensor.shape for tensor in network._inputs)
        if "no build" in self._world.quirks or (dynamic and not config._profiles):
            self._logger.log(error, "Error Code 10: no implementation for node Conv:c1")
            self._logger.log(Enum("WARNING", 2), "a warning")
            return None
        if not self._report(config.progress_monitor):
            self._logger.log(error, "Error Code 7: BuildCanceled")
            return None
        if config._cache is not None:
            config._cache._words.add("measured")
        plan = {
            "version": self._version,
            "detailed": config.profiling_verbosity.name == "DETAILED",
            "typed": network._flags,
            "profile": config._profiles[0]._shapes if config._profiles else {},
            "model": base64.b64encode(network._proto.SerializeToString()).decode(),
        }
        return HostMemory(json.dumps(plan).encode())

    def _report(self, monitor: Any) -> bool:
        monitor.phase_start("Building engine", None, 2)
        for outer in range(2):
            monitor.phase_start("Timing tactics", "Building engine", 5)
            for step in range(5):
                if not monitor.step_complete("Timing tactics", step):
                    monitor.phase_finish("Timing tactics")
                    monitor.phase_finish("Building engine")
                    return False
            monitor.phase_finish("Timing tactics")
            if not monitor.step_complete("Building engine", outer):
                return False
        monitor.phase_finish("Building engine")
        return True


class RuntimeConfig:
    cuda_graph_strategy: Any = None


class CudaEngine:
    def __init__(self, world: World, plan: dict[str, Any], logger: Any) -> None:
        self._world, self._plan, self._logger = world, plan, logger
        self._proto = onnx.load_from_string(base64.b64decode(plan["model"]))
        world.alive += 1

    def __del__(self) -> None:
        self._world.alive -= 1
        self._world.calls.append(("free engine",))

    def create_execution_context(self, *settings: Any) -> ExecutionContext | None:
        self._world.calls.append(("create_execution_context", *settings))
        return None if "no memory" in self._world.quirks else ExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def get_tensor_dtype(self, name: str) -> Enum:
        graph = self._proto.graph
        values = {value.name: value for value in (*graph.input, *graph.output)}
        if "other types" in self._world.quirks:
            return DataType.INT32
        return getattr(DataType, ONNX[values[name].type.tensor_type.elem_type])


class RtxEngine(CudaEngine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


class ExecutionContext:
    def __init__(self, engine: CudaEngine) -> None:
        self._engine, self._world = engine, engine._world
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        model = engine._proto.SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options)

    def __del__(self) -> None:
        self._world.calls.append(("free context",))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple), "TensorRT takes a tuple"
        self._world.calls.append(("set_input_shape", name, shape))
        if "no shapes" in self._world.quirks:
            return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if "unknown outputs" in self._world.quirks:
            return (-1, 4)
        axes = self._axes()
        value = next(value for value in self._engine._proto.graph.output if value.name == name)
        dims = value.type.tensor_type.shape.dim
        return tuple(
            axes.get(dim.dim_param, -1) if dim.dim_param else dim.dim_value for dim in dims
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if "no run" in self._world.quirks:
            self._engine._logger.log(Enum("ERROR", 1), "out of memory")
            return False
        self._world.calls.append(("execute", stream_handle))
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self._world.submit(stream_handle, lambda: self._compute(shapes, addresses))
        return True

    def _axes(self) -> dict[str, int]:
        axes: dict[str, int] = {}
        for value in self._engine._proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            for dim, length in zip(dims, self._shapes.get(value.name, ()), strict=False):
                if dim.dim_param:
                    axes[dim.dim_param] = length
        return axes

    def _compute(self, shapes: dict[str, Any], addresses: dict[str, int]) -> None:
        feeds = {
            name: memory(addresses[name], shape, NUMPY[self._engine.get_tensor_dtype(name).name])
            for name, shape in shapes.items()
        }
        names = [value.name for value in self._engine._proto.graph.output]
        for name, result in zip(names, self._session.run(names, feeds), strict=True):
            memory(addresses[name], result.shape, str(result.dtype))[...] = result


def memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The numbers at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


class EngineInspector:
    execution_context: Any = None

    def __init__(self, engine: CudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: Enum) -> str:  # noqa: A002
        assert format.name == "JSON"
        if "bad inspector" in self._engine._world.quirks:
            return "no JSON"
        graph = self._engine._proto.graph
        new = not self._engine._plan["version"].startswith("10.")
        makers = {name: node for node in graph.node for name in node.output}
        layers = []
        for node in graph.node:
            source = makers.get(node.input[0])
            heavy = node.op_type in ("Conv", "Gemm")
            first = source is None or source.op_type == "Cast"
            if node.op_type == "QuantizeLinear" and first:
                layers.append(self._layer(f"Reformat {node.name}", "Reformat", "Int8", [], new))
            elif heavy or node.op_type == "GlobalAveragePool":
                int8 = source is not None and source.op_type == "DequantizeLinear"
                kind = "Int8" if int8 else self._float(graph, node)
                fused = [user for user in graph.node if user.input[0] in node.output]
                names = [node.name, *(user.name for user in fused if user.op_type == "Relu")]
                family = "CaskConvolution" if heavy else "CaskPooling"
                layers.append(self._layer(" + ".join(names), family, kind, names, new))
        names = [value.name for value in (*graph.input, *graph.output)]
        if not self._engine._plan["detailed"]:
            layers = [layer["Name"] for layer in layers]
        if new:
            return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in names]})
        return json.dumps({"Layers": layers, "Bindings": names}).replace("\\u001e", "\x1e")

    def _float(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
        kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        return "Half" if kinds.get(node.output[0]) == 10 else "Float"

    def _layer(self, name: str, kind: str, dtype: str, nodes: list[str], new: bool) -> Any:
        quirks = self._engine._world.quirks
        dtype = "Float" if "all float" in quirks else dtype
        dynamic = bool(self._engine._plan["profile"])
        known = self.execution_context is not None and self.execution_context._shapes
        if new:
            tensor = {"Name": "t", "Datatype": dtype, "Format": "(NHWC) Channel major format"}
        else:
            text = FORMATS[dtype] if known or not dynamic else "N/A due to dynamic shapes"
            tensor = {"Name": "t", "Location": "Device", "Format/Datatype": text}
        metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
        tensors = {"Inputs": [tensor], "Outputs": [tensor]}
        return {"Name": name, "LayerType": kind, **tensors, "Metadata": metadata}


class Runtime:
    def __init__(self, world: World, version: str, logger: Any) -> None:
        self._world, self._version, self._logger = world, version, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
        self._world.calls.append(("deserialize",))
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self._logger.log(Enum("ERROR", 1), "Error Code 4: stdArchiveReader magic tag")
            return None
        kind = RtxEngine if self._version.startswith("1.") else CudaEngine
        return kind(self._world, plan, self._logger)


class ILogger:
    def log(self, severity: Any, msg: str) -> None:
        raise AssertionError("a subclass has to take the messages")


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise AssertionError("a subclass has to take this")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise AssertionError("a subclass has to take this")

    def phase_finish(self, phase_name: str) -> None:
        raise AssertionError("a subclass has to take this")


def make_module(version: str, world: World) -> ModuleType:
    """A module of the API of a version: "10.13.3.9", "11.4.1.2", or "1.7.1.116" for RTX."""
    rtx = version.startswith("1.")
    module = ModuleType("tensorrt_rtx" if rtx else "tensorrt")

    def start(kind: Any) -> Callable[[Any], Any]:
        def make(logger: Any) -> Any:
            assert isinstance(logger, ILogger)
            if "no start" in world.quirks:
                logger.log(Enum("ERROR", 1), "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            return kind(world, version, logger)

        return make

    names: dict[str, Any] = {
        "__version__": version,
        "Builder": start(Builder),
        "Runtime": start(Runtime),
        "OnnxParser": OnnxParser,
        "ILogger": ILogger,
        "IProgressMonitor": IProgressMonitor,
        "DataType": DataType,
        "LayerInformationFormat": enumeration("LayerInformationFormat", ONELINE=0, JSON=1),
        "MemoryPoolType": enumeration("MemoryPoolType", WORKSPACE=0),
        "ProfilingVerbosity": enumeration(
            "ProfilingVerbosity", LAYER_NAMES_ONLY=0, NONE=1, DETAILED=2
        ),
    }
    if version.startswith("10."):
        names["BuilderFlag"] = enumeration("BuilderFlag", FP16=0, INT8=1, TF32=6)
        names["IInt8EntropyCalibrator2"] = type("IInt8EntropyCalibrator2", (), {})
        flags = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    else:
        names["BuilderFlag"] = enumeration("BuilderFlag", TF32=6)
        flags = {} if "no typed flag" in world.quirks else {"STRONGLY_TYPED": 0}
    kind = "NetworkDefinitionCreationFlag"
    names[kind] = enumeration(kind, **flags)
    if rtx:
        names["ComputeCapability"] = enumeration(
            "ComputeCapability", NONE=0, CURRENT=1, SM75=75, SM80=80, SM86=86, SM120=120
        )
        names["CudaGraphStrategy"] = enumeration(
            "CudaGraphStrategy", DISABLED=0, WHOLE_GRAPH_CAPTURE=1
        )
    for name, value in names.items():
        setattr(module, name, value)
    return module

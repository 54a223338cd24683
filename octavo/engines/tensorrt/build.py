"""From a graph to a plan in small stages: typed graph, network, config, engine.

Both backends of the TensorRT family build through here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from octavo.core.errors import BuildError, InputError, UnsupportedError
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest, Profile
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.progress import BuildMonitor, run_build
from octavo.engines.tensorrt.timing_cache import attach_timing_cache, save_timing_cache
from octavo.export.onnx_model import input_specs, output_specs, save_onnx
from octavo.export.precision import to_float16

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["DTYPES", "PLAN", "build_artifact", "make_config", "parse_network", "typed_graph"]

PLAN = "model.plan"
"""The member of an engine file that holds what TensorRT built."""
WORKSPACE = 4 << 30
"""GPU memory that one layer may use while it runs, in bytes, so that a build leaves others some."""
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""Types of inputs and outputs that TensorRT has: its names -> numpy's."""


def build_artifact(
    api: TensorRTApi, request: BuildRequest, *, architecture: Sequence[str], device: str | None
) -> Artifact:
    """Builds an engine.

    Args:
        api: the library to build with.
        request: what to build.
        architecture: GPU architectures that it will run on; TensorRT for RTX builds for them ahead
            of time, TensorRT has to be on one.
        device: the GPU model that it is tied to, or None.

    Raises:
        UnsupportedError: TensorRT has no such quantization or type.
        InputError: an input with dynamic axes has no profile.
        BuildError: the graph or the build was refused; with every reason TensorRT gave.
    """
    model = typed_graph(request)
    for spec in (*input_specs(model), *output_specs(model)):
        if spec.dtype not in DTYPES.values():
            raise UnsupportedError(
                f"{spec.name!r} is {spec.dtype}, which {api.title} does not have; export the "
                "model with float32 or int64 there"
            )
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        path = save_onnx(model, Path(folder) / "model.onnx")
        builder = api.builder()
        network, _parser = parse_network(api, builder, path)
        _check_half(api, network, request.precision)
        config = make_config(api, builder, network, request, architecture)
        plan = _build(api, builder, network, config, request)
    return request.artifact(
        {PLAN: plan},
        model,
        backend=api.name,
        backend_version=api.version,
        architecture=tuple(architecture),
        device=device,
        profiles={name: (p.min, p.opt, p.max) for name, p in request.profiles.items()},
    )


def typed_graph(request: BuildRequest) -> ir.Model:
    """The graph with its precision inside, since strongly typed networks take it from there.

    Raises:
        InputError: an INT8 precision without a Q/DQ graph.
        UnsupportedError: activations that are not symmetric int8.
    """
    model = request.model
    if request.precision.startswith("int8"):
        if request.quantized is None:
            raise InputError(f"precision {request.precision} needs a Q/DQ graph; calibrate first")
        model = request.quantized.model
        _check_symmetric(model)
    if request.precision.endswith("float16"):
        model = to_float16(model, request.peaks)
    return model


def parse_network(
    api: TensorRTApi, builder: trt.Builder, path: Path
) -> tuple[trt.INetworkDefinition, trt.OnnxParser]:
    """Reads a graph into a strongly typed network.

    Args:
        api: the library.
        builder: that the network is for.
        path: of the typed graph, which has to stay until the engine is built.

    Returns:
        the network, and the parser that owns its weights, which has to live as long.

    Raises:
        BuildError: with every error of the parser.
    """
    network = api.network(builder)
    parser = api.parser(network)
    if parser.parse_from_file(str(path)):
        return network, parser
    reasons = []
    for error in map(parser.get_error, range(parser.num_errors)):
        where = " ".join(filter(None, (error.node_operator(), error.node_name())))
        reasons.append(f"{where}: {error.desc()}" if where else error.desc())
    raise BuildError(f"{api.title} cannot read the graph: {'; '.join(reasons) or api.log.take()}")


def make_config(
    api: TensorRTApi,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    request: BuildRequest,
    architecture: Sequence[str],
) -> trt.IBuilderConfig:
    """The settings of a build: targets, workspace, verbosity, profiles and timing cache.

    Raises:
        InputError: an input with dynamic axes has no profile.
        UnsupportedError: an input that TensorRT needs on the CPU.
        BuildError: TensorRT refuses a profile or a target.
    """
    config = builder.create_builder_config()
    api.configure(config, WORKSPACE)
    api.set_targets(config, architecture)
    dynamic = {}
    for tensor in map(network.get_input, range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            raise UnsupportedError(
                f"input {tensor.name!r} decides the shape of other tensors, which {api.title} "
                "would want on the CPU; export the model with that value fixed"
            )
        if -1 in shape:
            dynamic[tensor.name] = _profile(tensor.name, shape, request.profiles)
    if dynamic:
        profile = builder.create_optimization_profile()
        for name, shapes in dynamic.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{api.title} refuses the profiles: {api.log.take()}")
    if request.timing_cache is not None and api.has_timing_cache:
        attach_timing_cache(config, request.timing_cache)
    return config


def _profile(name: str, shape: tuple[int, ...], profiles: Mapping[str, Profile]) -> Profile:
    if name not in profiles:
        low = tuple(1 if axis < 0 else axis for axis in shape)
        high = tuple(8 if axis < 0 else axis for axis in shape)
        text = ", ".join("?" if axis < 0 else str(axis) for axis in shape)
        raise InputError(
            f"input {name!r} has shape [{text}], and an engine needs to know how long its dynamic "
            f"axes get; pass the smallest, usual and largest shape, as in "
            f"profiles={{{name!r}: ({low}, {high}, {high})}}"
        )
    return profiles[name]


def _build(
    api: TensorRTApi,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    request: BuildRequest,
) -> bytes:
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    api.log.take()  # errors of what came before are no reason for this one

    def run(monitor: BuildMonitor) -> bytes | None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread starts at device 0
        config.progress_monitor = api.monitor(monitor)
        memory = builder.build_serialized_network(network, config)
        return None if memory is None else bytes(memory)

    plan = run_build(f"Building with {api.title}", request.progress, run)
    if plan is None:
        raise BuildError(f"{api.title} could not build the engine: {api.log.take()}")
    if request.timing_cache is not None and api.has_timing_cache:
        save_timing_cache(config, request.timing_cache)
    return plan


def _check_symmetric(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        value = None if zero is None or zero.const_value is None else zero.const_value.numpy()
        if value is None or value.dtype != np.int8 or value.any():
            kind = "uint8" if value is None or value.dtype == np.uint8 else str(value.dtype)
            raise UnsupportedError(
                f"tensor {node.inputs[0].name if node.inputs[0] else ''!r} is quantized to {kind} "
                "with a zero point, and TensorRT's INT8 is symmetric; calibrate with dtype int8"
            )


def _check_half(api: TensorRTApi, network: trt.INetworkDefinition, precision: str) -> None:
    """Refuses a float16 request whose network computes nothing in float16."""
    if precision != "float16":
        return
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type.name not in ("CAST", "CONSTANT"):
            outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
            if any(output is not None and output.dtype.name == "HALF" for output in outputs):
                return
    raise BuildError(
        f"a float16 engine was asked for and no layer of the network that {api.title} read is "
        "float16; the model overflows float16 everywhere or has no float layers, so build with "
        "precision float32"
    )

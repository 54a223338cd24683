"""From a graph to a plan in small stages: typed graph, network, config, engine.

Both backends of the TensorRT family build through here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from octavo.core.errors import BuildError, InputError, UnsupportedError
from octavo.core.files import sha256_bytes
from octavo.core.results import TensorSpec
from octavo.engines.artifact import Artifact
from octavo.engines.backend import BuildRequest, Profile
from octavo.engines.tensorrt.api import TensorRTApi
from octavo.engines.tensorrt.progress import BuildMonitor, run_build
from octavo.engines.tensorrt.timing_cache import attach_timing_cache, save_timing_cache
from octavo.engines.tensorrt.types import Builder, BuilderConfig, Network, Parser
from octavo.export import onnx_model
from octavo.export.onnx_model import input_specs, output_specs, save_onnx, serialize, size_bytes
from octavo.export.precision import to_float16

__all__ = [
    "PLAN",
    "ParsedNetwork",
    "build_artifact",
    "layer_types",
    "make_config",
    "parse_network",
    "typed_graph",
]

PLAN = "model.plan"
"""The member of an engine file that holds what TensorRT built."""
WORKSPACE = 4 << 30
"""GPU memory that one layer may use while it runs, in bytes, so that a build leaves others some."""
DTYPES = frozenset({"float32", "float16", "int64", "int32", "int8", "uint8", "bool"})
"""Types of inputs and outputs that TensorRT has."""


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and the parser that owns its weights, which has to live as long."""

    network: Network
    parser: Parser


def build_artifact(
    api: TensorRTApi,
    request: BuildRequest,
    *,
    architecture: Sequence[str],
    device: str | None,
    targets: Sequence[str] = (),
) -> Artifact:
    """Builds an engine.

    Args:
        api: the library to build with.
        request: what to build.
        architecture: GPU architectures that it will run on.
        device: the GPU model that it is tied to, or None.
        targets: what to build ahead of time for; empty for this machine's GPU.

    Raises:
        UnsupportedError: TensorRT has no such quantization or type.
        InputError: an input with dynamic axes has no profile.
        BuildError: the graph or the build was refused; with every reason TensorRT gave.
    """
    model = typed_graph(request)
    inputs, outputs = input_specs(model), output_specs(model)
    _check_types(api, (*inputs, *outputs))
    with ExitStack() as scope:
        builder = api.builder()
        parsed = parse_network(api, builder, model, scope)
        _check_half(api, parsed.network, request.precision)
        config = make_config(api, builder, parsed.network, request, targets)
        plan = _build(api, builder, parsed.network, config, request)
    members = {PLAN: plan}
    if request.table is not None:
        members["table.json"] = request.table.encode()
    return Artifact.of(
        members,
        backend=api.name,
        backend_version=api.version,
        precision=request.precision,
        architecture=tuple(architecture),
        device=device,
        model=request.fingerprint,
        calibration=None if request.table is None else sha256_bytes(request.table.encode()),
        inputs=inputs,
        outputs=outputs,
        profiles={name: (p.min, p.opt, p.max) for name, p in request.profiles.items()},
        reasons=dict(request.quantized.reasons) if request.quantized else {},
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
    api: TensorRTApi, builder: Builder, model: ir.Model, scope: ExitStack
) -> ParsedNetwork:
    """Reads a graph into a strongly typed network.

    Args:
        api: the library.
        builder: that the network is for.
        model: the typed graph; weights over 2 GiB go through a file.
        scope: keeps that file until the engine is built.

    Raises:
        BuildError: with every error of the parser.
    """
    network = api.network(builder)
    parser = api.parser(network)
    if size_bytes(model) <= onnx_model.PROTOBUF_LIMIT:
        accepted = parser.parse(serialize(model))
    else:
        folder = scope.enter_context(tempfile.TemporaryDirectory(prefix="octavo-"))
        accepted = parser.parse_from_file(str(save_onnx(model, Path(folder) / "model.onnx")))
    if not accepted:
        raise BuildError(f"{api.title} cannot read the graph: {_parser_errors(api, parser)}")
    return ParsedNetwork(network, parser)


def layer_types(network: Network) -> Counter[str]:
    """Number of layers of each type ("CONVOLUTION", "QUANTIZE", ...) before TensorRT fuses them."""
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def make_config(
    api: TensorRTApi,
    builder: Builder,
    network: Network,
    request: BuildRequest,
    targets: Sequence[str],
) -> BuilderConfig:
    """The settings of a build: targets, workspace, verbosity, profiles and timing cache.

    Raises:
        InputError: an input with dynamic axes has no profile.
        UnsupportedError: an input that TensorRT needs on the CPU.
        BuildError: TensorRT refuses a profile or a target.
    """
    config = builder.create_builder_config()
    api.configure(config, WORKSPACE)
    api.set_targets(config, targets)
    _add_profile(api, builder, network, config, request.profiles)
    if request.timing_cache is not None and api.has_timing_cache:
        attach_timing_cache(config, request.timing_cache)
    return config


def _add_profile(
    api: TensorRTApi,
    builder: Builder,
    network: Network,
    config: BuilderConfig,
    profiles: Mapping[str, Profile],
) -> None:
    dynamic = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            raise UnsupportedError(
                f"input {tensor.name!r} decides the shape of other tensors, which {api.title} "
                "would want on the CPU; export the model with that value fixed"
            )
        if -1 in shape:
            dynamic[tensor.name] = _profile(tensor.name, shape, profiles)
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in dynamic.items():
        profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{api.title} refuses the profiles: {api.log.take()}")


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
    builder: Builder,
    network: Network,
    config: BuilderConfig,
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

    plan, _ = run_build(f"Building with {api.title}", request.progress, run)
    if plan is None:
        raise BuildError(f"{api.title} could not build the engine: {api.log.take()}")
    if request.timing_cache is not None and api.has_timing_cache:
        save_timing_cache(config, request.timing_cache)
    return plan


def _parser_errors(api: TensorRTApi, parser: Parser) -> str:
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = " ".join(filter(None, (error.node_operator(), error.node_name())))
        reasons.append(f"{where}: {error.desc()}" if where else error.desc())
    return "; ".join(reasons) or api.log.take()


def _check_types(api: TensorRTApi, specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise UnsupportedError(
                f"{spec.name!r} is {spec.dtype}, which {api.title} does not have; export the "
                "model with float32 or int64 there"
            )


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


def _check_half(api: TensorRTApi, network: Network, precision: str) -> None:
    """Refuses a float16 request whose network computes nothing in float16."""
    if precision != "float16":
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name not in ("CAST", "CONSTANT"):
            outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
            if any(output is not None and output.dtype.name == "HALF" for output in outputs):
                return
    raise BuildError(
        f"a float16 engine was asked for and no layer of the network that {api.title} read is "
        "float16; the model overflows float16 everywhere or has no float layers, so build with "
        "precision float32"
    )

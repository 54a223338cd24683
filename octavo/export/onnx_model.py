"""Reading, checking, identifying and writing ONNX models (as onnx_ir graphs)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir import passes
from onnx_ir.passes import common

from octavo.core.errors import ArtifactError, ExportError, first_line
from octavo.core.files import atomic_path
from octavo.core.results import TensorSpec

__all__ = [
    "extract_model",
    "fingerprint",
    "input_specs",
    "load_onnx",
    "output_specs",
    "prepare",
    "save_onnx",
    "serialize",
    "size_bytes",
]

TARGET_OPSET = 20
"""Old models are lifted to this: Q/DQ with float16 scales need 19, TensorRT 10 reads 20."""
MINIMUM_OPSET = 13
MINIMUM_IR = 9
"""The IR version of opset 20; since version 4 weights need not be listed as inputs."""
PROTOBUF_LIMIT = 2**31 - 2**20
"""Protobuf cannot hold 2 GiB; larger models keep their weights in a file beside the graph."""

TRANSPOSED = ".T"
"""Ends the name of a weight that was transposed when constants were folded."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of torch's exporter: the path of the module that a node comes from."""


def load_onnx(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> ir.Model:
    """Reads an ONNX model and makes it ready for quantization (see `prepare`).

    Args:
        source: a path (external data beside it is found), a ModelProto or an onnx_ir model, which
            is left as it is.

    Raises:
        ArtifactError: there is no such file, or it is not a valid ONNX model.
        ExportError: the model cannot be lifted to an opset that has Q/DQ.
    """
    if isinstance(source, ir.Model):
        return prepare(source.clone())
    if isinstance(source, onnx.ModelProto):
        return prepare(ir.from_proto(source))
    path = Path(source)
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}; give the path of an .onnx model")
    try:
        model = ir.load(path)
        nodes = len(model.graph)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a broken file
        raise ArtifactError(f"{path} is not a readable ONNX model: {first_line(error)}") from error
    if not nodes:
        raise ArtifactError(f"{path} holds no nodes; it is empty or not an ONNX model")
    return prepare(model)


def prepare(model: ir.Model) -> ir.Model:
    """Simplifies a model in place as engines do anyway, and returns it.

    Functions are inlined, constants folded, BatchNormalization and Pad folded into convolutions,
    the opset lifted to 20 where it is older, nodes given unique names, and metadata of the
    exporter (which holds paths of the machine it ran on) removed, but for module scopes. Weights
    that are listed as inputs too, as old exporters do, become constants.

    Raises:
        ArtifactError: a node breaks ONNX's rules, or reads a tensor that nothing makes.
        ExportError: the opset is too old to be lifted.
    """
    from onnxscript import optimizer, rewriter

    _check_nodes(model)
    model = _lift_opset(model)
    graph = model.graph
    graph.inputs[:] = [value for value in graph.inputs if value.name not in graph.initializers]
    outputs = [value.name for value in graph.outputs]
    _name_transposed(graph)
    unlimited = 2**40  # fold transposed weights of any size, so that layers see plain constants
    try:
        optimizer.optimize(model, input_size_limit=unlimited, output_size_limit=unlimited)
        rewriter.rewrite(model)
    except Exception as error:  # the simplifier raises whatever its rules raise
        raise ExportError(
            f"the model could not be simplified: {first_line(error)}; check it with onnx.checker"
        ) from error
    passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    taken = {value.name for value in graph.inputs}
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name if name not in taken else value.name
    _strip_metadata(model)
    _name_nodes(model.graph)
    return model


def fingerprint(model: ir.Model) -> str:
    """SHA-256 of what a model computes: operators, attributes, tensor names, shapes and weights.

    Names of nodes, metadata and the producer's version do not count.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update("\x1f".join(map(str, parts)).encode() + b"\x1e")

    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        add("io", value.name, value.dtype, value.shape)
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        if tensor is None:
            continue
        add("init", name, tensor.dtype, list(tensor.shape))
        digest.update(tensor.tobytes())
    for node in graph:
        names = [value.name if value else "" for value in node.inputs]
        add("node", node.domain, node.op_type, names, [value.name for value in node.outputs])
        for key in sorted(node.attributes):
            add("attr", key, ir.serde.serialize_attribute(node.attributes[key]))
    return digest.hexdigest()


def serialize(model: ir.Model) -> bytes:
    """The model as one protobuf message, weights inside.

    Raises:
        ExportError: the model exceeds the 2 GiB that protobuf can hold; use `save_onnx`.
    """
    if size_bytes(model) > PROTOBUF_LIMIT:
        raise ExportError(
            f"the model has {size_bytes(model):,} bytes of weights, more than one protobuf file "
            "can hold; save it with external data"
        )
    values = model.graph.initializers.values()
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in values):
        model = ir.external_data.load_to_model(model.clone())
    message: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return message


def save_onnx(model: ir.Model, path: str | os.PathLike[str]) -> Path:
    """Writes a model in one step; weights over 2 GiB go to `<path>.data` beside it."""
    target = Path(path)
    if size_bytes(model) <= PROTOBUF_LIMIT:
        with atomic_path(target) as temporary:
            temporary.write_bytes(serialize(model))
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        data = f"{target.name}.data"
        ir.save(model, Path(folder) / target.name, external_data=data)
        (Path(folder) / data).replace(target.parent / data)
        (Path(folder) / target.name).replace(target)
    return target


def size_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a model."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The inputs that a caller has to give."""
    weights = model.graph.initializers
    return tuple(_spec(value) for value in model.graph.inputs if value.name not in weights)


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """The outputs."""
    return tuple(_spec(value) for value in model.graph.outputs)


def extract_model(model: ir.Model, inputs: Sequence[str], outputs: Iterable[str]) -> ir.Model:
    """The part of a model that computes `outputs` from `inputs` (tensor names).

    The parts share weights with the original, which is not changed.
    """
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    return ir.Model(graph, ir_version=model.ir_version)


def module_of(weight: str) -> str | None:
    """Name of the module that holds a weight; None for a weight that no module holds as such."""
    name, _, leaf = weight.removesuffix(TRANSPOSED).rpartition(".")
    return name if leaf == "weight" else None


def node_scopes(node: ir.Node) -> list[str]:
    """Paths of the modules that a node lies in, outermost first; empty if not known."""
    import ast

    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    known = isinstance(scopes, list) and all(isinstance(scope, str) for scope in scopes)
    return scopes[:-1] if known else []  # the last one is the node itself


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise ExportError(
            f"the shape or type of {value.name!r} is not known; run onnx.shape_inference first"
        )
    axes: list[int | str | None] = [
        axis if isinstance(axis, int) else axis.value for axis in value.shape
    ]
    # nothing says that unknown axes are equal, but the first one is the batch
    unknown = ["axis0", *(f"{value.name}.axis{index}" for index in range(1, len(axes)))]
    shape = tuple(name if axis is None else axis for axis, name in zip(axes, unknown, strict=False))
    return TensorSpec(value.name or "", shape, str(value.dtype.numpy()))


def _check_nodes(model: ir.Model) -> None:
    """Refuses nodes that break ONNX's rules, before they make anything else stumble.

    onnx.checker's check of the whole model would also refuse what engines accept, such as outputs
    without a shape.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version or MINIMUM_IR
    context.opset_imports = dict(model.opset_imports)
    graph = model.graph
    known = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for output in graph.outputs:
        if output.producer() is None and id(output) not in known:
            raise ArtifactError(
                f"the ONNX model is broken: its output {output.name!r} is made by nothing; export "
                "it again"
            )
    for node in graph:
        label = f"node {node.name or node.op_type!r}"
        for value in node.inputs:
            if value is not None and value.producer() is None and id(value) not in known:
                raise ArtifactError(
                    f"the ONNX model is broken: {label} reads {value.name!r}, which nothing makes; "
                    "export it again"
                )
        if any(value.type == ir.AttributeType.GRAPH for value in node.attributes.values()):
            continue  # its inner nodes read tensors of this graph, which the checker does not know
        try:
            onnx.checker.check_node(ir.to_proto(node), context)
        except onnx.checker.ValidationError as error:
            raise ArtifactError(
                f"the ONNX model is broken at {label}: {first_line(error)}; export it again"
            ) from error


def _lift_opset(model: ir.Model) -> ir.Model:
    version = model.opset_imports.get("", 0)
    if version >= TARGET_OPSET - 1:
        return model
    common.InlinePass()(model)  # the converter drops functions, external data and metadata
    try:
        proto = ir.to_proto(ir.external_data.load_to_model(model))
        lifted = ir.from_proto(onnx.version_converter.convert_version(proto, TARGET_OPSET))
        lifted.ir_version = max(model.ir_version or 0, MINIMUM_IR)
        _copy_scopes(model.graph, lifted.graph)
        return lifted
    except Exception as error:  # the converter raises RuntimeError and more
        if version >= MINIMUM_OPSET:
            return model
        raise ExportError(
            f"opset {version} has no per-channel QuantizeLinear and could not be lifted to "
            f"{TARGET_OPSET}: {first_line(error)}; export the model with opset 17 or newer"
        ) from error


def _copy_scopes(source: ir.Graph, target: ir.Graph) -> None:
    """Gives nodes the module scopes of the nodes that make the same tensors."""
    scopes = {node.outputs[0].name: node.metadata_props.get(SCOPES) for node in source}
    for node in target:
        if text := scopes.get(node.outputs[0].name):
            node.metadata_props[SCOPES] = text


def _name_transposed(graph: ir.Graph) -> None:
    """Names what folding will make a constant after the weight that it comes from."""
    for node in graph:
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer():
            continue
        alone = sum(user.op_type == "Transpose" for user, _ in source.uses()) == 1
        if alone and not node.outputs[0].is_graph_output():
            node.outputs[0].name = f"{source.name}{TRANSPOSED}"


def _strip_metadata(model: ir.Model) -> None:
    graph = model.graph
    described: list[Any] = [model, graph, *graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        described += [node, *node.outputs]
    for one in described:
        kept = {key: text for key, text in one.metadata_props.items() if key == SCOPES}
        one.metadata_props.clear()
        one.metadata_props.update(kept)
        one.doc_string = None


def _name_nodes(graph: ir.Graph) -> None:
    """Names each node after its first output, which is unique and stays when others change."""
    for node in graph:
        node.name = f"{node.op_type}:{next(value.name for value in node.outputs if value.name)}"

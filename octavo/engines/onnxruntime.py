"""Backend `onnxruntime`: the embedded default, on every CPU.

The engine file holds the portable Q/DQ graph. It is brought into the form that this processor's
kernels are fast and exact in when it is opened, so one file serves every processor.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from octavo.core.errors import ArtifactError, UnsupportedError
from octavo.core.machine import package_version
from octavo.core.results import LayerInfo, LayerReport
from octavo.engines.artifact import Artifact
from octavo.engines.backend import DEFAULT_OPTIONS, BuildRequest, RunOptions
from octavo.engines.engine import check_any_int8
from octavo.export.onnx_model import PROTOBUF_LIMIT, save_onnx, serialize, size_bytes
from octavo.export.onnxruntime_form import lower_for_onnxruntime
from octavo.export.onnxruntime_session import kernel_dtypes, make_session
from octavo.export.placement import ACTIVATIONS
from octavo.export.precision import to_float16

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeRunner", "backend"]

MODEL = "model.onnx"
DATA = "model.onnx.data"

REFORMATS = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Gather", "Identity", "QuantizeLinear"}
    | {"ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
HEAVY = frozenset({"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul"}) | frozenset(
    {"Gemm", "MatMul", "NhwcFusedConv"}
)


class OnnxRuntimeBackend:
    """Builds and opens engines for ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    activations = "uint8"

    def missing(self) -> str:
        """Nothing: ONNX Runtime is a dependency of Octavo."""
        return ""

    def version(self) -> str:
        """Version of ONNX Runtime."""
        return package_version("onnxruntime") or "unknown"

    def check(self, precision: str, targets: Sequence[str]) -> None:
        """See `Backend`."""
        if targets:
            raise UnsupportedError(
                f"target {targets[0]!r} was given, and backend onnxruntime runs on any CPU; leave "
                "the target out, or choose backend tensorrt-rtx"
            )
        if precision == "int8+float16":
            raise UnsupportedError(
                "precision int8+float16 was asked for, and ONNX Runtime computes float16 in "
                "float32 on a CPU, so it would only be slower; use precision int8"
            )

    def environment(self, targets: Sequence[str]) -> Mapping[str, str]:
        """The file is portable, so it depends on nothing else."""
        self.check("float32", targets)
        return {"architecture": "cpu"}

    def build(self, request: BuildRequest) -> Artifact:
        """See `Backend`."""
        self.check(request.precision, request.targets)
        model = request.quantized.model if request.quantized else request.model
        if request.precision == "float16":
            model = to_float16(model, request.peaks)
        artifact = request.artifact(
            _members(model), model, backend=self.name, backend_version=self.version()
        )
        if request.quantized:
            runner = self.open(artifact)
            check_any_int8(runner.layers())
            runner.close()
        return artifact

    def open(self, artifact: Artifact, options: RunOptions = DEFAULT_OPTIONS) -> OnnxRuntimeRunner:
        """See `Backend`."""
        if options != DEFAULT_OPTIONS:
            raise UnsupportedError(
                "backend onnxruntime runs on the CPU and has neither runners to choose from nor "
                "CUDA graphs; leave runner and cuda_graph out"
            )
        return OnnxRuntimeRunner(artifact)


class OnnxRuntimeRunner:
    """Runs an engine in this process."""

    takes_torch = False

    def __init__(self, artifact: Artifact) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._manifest = artifact.manifest
        self._quantized = artifact.manifest.precision.startswith("int8")
        model = self._load(artifact)
        reasons = artifact.manifest.reasons
        if self._quantized:
            lowered = lower_for_onnxruntime(model, kernel_dtypes())
            model = lowered.model
            reasons = {**reasons, **lowered.float_layers}
        self._reasons = _by_output(model, reasons)
        self.model = model
        self._session: Any = make_session(self._source())
        self._outputs = [spec.name for spec in artifact.manifest.outputs]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `Runner`."""
        values = self._session.run(self._outputs, dict(feeds))
        return dict(zip(self._outputs, values, strict=True))

    def layers(self) -> LayerReport:
        """Reads the graph back that ONNX Runtime made of the model after all its rewriting."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            make_session(self._source(), optimized_path=path)
            graph = onnx.load(path, load_external_data=False).graph
        return LayerReport(tuple(_describe(graph, self._reasons, self._quantized)))

    def close(self) -> None:
        """See `Runner`."""
        self._session = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _load(self, artifact: Artifact) -> ir.Model:
        if DATA not in artifact.members:
            try:
                proto = onnx.ModelProto.FromString(artifact.members[MODEL])
                model: ir.Model = ir.from_proto(proto)
            except Exception as error:  # a missing member, and what protobuf and onnx_ir raise
                raise ArtifactError(
                    f"the engine file holds no readable {MODEL} ({type(error).__name__}); build "
                    "it again"
                ) from error
            return model
        folder = self._scratch()
        for name in (MODEL, DATA):
            (folder / name).write_bytes(artifact.members[name])
        return ir.load(folder / MODEL)

    def _source(self) -> bytes | Path:
        """The lowered graph as ONNX Runtime takes it: bytes, or a file for weights over 2 GB."""
        if size_bytes(self.model) <= PROTOBUF_LIMIT:
            return serialize(self.model)
        return save_onnx(self.model, self._scratch() / "lowered.onnx")

    def _scratch(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="octavo-")
        return Path(self._folder.name)


def _members(model: ir.Model) -> dict[str, bytes]:
    if size_bytes(model) <= PROTOBUF_LIMIT:
        return {MODEL: serialize(model)}
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:
        path = save_onnx(model, Path(folder) / MODEL)
        return {MODEL: path.read_bytes(), DATA: path.with_name(DATA).read_bytes()}


def _describe(
    graph: onnx.GraphProto, reasons: Mapping[str, str], quantized: bool
) -> list[LayerInfo]:
    """One entry per node; a node computes in 8 bits where its tensors are 8 bits wide."""
    narrow: set[str] = set()
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    layers = []
    for node in graph.node:
        eight = _computes_int8(node, narrow)
        if eight or node.op_type == "QuantizeLinear":
            narrow.update(_narrow_outputs(node))
        sixteen = any(kinds.get(name) == onnx.TensorProto.FLOAT16 for name in node.output)
        kind = "reformat" if node.op_type in REFORMATS else "compute"
        precision = "int8" if eight else "float16" if sixteen else "float32"
        reason = ""
        if quantized and kind == "compute" and not eight:
            reason = _reason(node, reasons)
        layers.append(LayerInfo(node.name, node.op_type, precision, kind, reason))
    return layers


def _computes_int8(node: onnx.NodeProto, narrow: set[str]) -> bool:
    if node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger")):
        return True
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    return bool(node.input) and node.input[0] in narrow


def _narrow_outputs(node: onnx.NodeProto) -> Sequence[str]:
    """Outputs of 8 bits: all of an integer node's, but those of kernels that end in float."""
    floats = node.op_type in ("MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
    # QGemm ends in float where its output's scale and zero point (inputs 7 and 8) are left out
    floats = floats or (node.op_type == "QGemm" and len(node.input) < 8)
    return () if floats else node.output


def _by_output(model: ir.Model, reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons by every name that ONNX Runtime may give a layer.

    It fuses a layer with the activation after it, and calls the result after either's node or
    output.
    """
    found = dict(reasons)
    for node in model.graph:
        reason = reasons.get(node.name or "")
        if reason is None:
            continue
        while node is not None:
            found.update({node.name or "": reason, node.outputs[0].name or "": reason})
            users = [user for user, _ in node.outputs[0].uses()]
            follows = len(users) == 1 and users[0].op_type in ACTIVATIONS
            if not follows:
                break
            node = users[0]
    return found


def _reason(node: onnx.NodeProto, reasons: Mapping[str, str]) -> str:
    for name in (node.name, *node.output):
        # names of rewritten nodes end in what the rewriting was
        plain = re.sub(r"(_nchwc|_token_\d+)+$", "", name)
        if plain in reasons:
            return reasons[plain]
    if node.op_type in HEAVY:
        return "ONNX Runtime did not take its INT8 kernel although its inputs are quantized"
    return f"{node.op_type} stays in float"


backend = OnnxRuntimeBackend()

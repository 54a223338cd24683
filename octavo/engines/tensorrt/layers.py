"""What TensorRT's engine inspector says about each layer, as a report.

TensorRT 10 writes a tensor's layout and type as one text ("Format/Datatype"), 11 as two. Layers
that its graph compiler made have types such as "kgen" (a generated kernel), "correlation" (a
convolution) and "gemm", and name the nodes of the ONNX graph only in their metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from octavo.core.errors import BuildError
from octavo.core.results import LayerInfo, LayerReport

__all__ = ["parse_layers"]

HEAVY_TYPES = re.compile(r"conv|correlation|gemm|matrix_?mul|matmul|fully_?connected|mha", re.I)
HEAVY_OPS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
IDLE_TYPES = frozenset({"constant", "noop", "shape_call", "signal", "wait"})
"""Layers that launch no kernel; they are left out."""
MOVE_TYPES = frozenset(
    {"cast", "concatenation", "copy", "dequantize", "identity", "memset", "padding", "quantize"}
    | {"reformat", "shuffle", "slice", "squeeze", "transpose", "unsqueeze"}
)
MOVE_OPS = frozenset(
    {"Cast", "Concat", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Identity", "Pad"}
    | {"QuantizeLinear", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
KERNEL_MOVES = frozenset({"Cast", "Conc", "Copy", "Move", "Pad", "Repl", "Resh", "Slic", "Tran"})
"""What a generated kernel's name says of kernels that only move data ("__myl_Move_myl0_1")."""

DTYPES: Sequence[tuple[str, re.Pattern[str]]] = tuple(
    (name, re.compile(rf"\b(?:{pattern})\b", re.I))
    for name, pattern in (
        ("bfloat16", "bfloat16|bf16"),
        ("float16", "half|fp16|float16"),
        ("float8", "fp8|float8\\w*"),
        ("float4", "fp4|float4\\w*"),
        ("uint8", "uint8"),
        ("int8", "int8"),
        ("int4", "int4"),
        ("int32", "int32"),
        ("int64", "int64"),
        ("bool", "bool"),
        ("float32", "float|fp32|float32"),
    )
)
FLOATS = ("float32", "bfloat16", "float16", "float8")
"""Float types, widest first."""
TACTICS: Sequence[tuple[str, re.Pattern[str]]] = (
    ("int8", re.compile(r"(?:^|_)(?:i8|s8)(?:i8|s8|i32|s32|f16|f32)|_imma|int8", re.I)),
    ("float16", re.compile(r"(?:^|_)(?:f16|h16816|h1688)|fp16|_hmma", re.I)),
    ("float32", re.compile(r"(?:^|_)(?:tf32|f32)|fp32|sgemm", re.I)),
)
"""Types of inputs as the names of kernels spell them ("..._i8f32_i8i32_f32_...")."""


def parse_layers(text: str, reasons: Mapping[str, str], *, quantized: bool) -> LayerReport:
    """Reads what the inspector wrote as JSON.

    Convolutions and matrix products have the precision of their first input; other layers that of
    the widest float they read. Layers without a kernel are left out.

    Args:
        text: of `get_engine_information`.
        reasons: name of an ONNX node that was not quantized -> why not.
        quantized: whether layers that do not run in INT8 need a reason.

    Raises:
        BuildError: the text is not what an inspector writes.
    """
    try:
        # metadata holds control characters, which strict JSON does not allow
        layers = json.loads(text, strict=False)["Layers"]
        found = [_Layer(item) for item in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(
            f"TensorRT's engine inspector wrote something else than layers ({error}); this "
            "version of it is not supported"
        ) from error
    claimed = {node for layer in found if layer.heavy for node in layer.nodes if _heavy(node)}
    report = []
    for layer in found:
        if layer.kind_of_type == "idle":
            continue
        rest = [node for node in layer.nodes if layer.heavy or node not in claimed]
        moves = layer.moves(rest)
        kind = "reformat" if moves else "compute"
        precision = layer.precision(any(map(_heavy, rest)), moves)
        reason = ""
        if quantized and not moves and precision != "int8":
            reason = _reason(layer, reasons) or f"TensorRT chose {precision} for it"
        report.append(LayerInfo(layer.name, layer.op(rest), precision, kind, reason))
    return LayerReport(tuple(report))


class _Layer:
    """One entry of the inspector; a mere name where the engine was built without details."""

    def __init__(self, item: Any) -> None:
        fields: Mapping[str, Any] = {"Name": item} if isinstance(item, str) else item
        self.name = str(fields["Name"])
        self.type = str(fields.get("LayerType") or fields.get("ParameterType") or "")
        self.inputs = [_dtype(tensor) for tensor in fields.get("Inputs") or ()]
        self.outputs = [_dtype(tensor) for tensor in fields.get("Outputs") or ()]
        self.tactic = str(fields.get("TacticName") or "")
        weights = fields.get("Weights")
        stated = weights.get("Type") if isinstance(weights, Mapping) else None
        self.stated = _named(str(fields.get("Precision") or stated or ""))
        self.nodes = _nodes(str(fields.get("Metadata") or ""), self.name)
        self.heavy = bool(HEAVY_TYPES.search(self.type))

    @property
    def kind_of_type(self) -> str:
        """What the layer's type alone says: "idle", "move" or "compute"."""
        kind = self.type.lower()
        return "idle" if kind in IDLE_TYPES else "move" if kind in MOVE_TYPES else "compute"

    def moves(self, rest: Sequence[str]) -> bool:
        """Whether the layer only converts or moves data; `rest` are the nodes it computes."""
        if self.heavy or self.kind_of_type == "move":
            return not self.heavy
        if self.nodes:
            return all(_op(node) in MOVE_OPS for node in rest)
        kernel = re.match(r"__myl_([A-Za-z0-9]+?)_myl", self.name)
        parts = re.findall(r"[A-Z][a-z0-9]*", kernel.group(1)) if kernel else []
        return bool(parts) and set(parts) <= KERNEL_MOVES

    def precision(self, heavy: bool, moves: bool) -> str:
        """What the layer computes in; what it writes, where it only moves data."""
        if moves:
            return next(iter([*filter(None, self.outputs), *filter(None, self.inputs)]), "unknown")
        kernel = next((name for name, pattern in TACTICS if pattern.search(self.tactic)), "")
        if self.heavy or heavy:
            first = self.inputs[0] if self.inputs else ""
            return "int8" if kernel == "int8" else first or kernel or self.stated or "unknown"
        read = next((name for name in FLOATS if name in self.inputs), "")
        known = [*filter(None, self.inputs), *filter(None, self.outputs), kernel, self.stated]
        return read or next(filter(None, known), "unknown")

    def op(self, rest: Sequence[str]) -> str:
        """The ONNX operator that matters most in it, or TensorRT's type of layer."""
        ops = [_op(node) for node in rest]
        matter = [op for op in ops if op in HEAVY_OPS] or [op for op in ops if op not in MOVE_OPS]
        return next(iter(matter or ops), self.type or "unknown")


def _nodes(metadata: str, name: str) -> tuple[str, ...]:
    """Names of the ONNX nodes in a layer: from its metadata, else from its name."""
    found = re.findall(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s\[]|$)", metadata)
    if not found:
        bare = re.sub(r"_myl\d+(?:_\d+)?$", "", name)
        found = [part for part in bare.split(" + ") if re.match(r"[A-Za-z]+:", part)]
    return tuple(dict.fromkeys(found))


def _op(node: str) -> str:
    """The operator of a node; nodes are called "Conv:<output>"."""
    return node.split(":", 1)[0] if ":" in node else ""


def _heavy(node: str) -> bool:
    return _op(node) in HEAVY_OPS


def _dtype(tensor: Any) -> str:
    fields = {str(key).lower(): value for key, value in tensor.items()}
    for key in ("datatype", "format/datatype"):
        if key in fields:
            return _named(str(fields[key]))
    return ""


def _named(text: str) -> str:
    return next((name for name, pattern in DTYPES if pattern.search(text)), "")


def _reason(layer: _Layer, reasons: Mapping[str, str]) -> str:
    names: Iterable[str] = (*layer.nodes, layer.name)
    return next((reasons[name] for name in names if name in reasons), "")

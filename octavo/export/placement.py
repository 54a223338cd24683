"""Where Q/DQ pairs go: which tensors of a graph are quantized, which layers then run in INT8.

The rules follow explicit quantization in TensorRT: pairs on the inputs of convolutions and matrix
products and on both inputs of a residual Add that lies between such layers; none between a
convolution and its activation; one pair a tensor; max pooling, concatenation and layers that only
move data keep the scale of their inputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from octavo.core.errors import InputError
from octavo.export.editing import is_constant, optional
from octavo.export.pooling import over_pictures

__all__ = ["Placement", "QuantizedLayer", "place"]

COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset(
    {"Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Sigmoid"}
    | {"Softplus", "Swish", "Tanh"}
)
MOVES_DATA = frozenset(
    {"DepthToSpace", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


@dataclass(frozen=True)
class QuantizedLayer:
    """A node that can run in INT8.

    Attributes:
        name: the node's name.
        op: its operator.
        output: name of its output tensor.
        activations: tensors that must be quantized for it.
        weight: its constant weight, or None (Add, MatMul of two activations).
        weight_axis: the weight's output-channel axis; None for one scale for the whole weight.
        bias: the constant added to its result, or None.
    """

    name: str
    op: str
    output: str
    activations: tuple[str, ...]
    weight: str | None = None
    weight_axis: int | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Placement:
    """What can be quantized in a graph, and what cannot and why.

    Attributes:
        layers: nodes that can run in INT8, in execution order.
        tensors: tensors that get a Q/DQ pair -> names of the nodes that read the pair.
        groups: sets of tensors that must share one scale.
        reasons: name of a node that could have been quantized -> why it is not.
    """

    layers: tuple[QuantizedLayer, ...]
    tensors: Mapping[str, tuple[str, ...]]
    groups: tuple[tuple[str, ...], ...]
    reasons: Mapping[str, str]


def place(model: ir.Model, exclude: Sequence[str] = ()) -> Placement:
    """Finds what can be quantized.

    Args:
        model: a prepared graph (see `octavo.export.load_onnx`).
        exclude: patterns (`*` and `?`) of nodes to keep in float; each is compared with the
            node's name, its output's name and its weight's name.

    Raises:
        InputError: a pattern that matches nothing.
    """
    return _Placer(model, exclude).run()


class _Placer:
    def __init__(self, model: ir.Model, exclude: Sequence[str]) -> None:
        self.nodes = list(model.graph)
        self.exclude = tuple(exclude)
        self.unmatched = set(self.exclude)
        self.layers: dict[str, QuantizedLayer] = {}
        self.reasons: dict[str, str] = {}
        self.quantized: dict[str, ir.Value] = {}
        self.sharing: dict[str, set[str]] = {}

    def run(self) -> Placement:
        excluded = {node.name or "" for node in self.nodes if self._excluded(node)}
        if self.unmatched:
            raise InputError(
                f"nothing is called {sorted(self.unmatched)[0]!r}; `octavo inspect` lists the names"
            )
        for node in self.nodes:
            if node.op_type in COMPUTE:
                self._compute(node, excluded)
        for node in self.nodes:
            if node.op_type == "Add" and node.name not in excluded:
                self._residual(node)
        for node in self.nodes:
            if node.op_type not in AVERAGES or node.name in excluded:
                continue
            source = node.inputs[0]
            pictures = node.op_type != "ReduceMean" or over_pictures(node)
            if pictures and source is not None and self._from_int8(source):
                self._require(source)
        self._share_scales()
        order = {node.name or "": index for index, node in enumerate(self.nodes)}
        made = {value.name: order[node.name or ""] for node in self.nodes for value in node.outputs}
        tensors = sorted(self.quantized, key=lambda name: made.get(name, -1))
        shared = [self.sharing.get(name, {name}) for name in tensors]
        groups = dict.fromkeys(
            tuple(name for name in tensors if name in names) for names in shared if len(names) > 1
        )
        return Placement(
            layers=tuple(sorted(self.layers.values(), key=lambda layer: order[layer.name])),
            tensors={name: self._readers(self.quantized[name]) for name in tensors},
            groups=tuple(groups),
            reasons=self.reasons,
        )

    def _excluded(self, node: ir.Node) -> bool:
        names = {node.name or "", *(value.name or "" for value in node.outputs)}
        names |= {value.name or "" for value in node.inputs if value and value.is_initializer()}
        hit = False
        for pattern in self.exclude:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self.unmatched.discard(pattern)
                hit = True
        return hit

    def _compute(self, node: ir.Node, excluded: Iterable[str]) -> None:
        name = node.name or ""
        layer = "excluded by the caller" if name in excluded else _LAYERS[node.op_type](node)
        if isinstance(layer, str):
            self.reasons[name] = layer
            return
        self.layers[name] = layer
        for value in node.inputs:
            if value is not None and value.name in layer.activations:
                self._require(value)

    def _residual(self, node: ir.Node) -> None:
        left, right = node.inputs
        if left is None or right is None or not (_is_float(left) and _is_float(right)):
            return
        if is_constant(left) or is_constant(right):
            return
        if left.shape is not None and right.shape is not None and left.shape != right.shape:
            return
        if not (self._from_int8(left) and self._from_int8(right)):
            return
        if not _reaches(node.outputs[0], lambda user: user.name in self.layers):
            return
        name = node.name or ""
        names = tuple(dict.fromkeys((left.name or "", right.name or "")))
        self.layers[name] = QuantizedLayer(name, "Add", node.outputs[0].name or "", names)
        self._require(left)
        self._require(right)

    def _from_int8(self, value: ir.Value) -> bool:
        """Whether the value comes out of a quantized layer, through activations and moves."""
        node = value.producer()
        while node is not None:
            if node.name in self.layers:
                return True
            if node.op_type not in ACTIVATIONS | MOVES_DATA or node.inputs[0] is None:
                return False
            node = node.inputs[0].producer()
        return False

    def _require(self, value: ir.Value) -> None:
        self.quantized.setdefault(value.name or "", value)

    def _share_scales(self) -> None:
        """Carries pairs backwards through layers that only move data; both ends share a scale."""
        for node in reversed(self.nodes):
            if node.op_type not in MOVES_DATA and node.op_type != "Concat":
                continue
            outputs = [value for value in node.outputs if value.name in self.quantized]
            inputs = list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])
            sources = [value for value in inputs if value is not None]
            if not outputs or not all(_is_float(v) and not is_constant(v) for v in sources):
                continue
            for value in (*sources, *filter(_is_float, node.outputs)):  # MaxPool also gives indices
                self._require(value)
                self._share(value.name or "", outputs[0].name or "")

    def _share(self, left: str, right: str) -> None:
        one, two = (self.sharing.setdefault(name, {name}) for name in (left, right))
        self.sharing.update(dict.fromkeys(one | two, one))
        one |= two

    def _readers(self, value: ir.Value) -> tuple[str, ...]:
        """Which nodes read the pair instead of the float tensor.

        All of them where an INT8 layer makes the tensor (else it would have to write both forms);
        where a float layer makes it, the float readers, such as a residual path, keep full
        precision.
        """
        everyone = self._from_int8(value)
        names = []
        for user, _ in value.uses():
            name = user.name or ""
            moves = user.op_type in MOVES_DATA or user.op_type == "Concat"
            carried = moves and any(out.name in self.quantized for out in user.outputs)
            takes = name in self.layers and value.name in self.layers[name].activations
            if everyone or takes or carried:
                names.append(name)
        return tuple(dict.fromkeys(names))


def _convolution(node: ir.Node) -> QuantizedLayer | str:
    weight = node.inputs[1]
    if weight is None or not is_constant(weight):
        return "its weights are not constant"
    axis: int | None = 0
    if node.op_type == "ConvTranspose":
        grouped = node.attributes.get_int("group", 1) != 1
        axis = None if grouped else 1
    return _layer(node, weight, axis, optional(node, 2))


def _gemm(node: ir.Node) -> QuantizedLayer | str:
    weight = node.inputs[1]
    if weight is None or not is_constant(weight):
        return "its weights are not constant"
    attributes = node.attributes
    if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1.0:
        return "Gemm with transA or alpha has no INT8 kernel"
    if attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm with beta has no INT8 kernel"
    bias = optional(node, 2)
    if bias is not None and bias.shape is not None and any(n != 1 for n in bias.shape[:-1]):
        return "its bias differs from row to row"
    axis = 0 if attributes.get_int("transB", 0) else 1
    return _layer(node, weight, axis, bias)


def _matmul(node: ir.Node) -> QuantizedLayer | str:
    left, right = node.inputs
    if left is None or right is None or is_constant(left):
        return "its left side is a constant"
    if is_constant(right):
        flat = right.shape is not None and len(right.shape) == 2
        return _layer(node, right, 1 if flat else None, _added_constant(node))
    if not (_is_float(left) and _is_float(right)):
        return "it does not compute in float32"
    names = tuple(dict.fromkeys((left.name or "", right.name or "")))
    return QuantizedLayer(node.name or "", "MatMul", node.outputs[0].name or "", names)


_LAYERS: Mapping[str, Callable[[ir.Node], QuantizedLayer | str]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def _layer(
    node: ir.Node, weight: ir.Value, axis: int | None, bias: ir.Value | None
) -> QuantizedLayer | str:
    source = node.inputs[0]
    if source is None or is_constant(source):
        return "its input is a constant"
    if not _is_float(source) or not _is_float(weight):
        return f"it computes in {weight.dtype.name.lower() if weight.dtype else 'an unknown type'}"
    if bias is not None and not is_constant(bias):
        return "its bias is not constant"
    return QuantizedLayer(
        name=node.name or "",
        op=node.op_type,
        output=node.outputs[0].name or "",
        activations=(source.name or "",),
        weight=weight.name,
        weight_axis=axis,
        bias=bias.name if bias is not None else None,
    )


def _added_constant(node: ir.Node) -> ir.Value | None:
    """The constant that the only reader of a MatMul adds to it: the bias of a Linear."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    weight = node.inputs[1]
    if other is None or weight is None or not is_constant(other) or other.shape is None:
        return None
    return other if list(other.shape) == list(weight.shape or ())[1:][-1:] else None


def _reaches(value: ir.Value, hit: Callable[[ir.Node], bool]) -> bool:
    """Whether the value flows into a node that `hit` accepts, through what stays in INT8."""
    passing = ACTIVATIONS | MOVES_DATA | AVERAGES | {"Add", "Concat"}
    seen: set[int] = set()
    stack = [value]
    while stack:
        for user, _ in stack.pop().uses():
            if hit(user):
                return True
            if id(user) not in seen and user.op_type in passing:
                seen.add(id(user))
                stack.extend(user.outputs)
    return False


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, None)

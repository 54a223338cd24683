"""Lowering to INT8: the layers of a fused model hand each other quantized values, not floats.

A quantized value in the graph is a pair: its parameters, and the node that gives its integers.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from octavo.graph.nodes import asks_size
from octavo.graph.patch import parents
from octavo.graph.scales import LayerQParams, int8_layer, names_in, parts_of
from octavo.graph.trace import FusedModel
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.layers.convolution.elementwise import Dequantize, Int8Add, Quantize
from octavo.layers.convolution.int8 import Int8Conv2d
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant import QParams
from octavo.quant.requantize import signed

__all__ = [
    "AmongFloats",
    "can_be_int8",
    "max_pool_int8",
    "on_integers",
    "to_int8",
]


@torch.no_grad()
def to_int8(
    model: nn.Module, layers: Mapping[str, LayerQParams]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Puts INT8 layers in the place of fused ones.

    In a graph quantized values flow from layer to layer: what reads the result of an INT8 layer as
    floats gets floats, and what lies between two layers and only moves data moves integers. Where
    there is no graph, each layer takes floats and gives floats.

    Args:
        model: from `octavo.fuse`; not to be used afterwards.
        layers: name of a convolution or Linear in the float model -> how it is quantized; others
            stay as they are. One without a weight gets it later, by `load_state_dict`.

    Returns:
        the model, with what is in it of `layers` as `octavo_qparams`, and name -> the INT8 layer.
    """
    if isinstance(model, FusedModel):
        rewriter = _Rewriter(model, layers)
        result: nn.Module = rewriter.run()
        made = rewriter.made
    else:
        result, made = model, _replace_modules(model, layers)
    kept = {name: replace(layers[name], weight=None) for name in made}
    result.octavo_qparams = kept  # type: ignore[assignment] # a plain attribute
    return result, made


def can_be_int8(model: nn.Module, names: Collection[str]) -> set[str]:
    """The convolutions and Linears that `to_int8` can make INT8.

    Args:
        model: from `octavo.fuse`.
        names: in the float model, of those that are to be INT8.
    """
    if isinstance(model, FusedModel):
        calls = _calls(model)
        return {name for node in model.graph.nodes for name in _names(model, node, calls, names)}
    return {name for _, _, found in _layers(model, names) for name in found}


class _Rewriter:
    def __init__(self, model: FusedModel, layers: Mapping[str, LayerQParams]) -> None:
        self.model, self.graph, self.layers = model, model.graph, layers
        self.made: dict[str, nn.Module] = {}
        self.quantized: dict[fx.Node, tuple[QParams, fx.Node]] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[tuple[fx.Node, QParams], fx.Node] = {}
        self.sizes: set[fx.Node] = set()
        self.calls = _calls(model)
        self.parameter = next(model.parameters(), torch.empty(0))

    def run(self) -> FusedModel:
        for node in list(self.graph.nodes):
            if self._names(node):
                self._replace(node)
            else:
                self._move(node)
        for node in reversed(list(self.graph.nodes)):
            self._settle(node)
        self.graph.eliminate_dead_code()
        self.model.delete_all_unused_submodules()
        self.graph.lint()
        self.model.recompile()
        return self.model

    def _names(self, node: fx.Node) -> list[str]:
        return _names(self.model, node, self.calls, self.layers)

    def _replace(self, node: fx.Node) -> None:
        """Puts an INT8 layer in for a float one, and for the sum behind it."""
        path = str(node.target)
        names, layer = self._names(node), self.model.get_submodule(path)
        parts = parts_of(layer)
        qparams = [self.layers[name] for name in names]
        residual = _residual(node)
        y = qparams[-1].y
        if residual is None and y is None and not isinstance(layer, nn.Linear):
            y = self._wanted(node)
        results = [*(one.x for one in qparams[1:]), y]
        made = [
            int8_layer(part, one, out, self.parameter)
            for part, one, out in zip(parts, qparams, results, strict=True)
        ]
        new: nn.Module = made[0]
        if len(made) == 2:
            new = Int8DepthwiseSeparableConv2d(*made)  # type: ignore[arg-type]
        self.made.update(zip(names, made, strict=True))
        x = node.args[0]
        assert isinstance(x, fx.Node)  # noqa: S101 - a layer computes with what others gave
        with self.graph.inserting_before(node):
            given = x if isinstance(layer, nn.Linear) else self._quantize(x, qparams[0].x)
            self.model.set_submodule(path, new.eval())
            result = self.graph.call_module(path, (given,))
        if residual is not None:
            self._sum(node, result, residual, qparams[-1], parts[-1].final_activation)
        elif y is not None and not isinstance(layer, nn.Linear):
            self.quantized[node] = (y, result)
        else:
            self.floats[node] = result

    def _wanted(self, node: fx.Node) -> QParams | None:
        """The parameters with which all that reads a node wants it, if they agree."""
        wanted = set()
        for user in node.users:
            names = self._names(user)
            if not names or user.args[0] is not node or node in user.args[1:]:
                return None
            wanted.add(self.layers[names[0]].x)
        return wanted.pop() if len(wanted) == 1 else None

    def _sum(
        self, node: fx.Node, result: fx.Node, residual: Any, layer: LayerQParams, activation: str
    ) -> None:
        """The residual sum behind a layer: of integers where both sides are, else of floats."""
        other = self.quantized.get(residual)
        with self.graph.inserting_before(node):
            if layer.y is not None and layer.total is not None and other is not None:
                add = Int8Add.from_qparams(
                    layer.y, other[0], layer.total, activation, self.parameter.device
                )
                total = self._call(f"{node.name}_sum", add, result, other[1])
                self.quantized[node] = (layer.total, total)
                return
            if layer.y is not None:
                result = self._dequantize(result, layer.y, node.name)
            total = self.graph.call_function(operator.add, (result, residual))
            if activation != "none":
                total = self.graph.call_function(ACTIVATIONS[activation], (total,))
            self.floats[node] = total

    def _move(self, node: fx.Node) -> None:
        """Stays with integers where a node does to them what it does to numbers."""
        if asks_size(node, self.sizes):
            self.sizes.add(node)
            for one in node.all_input_nodes:
                if one in self.quantized:
                    node.replace_input_with(one, self.quantized[one][1])
            return
        inputs = [one for one in node.all_input_nodes if one not in self.sizes]
        if any(one not in self.quantized for one in inputs):
            return
        several = {self.quantized[one][0] for one in inputs}
        if len(several) != 1:
            return
        qparams = several.pop()
        integers = {one: self.quantized[one][1] for one in inputs}
        with self.graph.inserting_before(node):
            moved = on_integers(node, self.model, integers, signed(qparams)[1])
        if moved is not None:
            self.quantized[node] = (qparams, moved)

    def _settle(self, node: fx.Node) -> None:
        """Whatever still reads a node that was replaced gets floats."""
        if node in self.floats:
            node.replace_all_uses_with(self.floats[node])
        elif node in self.quantized:
            if node.users:
                qparams, made = self.quantized[node]
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._dequantize(made, qparams, node.name))
        else:
            return
        self.graph.erase_node(node)

    def _quantize(self, value: fx.Node, wanted: QParams) -> fx.Node:
        if value in self.quantized and self.quantized[value][0] == wanted:
            return self.quantized[value][1]
        if (value, wanted) not in self.inputs:
            layer = Quantize.from_qparams(wanted, self.parameter.device)
            self.inputs[value, wanted] = self._call(f"{value.name}_codes", layer, value)
        return self.inputs[value, wanted]

    def _dequantize(self, made: fx.Node, qparams: QParams, name: str) -> fx.Node:
        layer = Dequantize.from_qparams(qparams, self.parameter.device, self.parameter.dtype)
        return self._call(f"{name}_floats", layer, made)

    def _call(self, name: str, layer: nn.Module, *args: fx.Node) -> fx.Node:
        while hasattr(self.model, name):
            name += "_"
        self.model.add_module(name, layer.eval())
        return self.graph.call_module(name, args)


def _calls(model: FusedModel) -> Counter[str]:
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")


def _names(
    model: FusedModel, node: fx.Node, calls: Counter[str], known: Collection[str]
) -> list[str]:
    """Names in the float model of what a node computes, if all of it is quantized."""
    path = str(node.target)
    if node.op != "call_module" or calls[path] > 1:
        return []
    layer = model.get_submodule(path)
    final = getattr(parts_of(layer)[-1], "final_activation", "none")
    if final != "none" and _residual(node) is None:
        return []  # integers know one activation, and this layer has two
    return names_in(layer, path, known)


def _residual(node: fx.Node) -> Any:
    """What a call of a fused layer adds to its result; None for nothing."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")


class AmongFloats(nn.Module):
    """Floats to floats by a layer that takes int8; the result is stored like the input.

    Args:
        quantize: what makes the integers.
        layer: takes them, and gives floats.
    """

    def __init__(
        self, quantize: Quantize, layer: Int8Conv2d | Int8DepthwiseSeparableConv2d
    ) -> None:
        super().__init__()
        self.quantize, self.layer = quantize, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, N, H', W']."""
        y: torch.Tensor = self.layer(self.quantize(x))
        if x.is_contiguous(memory_format=torch.channels_last):
            return y
        return y.contiguous()


def _replace_modules(model: nn.Module, layers: Mapping[str, LayerQParams]) -> dict[str, nn.Module]:
    floats = next(model.parameters(), torch.empty(0))
    made: dict[str, nn.Module] = {}
    for _, layer, names in list(_layers(model, layers)):
        own = [layers[name] for name in names]
        results = [*(one.x for one in own[1:]), None]
        new: list[Any] = [
            int8_layer(part, one, out, floats)
            for part, one, out in zip(parts_of(layer), own, results, strict=True)
        ]
        made.update(zip(names, new, strict=True))
        whole = new[0] if len(new) == 1 else Int8DepthwiseSeparableConv2d(*new)
        quantize = Quantize.from_qparams(own[0].x, floats.device)
        among = AmongFloats(quantize, whole).eval()
        for parent, attribute in list(parents(model, layer)):
            setattr(parent, attribute, among)
    return made


def _layers(model: nn.Module, known: Collection[str]) -> list[tuple[str, nn.Module, list[str]]]:
    """Path, convolution and the names of what it computes, of those that have a place."""
    found: list[tuple[str, nn.Module, list[str]]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        names = [] if path == "" or isinstance(module, nn.Linear) else names_in(module, path, known)
        if names and module not in inside:
            inside.update(parts_of(module))
            found.append((path, module, names))
        elif len(parts_of(module)) > 1:
            inside.update(parts_of(module))  # which the separable layer reads itself
    counts = Counter(name for _, _, names in found for name in names)
    return [one for one in found if all(counts[name] == 1 for name in one[2])]


aten = torch.ops.aten

MOVES_DATA = frozenset(
    {torch.cat, torch.concat, torch.flatten, torch.chunk, torch.split, torch.permute}
    | {torch.reshape, torch.transpose, torch.squeeze, torch.unsqueeze, operator.getitem}
    | {"chunk", "contiguous", "flatten", "permute", "reshape", "split", "squeeze", "transpose"}
    | {"unsqueeze", "view"}
    | {aten.cat.default, aten.flatten.using_ints, aten.chunk.default, aten.split.Tensor}
    | {aten.split_with_sizes.default, aten.permute.default, aten.reshape.default}
    | {aten.transpose.int, aten.slice.Tensor, aten.contiguous.default, aten.view.default}
    | {aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default}
)


RELUS = frozenset(
    {torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"}
    | {aten.relu.default, aten.relu_.default}
)


MAX_POOLS = frozenset({torch.max_pool2d, functional.max_pool2d, aten.max_pool2d.default})


def on_integers(
    node: fx.Node, model: nn.Module, integers: Mapping[fx.Node, fx.Node], zero_point: int
) -> fx.Node | None:
    """Writes a node a second time, behind the integers of what it reads.

    Args:
        node: of a graph; new nodes come where the graph inserts.
        model: holds the modules that the graph names.
        integers: node -> the one that gives its integers, all with one scale and zero point.
        zero_point: the integer that stands for zero.

    Returns:
        the node that gives the result's integers; None where integers are not enough.
    """
    graph = node.graph
    if _is(node, MOVES_DATA):
        return graph.node_copy(node, lambda one: integers.get(one, one))
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return None
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if _is_pool(node, module):
        settings = node.args[1:]
        if module is not None:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            settings = tuple(getattr(module, name) for name in names)
        options = {key: node.kwargs[key] for key in node.kwargs if key != "return_indices"}
        return graph.call_function(max_pool_int8, (integers[x], *settings), options)
    if _is(node, RELUS) or type(module) is nn.ReLU:
        # it may write into its input, and others may read that
        return graph.call_function(torch.clamp, (integers[x], zero_point)) if _alone(x) else None
    return None


def max_pool_int8(x: torch.Tensor, *settings: Any, **options: Any) -> torch.Tensor:
    """`functional.max_pool2d` of int8 values, which are exact in bfloat16.

    torch has no kernel for int8 on a GPU; on a CPU its own fails where an index exceeds int8.

    Args:
        x: int8 [B, C, H, W] or [C, H, W].
        settings: positional arguments of `functional.max_pool2d` that follow the input.
        options: its keyword arguments.

    Returns:
        int8, the largest value in each window.
    """
    largest: torch.Tensor = functional.max_pool2d(x.to(torch.bfloat16), *settings, **options)
    return largest.to(torch.int8)


def _is(node: fx.Node, targets: Collection[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _alone(node: fx.Node) -> bool:
    """Whether nothing but one node reads a tensor, or one that may share its memory."""
    while len(node.users) == 1 and _is(node, MOVES_DATA) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return len(node.users) == 1


def _is_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node takes maxima, and gives nothing else."""
    if module is not None:
        return type(module) is nn.MaxPool2d and not module.return_indices
    indices = node.kwargs.get("return_indices", False) is not False
    return _is(node, MAX_POOLS) and len(node.args) <= 6 and not indices

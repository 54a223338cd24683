"""A fused graph in eight bits: convolutions that hand each other codes, and no floats."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from octavo.graph.nodes import asks_size
from octavo.graph.patch import places
from octavo.graph.scales import Form, Weights, int8_layer, names_in, parts_of
from octavo.graph.trace import FusedModel
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.layers.convolution.elementwise import Dequantize, Int8Add, Quantize
from octavo.layers.convolution.int8 import Int8Conv2d, signed
from octavo.layers.convolution.separable import Int8DepthwiseSeparableConv2d
from octavo.quant import QParams

__all__ = [
    "AmongFloats",
    "can_be_int8",
    "graph_to_int8",
    "max_pool_of_codes",
    "names_in_graph",
    "on_codes",
    "to_int8",
]


@torch.no_grad()
def graph_to_int8(
    model: FusedModel, forms: Mapping[str, Form], weights: Mapping[str, Weights]
) -> tuple[FusedModel, dict[str, nn.Module]]:
    """Puts INT8 layers in the place of fused ones, and lets codes flow between them.

    What reads the result of an INT8 layer as floats gets floats; what is between two layers and
    only moves data moves codes.

    Args:
        model: from `octavo.fuse`; not to be used afterwards.
        forms: name of a convolution or Linear in the float model -> its codes; others stay.
        weights: the same name -> its weights; those that are missing are still to be loaded.

    Returns:
        the model, and name -> the INT8 layer, for those of the forms that the graph has.
    """
    rewriter = _Rewriter(model, forms, weights)
    result = rewriter.run()
    result.octavo_forms = {name: forms[name] for name in rewriter.made}
    return result, rewriter.made


def names_in_graph(model: FusedModel, names: Collection[str]) -> set[str]:
    """The convolutions and Linears that `graph_to_int8` can make INT8.

    Args:
        model: from `octavo.fuse`.
        names: in the float model, of those that have forms.
    """
    calls = _calls(model)
    return {name for node in model.graph.nodes for name in _names(model, node, calls, names)}


class _Rewriter:
    def __init__(
        self, model: FusedModel, forms: Mapping[str, Form], weights: Mapping[str, Weights]
    ) -> None:
        self.model, self.graph = model, model.graph
        self.forms, self.weights = forms, weights
        self.made: dict[str, nn.Module] = {}
        self.codes: dict[fx.Node, tuple[QParams, fx.Node]] = {}
        self.floats: dict[fx.Node, fx.Node] = {}
        self.quantized: dict[tuple[fx.Node, QParams], fx.Node] = {}
        self.sizes: set[fx.Node] = set()
        self.calls = _calls(model)
        self.like = next(model.parameters(), torch.empty(0))

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
        return _names(self.model, node, self.calls, self.forms)

    def _replace(self, node: fx.Node) -> None:
        """Puts an INT8 layer in for a float one, and for the sum behind it."""
        name = str(node.target)
        names, layer = self._names(node), self.model.get_submodule(name)
        parts = parts_of(layer)
        forms = [self.forms[one] for one in names]
        residual = _residual(node)
        y = forms[-1].y
        if residual is None and y is None and not isinstance(layer, nn.Linear):
            y = self._wanted(node)
        results = [*(form.x for form in forms[1:]), y]
        made = [
            int8_layer(part, form, out, self.weights.get(one), self.like)
            for part, one, form, out in zip(parts, names, forms, results, strict=True)
        ]
        new: nn.Module = made[0]
        if len(made) == 2:
            new = Int8DepthwiseSeparableConv2d(*made)  # type: ignore[arg-type]
        self.made.update(zip(names, made, strict=True))
        x = node.args[0]
        assert isinstance(x, fx.Node)  # noqa: S101 - a layer computes with what others gave
        with self.graph.inserting_before(node):
            given = x if isinstance(layer, nn.Linear) else self._as_codes(x, forms[0].x)
            self.model.set_submodule(name, new.eval())
            result = self.graph.call_module(name, (given,))
        if residual is not None:
            self._sum(node, result, residual, forms[-1], parts[-1].final_activation)
        elif y is not None and not isinstance(layer, nn.Linear):
            self.codes[node] = (y, result)
        else:
            self.floats[node] = result

    def _wanted(self, node: fx.Node) -> QParams | None:
        """The codes in which all that reads a node wants it, if they agree."""
        wanted = set()
        for user in node.users:
            names = self._names(user)
            if not names or user.args[0] is not node or node in user.args[1:]:
                return None
            wanted.add(self.forms[names[0]].x)
        return wanted.pop() if len(wanted) == 1 else None

    def _sum(
        self, node: fx.Node, result: fx.Node, residual: Any, form: Form, activation: str
    ) -> None:
        """The residual sum behind a layer: of codes where all of it is codes, else of floats."""
        other = self.codes.get(residual)
        with self.graph.inserting_before(node):
            if form.y is not None and form.total is not None and other is not None:
                add = Int8Add.under(form.y, other[0], form.total, activation, self.like.device)
                total = self._call(f"{node.name}_sum", add, result, other[1])
                self.codes[node] = (form.total, total)
                return
            if form.y is not None:
                result = self._as_floats(result, form.y, node.name)
            total = self.graph.call_function(operator.add, (result, residual))
            if activation != "none":
                total = self.graph.call_function(ACTIVATIONS[activation], (total,))
            self.floats[node] = total

    def _move(self, node: fx.Node) -> None:
        """Keeps codes where a node does to codes what it does to numbers."""
        if asks_size(node, self.sizes):
            self.sizes.add(node)
            for one in node.all_input_nodes:
                if one in self.codes:
                    node.replace_input_with(one, self.codes[one][1])
            return
        inputs = [one for one in node.all_input_nodes if one not in self.sizes]
        forms = {self.codes[one][0] for one in inputs if one in self.codes}
        if len(forms) != 1 or any(one not in self.codes for one in inputs):
            return
        form = forms.pop()
        codes = {one: self.codes[one][1] for one in inputs}
        with self.graph.inserting_before(node):
            moved = on_codes(node, self.model, codes, signed(form)[1])
        if moved is not None:
            self.codes[node] = (form, moved)

    def _settle(self, node: fx.Node) -> None:
        """Whatever still reads a node that was replaced gets floats."""
        if node in self.floats:
            node.replace_all_uses_with(self.floats[node])
        elif node in self.codes:
            if node.users:
                codes, made = self.codes[node]
                with self.graph.inserting_before(node):
                    node.replace_all_uses_with(self._as_floats(made, codes, node.name))
        else:
            return
        self.graph.erase_node(node)

    def _as_codes(self, value: fx.Node, wanted: QParams) -> fx.Node:
        if value in self.codes and self.codes[value][0] == wanted:
            return self.codes[value][1]
        if (value, wanted) not in self.quantized:
            layer = Quantize.under(wanted, self.like.device)
            self.quantized[value, wanted] = self._call(f"{value.name}_codes", layer, value)
        return self.quantized[value, wanted]

    def _as_floats(self, made: fx.Node, codes: QParams, name: str) -> fx.Node:
        layer = Dequantize.under(codes, self.like.device, self.like.dtype)
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
    """Names in the float model of what a node computes, if all of it has forms."""
    path = str(node.target)
    if node.op != "call_module" or calls[path] > 1:
        return []
    layer = model.get_submodule(path)
    final = getattr(parts_of(layer)[-1], "final_activation", "none")
    if final != "none" and _residual(node) is None:
        return []  # codes know one activation, and this layer has two
    return names_in(layer, path, known)


def _residual(node: fx.Node) -> Any:
    """What a call of a fused layer adds to its result; None for nothing."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")


class AmongFloats(nn.Module):
    """Floats to floats by a layer that takes codes; the result is stored like the input.

    Args:
        quantize: what makes the codes.
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


def can_be_int8(model: nn.Module, names: Collection[str]) -> set[str]:
    """The convolutions and Linears that `to_int8` can make INT8.

    Args:
        model: from `octavo.fuse`.
        names: in the float model, of those that are to be INT8.
    """
    if isinstance(model, FusedModel):
        return names_in_graph(model, names)
    return {name for _, _, found in _layers(model, names) for name in found}


@torch.no_grad()
def to_int8(
    model: nn.Module, forms: Mapping[str, Form], weights: Mapping[str, Weights]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Puts INT8 layers in the place of fused ones.

    In a graph codes flow from layer to layer; where there is none, each layer takes floats and
    gives floats.

    Args:
        model: from `octavo.fuse`; not to be used afterwards.
        forms: name of a convolution or Linear in the float model -> its codes; others stay.
        weights: the same name -> its weights; those that are missing are still to be loaded.

    Returns:
        the model, with the forms that are in it as `octavo_forms`, and name -> the INT8 layer.
    """
    if isinstance(model, FusedModel):
        return graph_to_int8(model, forms, weights)
    like = next(model.parameters(), torch.empty(0))
    made: dict[str, nn.Module] = {}
    for _, layer, names in list(_layers(model, forms)):
        parts, own = parts_of(layer), [forms[name] for name in names]
        results = [*(form.x for form in own[1:]), None]
        new: list[Any] = [
            int8_layer(part, form, out, weights.get(name), like)
            for part, form, out, name in zip(parts, own, results, names, strict=True)
        ]
        made.update(zip(names, new, strict=True))
        whole = new[0] if len(new) == 1 else Int8DepthwiseSeparableConv2d(*new)
        wrapped = AmongFloats(Quantize.under(own[0].x, like.device), whole).eval()
        for parent, attribute in list(places(model, layer)):
            setattr(parent, attribute, wrapped)
    model.octavo_forms = {name: forms[name] for name in made}  # type: ignore[assignment]
    return model, made


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
            inside.update(parts_of(module))  # which the pair reads itself
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


def on_codes(
    node: fx.Node, model: nn.Module, codes: Mapping[fx.Node, fx.Node], zero_point: int
) -> fx.Node | None:
    """Writes a node a second time, behind the codes of what it reads.

    Args:
        node: of a graph; new nodes come where the graph inserts.
        model: holds the modules that the graph names.
        codes: node -> the one that gives its codes, all with one scale and zero point.
        zero_point: the code of zero.

    Returns:
        the node that gives the codes of the result; None where codes are not enough.
    """
    graph = node.graph
    if _is(node, MOVES_DATA):
        return graph.node_copy(node, lambda one: codes.get(one, one))
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
        return graph.call_function(max_pool_of_codes, (codes[x], *settings), options)
    if _is(node, RELUS) or type(module) is nn.ReLU:
        # it may write into its input, and others may read that
        return graph.call_function(torch.clamp, (codes[x], zero_point)) if _alone(x) else None
    return None


def max_pool_of_codes(codes: torch.Tensor, *settings: Any, **options: Any) -> torch.Tensor:
    """`functional.max_pool2d` of int8 codes, which are exact in bfloat16.

    torch has no kernel for int8 on a GPU; on a CPU its own fails where an index exceeds int8.

    Args:
        codes: int8 [B, C, H, W] or [C, H, W].
        settings: positional arguments of `functional.max_pool2d` that follow the input.
        options: its keyword arguments.

    Returns:
        int8, the code of the largest number in each window.
    """
    largest: torch.Tensor = functional.max_pool2d(codes.to(torch.bfloat16), *settings, **options)
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

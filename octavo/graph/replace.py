"""Fused layers in the place of what they stand for: in a graph, or among a model's modules."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import fx, nn

from octavo.graph.fold import fold
from octavo.graph.fusible import FusionGroup, SeparableGroup
from octavo.graph.nodes import asks_size, is_nothing
from octavo.graph.patch import parents
from octavo.graph.trace import FusedModel, in_evaluation
from octavo.layers.convolution.fused import FusedConv2d, FusedSeparableConv2d

__all__ = ["drop_nothing", "make", "rewrite_graph", "rewrite_modules"]

aten = torch.ops.aten


def drop_nothing(graph: fx.Graph, root: nn.Module) -> None:
    """Takes out identities, dropout, and assertions about the size of what layers give."""
    for node in list(graph.nodes):
        if is_nothing(node, root):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    asked: dict[fx.Node, frozenset[fx.Node]] = {}  # about whose size
    for node in graph.nodes:
        if asks_size(node, asked):
            given = [asked.get(one, frozenset({one})) for one in node.all_input_nodes]
            asked[node] = frozenset().union(*given)
    for node in reversed(asked):
        of_an_input = any(one.op == "placeholder" for one in asked[node])
        if not node.users and not (node.target is torch._assert and of_an_input):
            graph.erase_node(node)


def rewrite_graph(model: FusedModel, layers: Sequence[FusionGroup | SeparableGroup]) -> FusedModel:
    """Puts layers where the last of their nodes was.

    Args:
        model: what `traced` or `exported` made; not to be used afterwards.
        layers: found in its graph.

    Returns:
        the model with the layers and with copies of what stays.
    """
    graph = model.graph
    now: dict[fx.Node, fx.Node] = {}
    names = _names(graph, layers)
    for layer, name in zip(layers, names, strict=True):
        model.add_submodule(name, make(layer, channels_last=True))
    for layer, name in sorted(zip(layers, names, strict=True), key=lambda one: one[0].out):
        with graph.inserting_before(layer.out):
            node = graph.call_module(name, tuple(now.get(one, one) for one in layer.reads))
        layer.out.replace_all_uses_with(node)
        now[layer.out] = node
        for old in reversed(layer.nodes):
            graph.erase_node(old)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    _reshape_views(graph)
    graph.lint()
    new = FusedModel(model, graph, type(model).__name__)
    return in_evaluation(FusedModel(_copied(new), graph, type(model).__name__))


def _copied(model: FusedModel) -> nn.Module:
    """Copies of a model's modules and tensors, without its graph."""
    held = nn.Module()
    held._modules, held._parameters, held._buffers = (
        model._modules,
        model._parameters,
        model._buffers,
    )
    return copy.deepcopy(held)


def rewrite_modules(model: nn.Module, layers: Sequence[FusionGroup | SeparableGroup]) -> None:
    """Puts layers where their convolution was, and identities where the others were.

    Args:
        model: changed.
        layers: whose nodes are calls of modules, each called once.
    """
    for layer in layers:
        for name in (str(node.target) for node in layer.nodes):
            new = make(layer, channels_last=False) if name == layer.name else nn.Identity()
            for parent, attribute in list(parents(model, model.get_submodule(name))):
                setattr(parent, attribute, new.eval())


def _names(graph: fx.Graph, layers: Sequence[FusionGroup | SeparableGroup]) -> list[str]:
    """A name in the model for each layer: that of its convolution where nothing else needs it."""
    gone = {node for layer in layers for node in layer.nodes}
    kept = {
        str(node.target)
        for node in graph.nodes
        if (node.op == "call_module" and node not in gone)
        or (node.op == "get_attr" and not set(node.users) <= gone)
    }
    taken = {*kept, *(layer.name for layer in layers)}
    names = []
    for layer in layers:
        name = layer.name
        if _collides(name, taken - {name}) or name in kept:
            name = name.replace(".", "_") + "_fused"
            while _collides(name, taken) or name in taken:
                name += "_"
            taken.add(name)
        names.append(name)
    return names


def _collides(name: str, others: Collection[str]) -> bool:
    """Whether one name lies within another's module."""
    return any(one.startswith(f"{name}.") or name.startswith(f"{one}.") for one in others)


def _reshape_views(graph: fx.Graph) -> None:
    """Fused layers give channels_last, in which `view` cannot join axes; `reshape` can."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view":
            if not any(isinstance(arg, torch.dtype) for arg in node.args):
                node.target = "reshape"
        elif node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default


def make(
    found: FusionGroup | SeparableGroup, *, channels_last: bool
) -> FusedConv2d | FusedSeparableConv2d:
    """The layer, with weights of its own.

    Args:
        found: what it stands for.
        channels_last: see `FusedConv2d`.
    """
    if isinstance(found, SeparableGroup):
        return FusedSeparableConv2d(
            _convolution(found.depthwise, channels_last),
            _convolution(found.pointwise, channels_last),
        )
    return _convolution(found, channels_last)


@torch.no_grad()
def _convolution(group: FusionGroup, channels_last: bool) -> FusedConv2d:
    weight, bias = fold(group.terms)
    conv = group.conv
    layer = FusedConv2d(
        weight.shape[1] * conv.groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=conv.stride,
        padding=group.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=bias is not None,
        activation=group.activation,
        final_activation=group.final,
        channels_last=channels_last,
        device="meta",
        dtype=weight.dtype,
    )
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    layer.sources = group.layers
    return layer.eval()

"""What can be one layer. Each pattern is a function that lets a group grow, or leaves it as it is.

A new pattern is one more such function in `find`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from octavo.core.fusions import Unfused
from octavo.graph.activations import activation_after
from octavo.graph.fusible import FusionGroup, SeparableGroup, Term, in_order
from octavo.graph.nodes import Add, Conv, Norm, Pad, Unsupported
from octavo.graph.parallel import parallel
from octavo.graph.view import GraphView
from octavo.kernels.common.convolution import sum_of_sides

__all__ = ["Found", "find", "find_parallel"]

ARITHMETIC = {
    "mul": "mul", "imul": "mul", "mul_": "mul",
    "add": "add", "iadd": "add", "add_": "add",
    "sub": "sub", "isub": "sub", "sub_": "sub",
}  # fmt: skip
"""What puts a constant on a result."""
FOLDED = frozenset((
    "add", "sub", "mul", "div", "truediv", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "exp",
    "reshape", "view", "unsqueeze", "getitem",
))  # fmt: skip
"""What models compute constants of channels with."""


@dataclass(frozen=True)
class Found:
    """What a graph holds.

    Attributes:
        layers: to be made, in the order of the graph.
        unfused: layers that stay, and why.
        convolutions: that the graph calls.
        depthwise: how many of those are depthwise.
        seen: their names.
    """

    layers: tuple[FusionGroup | SeparableGroup, ...]
    unfused: tuple[Unfused, ...]
    convolutions: int
    depthwise: int
    seen: frozenset[str]


def find(graph: fx.Graph, root: nn.Module) -> Found:
    """Finds convolutions that can be one layer with what surrounds them; changes nothing.

    Args:
        graph: free of nodes that do nothing.
        root: holds the modules and tensors that it names.
    """
    view = GraphView(graph, root)
    groups = _normalized(view)
    groups = [_with_activation(view, group) for group in groups]
    groups = _with_residuals(view, groups)
    layers = _with_pointwise(view, groups)
    _norms_left(view, layers)
    kinds = list(_all_convolutions(view))
    return Found(
        tuple(layer for layer in layers if isinstance(layer, SeparableGroup) or layer.worthwhile),
        tuple(view.unfused),
        len(kinds),
        sum(isinstance(operation, Conv) and operation.depthwise for operation in kinds),
        frozenset(operation.name for operation in kinds),
    )


def find_parallel(graph: fx.Graph, root: nn.Module) -> tuple[FusionGroup, ...]:
    """Finds parallel convolutions of one input that are summed, with their BatchNorms.

    Args:
        graph: free of nodes that do nothing; not changed.
        root: holds the modules and tensors that it names.
    """
    return tuple(group for group in _normalized(GraphView(graph, root)) if len(group.terms) > 1)


def _normalized(view: GraphView) -> list[FusionGroup]:
    """Convolutions with their paddings and BatchNorms; parallel ones are one."""
    groups = [_with_norm(view, _with_padding(view, one)) for one in _convolutions(view)]
    return parallel(view, [_with_constants(view, group) for group in groups])


def _all_convolutions(view: GraphView) -> Iterator[Conv | Unsupported]:
    for operation in view.operations.values():
        if isinstance(operation, Conv) or (
            isinstance(operation, Unsupported) and operation.kind == "convolution"
        ):
            yield operation


def _convolutions(view: GraphView) -> Iterator[FusionGroup]:
    """Every convolution that may be changed."""
    readers = Counter(
        id(operation.weight)
        for operation in view.operations.values()
        if isinstance(operation, Conv)
    )
    for node, operation in view.operations.items():
        if isinstance(operation, Unsupported) and operation.kind == "convolution":
            view.leave(operation.name, operation.kind, operation.reason)
        if not isinstance(operation, Conv):
            continue
        count = readers[id(operation.weight)]
        if count > 1:
            view.leave(operation.name, "convolution", f"its weight is used by {count} convolutions")
        elif not operation.weight.is_floating_point():
            view.leave(operation.name, "convolution", f"its weight is {operation.weight.dtype}")
        else:
            yield FusionGroup(
                operation, operation.x, (Term(operation, None, operation.padding),), (node,)
            )


def _with_padding(view: GraphView, group: FusionGroup) -> FusionGroup:
    """Zeros that are put around the input, for this convolution alone."""
    operation = view.operations.get(group.x)
    if isinstance(operation, Unsupported) and operation.kind == "padding":
        view.leave(group.name, "convolution", f"the padding before it stays: {operation.reason}")
    if not isinstance(operation, Pad):
        return group
    if view.sole_reader(group.x) is None:
        view.leave(group.name, "convolution", "the padding before it has other readers")
        return group
    term = replace(group.terms[0], padding=sum_of_sides(operation.padding, group.padding))
    return _grown(view, replace(group, x=operation.x, terms=(term,)), group.x) or group


def _with_norm(view: GraphView, group: FusionGroup) -> FusionGroup:
    readers = list(group.out.users)
    operations = [view.operations.get(reader) for reader in readers]
    for operation in operations:
        if isinstance(operation, Unsupported) and operation.kind == "BatchNorm":
            view.leave(operation.name, operation.kind, operation.reason)
    norm = next((operation for operation in operations if isinstance(operation, Norm)), None)
    if norm is None:
        return group
    if len(readers) > 1:
        others = ", ".join(view.describe(one) for one in readers if one is not norm.node)
        view.leave(
            group.name, "convolution", f"its result is read by {others} too, not its BN only"
        )
        return group
    term = replace(group.terms[0], norm=norm)
    return _grown(view, replace(group, terms=(term,)), norm.node) or group


def _with_constants(view: GraphView, group: FusionGroup) -> FusionGroup:
    """Constants by which channels are multiplied, or which are added: a BatchNorm written out."""
    reader = view.sole_reader(group.out)
    name = "" if reader is None else view.describe(reader)
    if reader is None or name not in ARITHMETIC or len(reader.args) != 2 or reader.kwargs:
        return group
    first, second = reader.args
    turned = first is not group.out
    value = _of_channels(view, first if turned else second, group)
    if value is None or (turned and name not in ("add", "mul")):
        return group
    kind = ARITHMETIC[name]
    term = group.terms[0]
    norm = term.norm or Norm(
        reader, group.out, group.name, value.new_zeros(()), value.new_ones(()), None, None, 0.0
    )
    factor = value if kind == "mul" else torch.ones_like(value)
    shift = {"mul": torch.zeros_like(value), "add": value, "sub": -value}[kind]
    gain, bias = (
        known.detach().to("cpu", torch.float64) if known is not None else torch.full_like(value, x)
        for known, x in ((norm.weight, 1.0), (norm.bias, 0.0))
    )
    norm = replace(norm, weight=gain * factor, bias=bias * factor + shift)
    changed = replace(group, terms=(replace(term, norm=norm),))
    gone = {reader}
    for node in reversed(list(view.graph.nodes)):  # what the constant alone is computed with
        if node.users and gone.issuperset(node.users) and node is not group.out:
            gone.add(node)
    grown = _grown(view, changed, *gone)
    if grown is None:
        return group
    view.operations.pop(reader, None)  # it is no sum of two results
    return _with_constants(view, grown)


def _of_channels(view: GraphView, value: Any, group: FusionGroup) -> torch.Tensor | None:
    """A constant with one number per channel, [N] in float64; None for anything else."""
    channels, kind = group.conv.weight.shape[0], group.conv.weight.dtype
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), dtype=torch.float64)
    found = _computed(view, value) if isinstance(value, fx.Node) else None
    if found is None or (found.ndim and found.dtype != kind) or not found.is_floating_point():
        return None
    if found.ndim and tuple(found.shape) not in ((channels, 1, 1), (1, channels, 1, 1)):
        return None
    return found.reshape(-1).to("cpu", torch.float64).expand(channels)


def _computed(view: GraphView, node: fx.Node) -> torch.Tensor | None:
    """What a node computes from the model's own tensors alone; None where it reads others."""
    if node.op == "get_attr":
        same = (one for one in view.graph.nodes if (one.op, one.target) == (node.op, node.target))
        if any(view.written(user) is one for one in same for user in one.users):
            return None
        holder, _, attribute = str(node.target).rpartition(".")
        found = getattr(view.root.get_submodule(holder), attribute)
        return found.detach() if isinstance(found, torch.Tensor) else None
    if node.op not in ("call_function", "call_method") or view.describe(node) not in FOLDED:
        return None
    inputs = {one: _computed(view, one) for one in node.all_input_nodes}
    if not inputs or any(one is None for one in inputs.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), inputs.__getitem__)
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, target)
    result = target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def _with_activation(view: GraphView, group: FusionGroup) -> FusionGroup:
    found = activation_after(group.out, view.root)
    if found is None:
        return group
    kind, nodes = found
    return _grown(view, replace(group, activation=kind), *nodes) or group


def _with_residuals(view: GraphView, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    """The later of two convolutions takes the sum: the other's result is there by then."""
    outs = {group.out for group in groups}
    taken: set[fx.Node] = set()
    grown = []
    for group in reversed(groups):
        new = _with_residual(view, group, outs, taken)
        taken.update(new.nodes)
        grown.append(new)
    return grown[::-1]


def _with_residual(
    view: GraphView, group: FusionGroup, outs: set[fx.Node], taken: set[fx.Node]
) -> FusionGroup:
    reader = view.sole_reader(group.out)
    operation = view.operations.get(reader) if reader is not None else None
    if not isinstance(operation, Add) or operation.node in taken:
        return group
    first, second = operation.terms
    other = second if first is group.out else first
    if other is group.out:
        return group
    if operation.in_place and other is first:  # the sum is written into the other term
        seen_later = any(user > operation.node for user in other.users)
        if other not in outs or seen_later:
            reason = "the sum is written into a tensor that others may read"
            view.leave(group.name, "residual", reason)
            return group
    found = activation_after(operation.node, view.root)
    final, nodes = found if found is not None else ("none", ())
    changed = replace(group, residual=other, final=final)
    return _grown(view, changed, operation.node, *nodes) or group


def _with_pointwise(
    view: GraphView, groups: Sequence[FusionGroup]
) -> list[FusionGroup | SeparableGroup]:
    """Depthwise groups together with the pointwise group that alone reads them."""
    by_node = {node: group for group in groups for node in group.nodes}
    separable: dict[FusionGroup, SeparableGroup] = {}
    for group in groups:
        if not group.depthwise:
            continue
        reader = view.sole_reader(group.out)
        second = by_node.get(reader) if reader is not None else None
        reason = ""
        if group.residual is not None:
            reason = "a residual is added before what follows"
        elif reader is None:
            reason = f"its result is read by {view.readers(group.out)}"
        elif second is None or second.x is not group.out or not second.pointwise:
            reason = f"{view.readers(group.out)} follows, no pointwise convolution"
        else:
            both = SeparableGroup(group, second)
            if view.overtakes_write(both.nodes, both.reads):
                reason = "its input is overwritten before the pointwise convolution"
            else:
                separable[second] = both
        if reason:
            view.leave(group.name, "depthwise", reason)
    firsts = {both.depthwise for both in separable.values()}
    return [separable.get(group, group) for group in groups if group not in firsts]


def _norms_left(view: GraphView, layers: Sequence[FusionGroup | SeparableGroup]) -> None:
    inside = {node for layer in layers for node in layer.nodes}
    for node, operation in view.operations.items():
        if isinstance(operation, Norm) and node not in inside:
            if not isinstance(view.operations.get(operation.x), Conv):
                before = (
                    view.describe(operation.x) if operation.x.op != "placeholder" else "the input"
                )
                view.leave(operation.name, "BatchNorm", f"it follows {before}, no convolution")
        elif isinstance(operation, Unsupported) and operation.kind == "BatchNorm":
            view.leave(operation.name, operation.kind, operation.reason)


def _grown(view: GraphView, group: FusionGroup, *nodes: fx.Node) -> FusionGroup | None:
    """The group with more nodes; None where it would read its inputs too late."""
    grown = replace(group, nodes=in_order([*group.nodes, *nodes]))
    if view.overtakes_write(grown.nodes, grown.reads):
        view.leave(group.name, "convolution", "its input is overwritten before its last operation")
        return None
    return grown

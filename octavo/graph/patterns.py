"""What can be one layer. Each pattern is a function that lets a group grow, or leaves it as it is.

A new pattern is one more such function in `find`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from octavo.core.fusions import Unfused
from octavo.graph.activations import activation_after
from octavo.graph.fusible import FusionGroup, SeparableGroup, Term, in_order
from octavo.graph.nodes import Add, Conv, Norm, Pad, Unsupported
from octavo.graph.parallel import parallel
from octavo.graph.view import GraphView
from octavo.kernels.common.convolution import sum_of_sides

__all__ = ["Found", "find", "find_parallel"]


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
    return parallel(view, groups)


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

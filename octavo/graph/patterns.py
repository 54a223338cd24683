"""What can be one layer. Each pattern is a function that lets a unit grow, or leaves it as it is.

A new pattern is one more such function in `find`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from octavo.core.fusions import NearMiss
from octavo.graph.activations import activation_after
from octavo.graph.fusible import Branch, Pair, Unit, in_order
from octavo.graph.nodes import Add, Conv, Norm, Pad, Refusal
from octavo.graph.parallel import parallel
from octavo.graph.view import Scene
from octavo.kernels.common.convolution import sum_of_sides

__all__ = ["Found", "find", "find_parallel"]


@dataclass(frozen=True)
class Found:
    """What a graph holds.

    Attributes:
        layers: to be made, in the order of the graph.
        misses: layers that stay, and why.
        convolutions: that the graph calls.
        depthwise: how many of those are depthwise.
        seen: their names.
    """

    layers: tuple[Unit | Pair, ...]
    misses: tuple[NearMiss, ...]
    convolutions: int
    depthwise: int
    seen: frozenset[str]


def find(graph: fx.Graph, root: nn.Module) -> Found:
    """Finds convolutions that can be one layer with what surrounds them; changes nothing.

    Args:
        graph: free of nodes that do nothing.
        root: holds the modules and tensors that it names.
    """
    scene = Scene(graph, root)
    units = _normalized(scene)
    units = [_with_activation(scene, unit) for unit in units]
    units = _with_residuals(scene, units)
    layers = _with_pointwise(scene, units)
    _norms_left(scene, layers)
    kinds = list(_all_convolutions(scene))
    return Found(
        tuple(layer for layer in layers if isinstance(layer, Pair) or layer.worthwhile),
        tuple(scene.misses),
        len(kinds),
        sum(isinstance(step, Conv) and step.depthwise for step in kinds),
        frozenset(step.name for step in kinds),
    )


def find_parallel(graph: fx.Graph, root: nn.Module) -> tuple[Unit, ...]:
    """Finds parallel convolutions of one input that are summed, with their BatchNorms.

    Args:
        graph: free of nodes that do nothing; not changed.
        root: holds the modules and tensors that it names.
    """
    return tuple(unit for unit in _normalized(Scene(graph, root)) if len(unit.branches) > 1)


def _normalized(scene: Scene) -> list[Unit]:
    """Convolutions with their paddings and BatchNorms; parallel ones are one."""
    units = [_with_norm(scene, _with_padding(scene, one)) for one in _convolutions(scene)]
    return parallel(scene, units)


def _all_convolutions(scene: Scene) -> Iterator[Conv | Refusal]:
    for step in scene.steps.values():
        if isinstance(step, Conv) or (isinstance(step, Refusal) and step.kind == "convolution"):
            yield step


def _convolutions(scene: Scene) -> Iterator[Unit]:
    """Every convolution that may be changed."""
    readers = Counter(id(step.weight) for step in scene.steps.values() if isinstance(step, Conv))
    for node, step in scene.steps.items():
        if isinstance(step, Refusal) and step.kind == "convolution":
            scene.miss(step.name, step.kind, step.reason)
        if not isinstance(step, Conv):
            continue
        count = readers[id(step.weight)]
        if count > 1:
            scene.miss(step.name, "convolution", f"its weight is used by {count} convolutions")
        elif not step.weight.is_floating_point():
            scene.miss(step.name, "convolution", f"its weight is {step.weight.dtype}")
        else:
            yield Unit(step, step.x, (Branch(step, None, step.padding),), (node,))


def _with_padding(scene: Scene, unit: Unit) -> Unit:
    """Zeros that are put around the input, for this convolution alone."""
    step = scene.steps.get(unit.x)
    if isinstance(step, Refusal) and step.kind == "padding":
        scene.miss(unit.name, "convolution", f"the padding before it stays: {step.reason}")
    if not isinstance(step, Pad):
        return unit
    if scene.sole_reader(unit.x) is None:
        scene.miss(unit.name, "convolution", "the padding before it has other readers")
        return unit
    branch = replace(unit.branches[0], padding=sum_of_sides(step.padding, unit.padding))
    return _grown(scene, replace(unit, x=step.x, branches=(branch,)), unit.x) or unit


def _with_norm(scene: Scene, unit: Unit) -> Unit:
    readers = list(unit.out.users)
    steps = [scene.steps.get(reader) for reader in readers]
    for step in steps:
        if isinstance(step, Refusal) and step.kind == "BatchNorm":
            scene.miss(step.name, step.kind, step.reason)
    norm = next((step for step in steps if isinstance(step, Norm)), None)
    if norm is None:
        return unit
    if len(readers) > 1:
        others = ", ".join(scene.describe(one) for one in readers if one is not norm.node)
        scene.miss(unit.name, "convolution", f"its result is read by {others} too, not its BN only")
        return unit
    branch = replace(unit.branches[0], norm=norm)
    return _grown(scene, replace(unit, branches=(branch,)), norm.node) or unit


def _with_activation(scene: Scene, unit: Unit) -> Unit:
    found = activation_after(unit.out, scene.root)
    if found is None:
        return unit
    kind, nodes = found
    return _grown(scene, replace(unit, activation=kind), *nodes) or unit


def _with_residuals(scene: Scene, units: Sequence[Unit]) -> list[Unit]:
    """The later of two convolutions takes the sum: the other's result is there by then."""
    outs = {unit.out for unit in units}
    taken: set[fx.Node] = set()
    grown = []
    for unit in reversed(units):
        new = _with_residual(scene, unit, outs, taken)
        taken.update(new.nodes)
        grown.append(new)
    return grown[::-1]


def _with_residual(scene: Scene, unit: Unit, outs: set[fx.Node], taken: set[fx.Node]) -> Unit:
    reader = scene.sole_reader(unit.out)
    step = scene.steps.get(reader) if reader is not None else None
    if not isinstance(step, Add) or step.node in taken:
        return unit
    first, second = step.terms
    other = second if first is unit.out else first
    if other is unit.out:
        return unit
    if step.in_place and other is first:  # the sum is written into the other term
        seen_later = any(user > step.node for user in other.users)
        if other not in outs or seen_later:
            reason = "the sum is written into a tensor that others may read"
            scene.miss(unit.name, "residual", reason)
            return unit
    found = activation_after(step.node, scene.root)
    final, nodes = found if found is not None else ("none", ())
    changed = replace(unit, residual=other, final=final)
    return _grown(scene, changed, step.node, *nodes) or unit


def _with_pointwise(scene: Scene, units: Sequence[Unit]) -> list[Unit | Pair]:
    """Depthwise units together with the pointwise unit that alone reads them."""
    by_node = {node: unit for unit in units for node in unit.nodes}
    pairs: dict[Unit, Pair] = {}
    for unit in units:
        if not unit.depthwise:
            continue
        reader = scene.sole_reader(unit.out)
        second = by_node.get(reader) if reader is not None else None
        reason = ""
        if unit.residual is not None:
            reason = "a residual is added before what follows"
        elif reader is None:
            reason = f"its result is read by {scene.readers(unit.out)}"
        elif second is None or second.x is not unit.out or not second.pointwise:
            reason = f"{scene.readers(unit.out)} follows, no pointwise convolution"
        else:
            pair = Pair(unit, second)
            if scene.overtakes_write(pair.nodes, pair.reads):
                reason = "its input is overwritten before the pointwise convolution"
            else:
                pairs[second] = pair
        if reason:
            scene.miss(unit.name, "depthwise", reason)
    firsts = {pair.depthwise for pair in pairs.values()}
    return [pairs.get(unit, unit) for unit in units if unit not in firsts]


def _norms_left(scene: Scene, layers: Sequence[Unit | Pair]) -> None:
    inside = {node for layer in layers for node in layer.nodes}
    for node, step in scene.steps.items():
        if isinstance(step, Norm) and node not in inside:
            if not isinstance(scene.steps.get(step.x), Conv):
                before = scene.describe(step.x) if step.x.op != "placeholder" else "the input"
                scene.miss(step.name, "BatchNorm", f"it follows {before}, no convolution")
        elif isinstance(step, Refusal) and step.kind == "BatchNorm":
            scene.miss(step.name, step.kind, step.reason)


def _grown(scene: Scene, unit: Unit, *nodes: fx.Node) -> Unit | None:
    """The unit with more nodes; None where it would read its inputs too late."""
    grown = replace(unit, nodes=in_order([*unit.nodes, *nodes]))
    if scene.overtakes_write(grown.nodes, grown.reads):
        scene.miss(unit.name, "convolution", "its input is overwritten before its last step")
        return None
    return grown

"""Parallel convolutions of one input whose sum is one convolution (RepVGG, arXiv 2101.03697)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from octavo.graph.fold import offset_in
from octavo.graph.fusible import Branch, Unit, in_order
from octavo.graph.nodes import Add, Norm
from octavo.graph.view import Scene

__all__ = ["parallel"]


def parallel(scene: Scene, units: Sequence[Unit]) -> list[Unit]:
    """Puts units that are summed into one, with BatchNorms of the same input.

    Args:
        scene: the graph.
        units: convolutions with their BatchNorm, nothing else.
    """
    by_out = {unit.out: unit for unit in units}
    for node, step in scene.steps.items():
        if not isinstance(step, Add) or _is_part_of_a_sum(scene, node):
            continue
        terms, sums = _terms(scene, node)
        merged = _merged(scene, by_out, terms, sums)
        if merged is not None:
            for term in terms:
                by_out.pop(term, None)
            by_out[node] = merged
    return sorted(by_out.values(), key=lambda unit: unit.nodes[0])


def _is_part_of_a_sum(scene: Scene, node: fx.Node) -> bool:
    reader = scene.sole_reader(node)
    return reader is not None and isinstance(scene.steps.get(reader), Add)


def _terms(scene: Scene, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is summed, and the nodes that sum."""
    step = scene.steps[node]
    terms: list[fx.Node] = []
    sums = [node]
    for term in step.terms if isinstance(step, Add) else ():
        if isinstance(scene.steps.get(term), Add) and _is_part_of_a_sum(scene, term):
            inner, inner_sums = _terms(scene, term)
            terms += inner
            sums += inner_sums
        else:
            terms.append(term)
    return terms, sums


def _merged(
    scene: Scene, by_out: dict[fx.Node, Unit], terms: Sequence[fx.Node], sums: Sequence[fx.Node]
) -> Unit | None:
    units = [by_out[term] for term in terms if term in by_out]
    if not units or len(set(terms)) < len(terms) or len({unit.x for unit in units}) > 1:
        return None
    x = units[0].x
    main = max(units, key=lambda unit: unit.conv.weight[0, 0].numel())
    branches, nodes = [], [*sums]
    for term in terms:
        step = scene.steps.get(term)
        if term in by_out:
            branches.append(by_out[term].branches[0])
            nodes += by_out[term].nodes
        elif isinstance(step, Norm) and step.x is x:
            branches.append(Branch(None, step))
            nodes.append(term)
        else:
            return None  # a residual, which is no part of the convolution
    alone = all(scene.sole_reader(term) is not None for term in terms)
    if not alone or any(offset_in(main.branches[0], one) is None for one in branches):
        reason = "it is summed with convolutions whose stride, groups, padding or readers differ"
        scene.miss(main.name, "parallel convolutions", reason)
        return None
    first = main.branches[0]
    ordered = (first, *(one for one in branches if one is not first))
    unit = replace(main, branches=ordered, nodes=in_order(nodes))
    return None if scene.overtakes_write(unit.nodes, unit.reads) else unit

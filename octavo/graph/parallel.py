"""Parallel convolutions of one input whose sum is one convolution (RepVGG, arXiv 2101.03697)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from octavo.graph.fold import offset_in
from octavo.graph.fusible import FusionGroup, Term, in_order
from octavo.graph.nodes import Add, Norm
from octavo.graph.view import GraphView

__all__ = ["parallel"]


def parallel(view: GraphView, groups: Sequence[FusionGroup]) -> list[FusionGroup]:
    """Puts groups that are summed into one, with BatchNorms of the same input.

    Args:
        view: the graph.
        groups: convolutions with their BatchNorm, nothing else.
    """
    by_out = {group.out: group for group in groups}
    for node, operation in view.operations.items():
        if not isinstance(operation, Add) or _is_part_of_a_sum(view, node):
            continue
        terms, sums = _terms(view, node)
        merged = _merged(view, by_out, terms, sums)
        if merged is not None:
            for term in terms:
                by_out.pop(term, None)
            by_out[node] = merged
    return sorted(by_out.values(), key=lambda group: group.nodes[0])


def _is_part_of_a_sum(view: GraphView, node: fx.Node) -> bool:
    reader = view.sole_reader(node)
    return reader is not None and isinstance(view.operations.get(reader), Add)


def _terms(view: GraphView, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is summed, and the nodes that sum."""
    operation = view.operations[node]
    terms: list[fx.Node] = []
    sums = [node]
    for term in operation.terms if isinstance(operation, Add) else ():
        if isinstance(view.operations.get(term), Add) and _is_part_of_a_sum(view, term):
            inner, inner_sums = _terms(view, term)
            terms += inner
            sums += inner_sums
        else:
            terms.append(term)
    return terms, sums


def _merged(
    view: GraphView,
    by_out: dict[fx.Node, FusionGroup],
    terms: Sequence[fx.Node],
    sums: Sequence[fx.Node],
) -> FusionGroup | None:
    groups = [by_out[term] for term in terms if term in by_out]
    if not groups or len(set(terms)) < len(terms) or len({group.x for group in groups}) > 1:
        return None
    x = groups[0].x
    main = max(groups, key=lambda group: group.conv.weight[0, 0].numel())
    parts: list[Term] = []
    nodes = [*sums]
    for term in terms:
        operation = view.operations.get(term)
        if term in by_out:
            parts.append(by_out[term].terms[0])
            nodes += by_out[term].nodes
        elif isinstance(operation, Norm) and operation.x is x:
            parts.append(Term(None, operation))
            nodes.append(term)
        else:
            return None  # a residual, which is no part of the convolution
    alone = all(view.sole_reader(term) is not None for term in terms)
    if not alone or any(offset_in(main.terms[0], one) is None for one in parts):
        reason = "it is summed with convolutions whose stride, groups, padding or readers differ"
        view.leave(main.name, "parallel convolutions", reason)
        return None
    first = main.terms[0]
    ordered = (first, *(one for one in parts if one is not first))
    group = replace(main, terms=ordered, nodes=in_order(nodes))
    return None if view.overtakes_write(group.nodes, group.reads) else group

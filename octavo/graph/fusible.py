"""What will become one layer, and the nodes of the graph that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from octavo.graph.nodes import Conv, Norm
from octavo.kernels.common.convolution import Sides

__all__ = ["FusionGroup", "SeparableGroup", "Term", "in_order"]


@dataclass(frozen=True, eq=False)
class Term:
    """A convolution and its BatchNorm; without a convolution, a BatchNorm of the input itself.

    Attributes:
        conv: the convolution.
        norm: what follows it.
        padding: of the convolution, with that of a padding before it.
    """

    conv: Conv | None
    norm: Norm | None
    padding: Sides = (0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class FusionGroup:
    """A convolution to be: final(activation(sum of terms(x)) + residual).

    Attributes:
        conv: that gives the stride, the padding, the groups and the name.
        x: the input.
        terms: parallel convolutions, `conv`'s first.
        nodes: all that it stands for, in the order of the graph; the last gives the result.
        activation: of the sum of the terms.
        residual: what is added then.
        final: activation of that sum.
    """

    conv: Conv
    x: fx.Node
    terms: tuple[Term, ...]
    nodes: tuple[fx.Node, ...]
    activation: str = "none"
    residual: fx.Node | None = None
    final: str = "none"

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.conv.name

    @property
    def out(self) -> fx.Node:
        """The node that gives the result."""
        return self.nodes[-1]

    @property
    def padding(self) -> Sides:
        """Of the input."""
        return self.terms[0].padding

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.conv.depthwise

    @property
    def pointwise(self) -> bool:
        """Whether it combines the channels of each pixel."""
        conv = self.conv
        alone = tuple(conv.weight.shape[2:]) == (1, 1) and conv.groups == 1
        return alone and conv.stride == (1, 1) and not any(self.padding)

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """What it is computed from."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that it stands for."""
        names = {node: str(node.target) for node in self.nodes if node.op == "call_module"}
        for term in self.terms:
            names |= {one.node: one.name for one in (term.conv, term.norm) if one}
        return tuple(dict.fromkeys(names[node] for node in self.nodes if node in names))

    @property
    def pattern(self) -> str:
        """What it computes, in words."""
        kind = "depthwise" if self.depthwise else "pointwise" if self.pointwise else "convolution"
        parts = [kind + (" + BN" if self.terms[0].norm else "")]
        if len(self.terms) > 1:
            parts = [f"{len(self.terms)} parallel convolutions"]
        if self.activation != "none":
            parts.append(self.activation)
        if self.residual is not None:
            parts.append("residual")
        if self.final != "none":
            parts.append(self.final)
        return " + ".join(parts)

    @property
    def convolutions(self) -> int:
        """How many convolutions of the model it stands for."""
        return sum(term.conv is not None for term in self.terms)

    @property
    def worthwhile(self) -> bool:
        """Whether it is more than the module that was there, or one with a kernel of ours."""
        return len(self.nodes) > 1 or self.depthwise or self.conv.node.op != "call_module"


@dataclass(frozen=True, eq=False)
class SeparableGroup:
    """A depthwise convolution and the pointwise one that alone reads it."""

    depthwise: FusionGroup
    pointwise: FusionGroup

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All that it stands for, in the order of the graph."""
        return in_order([*self.depthwise.nodes, *self.pointwise.nodes])

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.depthwise.name

    @property
    def out(self) -> fx.Node:
        """The node that gives the result."""
        return self.pointwise.out

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """What it is computed from."""
        return (self.depthwise.x, *self.pointwise.reads[1:])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that it stands for."""
        return tuple(dict.fromkeys([*self.depthwise.layers, *self.pointwise.layers]))

    @property
    def pattern(self) -> str:
        """What it computes, in words."""
        return f"{self.depthwise.pattern} + {self.pointwise.pattern}"

    @property
    def convolutions(self) -> int:
        """How many convolutions of the model it stands for."""
        return self.depthwise.convolutions + self.pointwise.convolutions


def in_order(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Nodes as the graph has them."""
    return tuple(sorted(set(nodes)))

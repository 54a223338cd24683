"""A graph as the patterns see it: operations, readers, and what writes into memory."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import fx, nn

from octavo.core.fusions import Unfused
from octavo.graph.nodes import Conv, Norm, Operation, read

__all__ = ["GraphView"]

MOVES = ("permute", "transpose", "movedim", "contiguous")
WRITING = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


class GraphView:
    """A graph, and notes on what was nearly found in it.

    Args:
        graph: to search; not changed.
        root: holds the modules and tensors that it names.

    Attributes:
        graph: as given.
        root: as given.
        operations: what the nodes compute, for those that are operations.
        unfused: in the order in which they were found.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.operations: dict[fx.Node, Operation] = {}
        for node in graph.nodes:
            operation = read(node, root)
            if operation is not None:
                self.operations[node] = operation
        self.unfused: list[Unfused] = []

    def leave(self, name: str, kind: str, reason: str) -> None:
        """Takes note of a layer that stays."""
        found = Unfused(name, kind, reason)
        if found not in self.unfused:
            self.unfused.append(found)

    def sole_reader(self, node: fx.Node) -> fx.Node | None:
        """The only node that reads this one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def describe(self, node: fx.Node) -> str:
        """What a node is, for a person."""
        if node.op == "output":
            return "the output of the model"
        if node.op == "call_module":
            kind = type(self.root.get_submodule(str(node.target))).__name__
            return f"{kind} {str(node.target)!r}"
        return str(getattr(node.target, "__name__", node.target)).split(".")[0]

    def readers(self, node: fx.Node) -> str:
        """What reads a node, for a person."""
        found = []
        for reader in node.users:
            found.append(self.describe(reader))
            following = self.sole_reader(reader)
            if found[-1] in MOVES and following is not None:
                found[-1] += f" and then {self.describe(following)}"
        return ", ".join(found) or "nothing"

    def overtakes_write(self, nodes: Collection[fx.Node], reads: Iterable[fx.Node]) -> bool:
        """Whether something writes into what is read, between the first node and the last.

        A fused layer stands where the last of its nodes was, so it would read too late.
        """
        origins = {self._origin(one) for one in reads}
        last, node = max(nodes), min(nodes).next
        while node is not last and node.op != "root":
            written = self.written(node)
            if node not in nodes and written is not None and self._origin(written) in origins:
                return True
            node = node.next
        return False

    def written(self, node: fx.Node) -> fx.Node | None:
        """The node whose memory a node may write into."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if node.op == "call_module":
            writes = bool(getattr(self.root.get_submodule(str(node.target)), "inplace", False))
        elif isinstance(node.target, torch._ops.OpOverload):
            writes = node.target._schema.is_mutable
        else:
            name = getattr(node.target, "__name__", str(node.target))
            flags = [*node.args, *node.kwargs.values()]  # F.relu(x, True)
            writes = (
                node.target in WRITING
                or (name.endswith("_") and not name.endswith("__"))
                or any(flag is True for flag in flags)
                or "out" in node.kwargs
            )
        return node.args[0] if writes else None

    def _origin(self, node: fx.Node) -> fx.Node:
        """The first node whose memory this one may share."""
        while (
            node.op.startswith("call")
            and not isinstance(self.operations.get(node), (Conv, Norm))
            and node.args
            and isinstance(node.args[0], fx.Node)
        ):
            node = node.args[0]
        return node

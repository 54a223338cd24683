"""Recognises activations by what they give, however they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from octavo.layers.structure import activation_of, has_hooks

__all__ = ["activation_after", "is_activation"]

MOST_NODES = 6
"""Nodes of the longest way to write an activation: x * (relu6(x + 3) / 6), and dropout after it."""
NAMESPACES = ("torch", "_operator", "math")


def is_activation(module: nn.Module) -> bool:
    """Whether a module that holds nothing computes an activation that kernels know."""
    return not any(True for _ in module.children()) and bool(activation_of(module))


def activation_after(node: fx.Node, root: nn.Module) -> tuple[str, tuple[fx.Node, ...]] | None:
    """The activation that all readers of a node compute together.

    The readers, and theirs in turn, are taken as long as they need nothing but the node and
    constants. What they compute is evaluated on a row of probes: x * sigmoid(x) is found like
    F.silu, and relu6(x + 3) * x / 6 like nn.Hardswish.

    Args:
        node: whose result is activated.
        root: holds the modules that the graph names.

    Returns:
        name of the activation, and the nodes that compute it, the result last.
    """
    inside: list[fx.Node] = []
    found = None
    while len(inside) < MOST_NODES:
        following = _first_reader([node, *inside])
        if following is None or not _evaluable(following, {node, *inside}, root):
            break
        inside.append(following)
        if _is_exit(node, inside):
            kind = activation_of(_Function(node, inside, root))
            if kind:
                found = kind, tuple(inside)
    return found


def _first_reader(nodes: list[fx.Node]) -> fx.Node | None:
    """The first in the graph that reads one of the nodes, and is none of them."""
    readers = {user for node in nodes for user in node.users} - set(nodes)
    return min(readers, default=None)


def _is_exit(node: fx.Node, inside: list[fx.Node]) -> bool:
    """Whether nothing else than the last node is read from outside."""
    within = set(inside)
    return all(set(one.users) <= within for one in [node, *inside[:-1]])


def _evaluable(node: fx.Node, known: set[fx.Node], root: nn.Module) -> bool:
    if not set(node.all_input_nodes) <= known:
        return False
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not module.state_dict() and not has_hooks(module)
    if node.op == "call_function":
        return str(getattr(node.target, "__module__", "")).split(".")[0] in NAMESPACES
    return node.op == "call_method"


class _Function:
    """What some nodes compute together, as a function of the node they follow."""

    def __init__(self, node: fx.Node, nodes: list[fx.Node], root: nn.Module) -> None:
        self._node, self._nodes, self._root = node, nodes, root

    def __call__(self, x: torch.Tensor) -> Any:
        values: dict[fx.Node, Any] = {self._node: x}
        for node in self._nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = _call(node, args, kwargs, self._root)
        return values[self._nodes[-1]]


def _call(node: fx.Node, args: Any, kwargs: Any, root: nn.Module) -> Any:
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]

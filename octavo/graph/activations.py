"""Recognises activations by what they give, however they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from octavo.core.hooks import has_hooks
from octavo.kernels.common.epilogue import ACTIVATIONS
from octavo.layers.linear.int8 import is_linear

__all__ = ["activation_after", "activation_of", "code_of", "following_activations", "is_activation"]

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


def following_activations(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str, str]]:
    """Linear layers whose only reader is an activation that `int8_gemm` can take over.

    Yields:
        parent, layer, name of the parent's attribute that holds the activation, and which it is.
    """
    for parent in model.modules():
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            kind = activation_of(parent.activation)
            if kind and isinstance(parent.linear1, nn.Linear):
                yield parent, parent.linear1, "activation", kind
        elif any(is_linear(child) for child in parent.children()):
            yield from _traced(parent)


def _traced(parent: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str, str]]:
    graph = code_of(parent)
    if graph is None:
        return
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1 or calls.count(node.target) != 1:
            continue
        (user,) = node.users
        if user.op != "call_module" or calls.count(user.target) != 1 or user.args != (node,):
            continue
        if "." in user.target:  # held by another module, which may use it elsewhere
            continue
        layer, after = (parent.get_submodule(n.target) for n in (node, user))
        kind = activation_of(after)
        if is_linear(layer) and kind:
            yield parent, layer, user.target, kind


def code_of(module: nn.Module) -> fx.Graph | None:
    """What a module's own code does, each child a call; None where torch.fx cannot follow it."""
    try:
        return _Leaves().trace(module)
    except Exception:  # whatever the code does with what stands for its tensors
        return None


class _Leaves(fx.Tracer):
    """Looks into no child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def activation_of(function: Any) -> str:
    """Which of the kernels' activations a function or module computes; nothing for another.

    It is recognised by what it gives on a row of probes, so that classes of other libraries are
    found too: in float64, where two ways to write a function agree, or in float32 if it takes no
    other.
    """
    if isinstance(function, nn.Module) and function.state_dict():
        return ""
    return _activation_in(function, torch.float64) or _activation_in(function, torch.float32)


def _activation_in(function: Any, dtype: torch.dtype) -> str:
    large = torch.tensor([100.0, 1e4, 1e30])  # a clamp far out is no ReLU
    row = torch.cat([torch.linspace(-9, 9, 1001), torch.zeros(1), large, -large]).to(dtype)
    fitting = list(_known())
    # twice, to tell what is not computed value by value; the second has a mean, and a large one
    for probe in (row, row[300:-1].flip(0)):
        try:
            with torch.no_grad():
                found = function(probe.clone())
        except Exception:
            return ""
        if not isinstance(found, torch.Tensor) or found.shape != probe.shape:
            return ""
        fitting = [name for name in fitting if _alike(found, _known()[name](probe))]
    return fitting[0] if fitting else ""


def _alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.allclose(one, two, rtol=1e-6, atol=1e-7)


def _known() -> Mapping[str, Any]:
    return {name: function for name, function in ACTIVATIONS.items() if name != "none"}

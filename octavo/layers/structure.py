"""Changes to a model's structure that do not change what it computes, and can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from octavo.kernels.int8_gemm.reference import ACTIVATIONS
from octavo.layers.attention import MultiheadAttention, why_not_taken_apart
from octavo.layers.linear_kinds import is_linear

__all__ = [
    "Edits",
    "activation_of",
    "code_of",
    "following_activations",
    "has_hooks",
    "places",
    "take_apart",
]


class Edits:
    """Changes to modules, and how to take each of them back."""

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, which need not be there."""
        if hasattr(owner, name):
            self._back.append(partial(setattr, owner, name, getattr(owner, name)))
        else:
            self._back.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    def hook(self, handle: RemovableHandle) -> None:
        """Takes note of a hook that was put on a module."""
        self._back.append(handle.remove)

    def undo(self) -> None:
        """Puts everything back, the last change first."""
        while self._back:
            self._back.pop()()


def places(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parent that holds a module, and under which name."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the caller's runs when the module does."""
    return bool(
        "forward" in vars(module)  # a function that was put in its place
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def take_apart(model: nn.Module, edits: Edits) -> dict[str, str]:
    """Puts `MultiheadAttention` in the place of each nn.MultiheadAttention that allows it.

    Returns:
        name -> why it stays, for the others.
    """
    refused = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        reason = why_not_taken_apart(module) if name else "it is the model itself"
        if reason:
            refused[name] = reason
            continue
        new = MultiheadAttention(module)
        for parent, attribute in list(places(model, module)):
            edits.set(parent, attribute, new)
    return refused


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

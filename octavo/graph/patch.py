"""Changes to a model's structure that do not change what it computes, and can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from octavo.layers.attention.multihead import MultiheadAttention, decompose_reason

__all__ = ["Patch", "decompose", "parents"]


class Patch:
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

    def rollback(self) -> None:
        """Puts everything back, the last change first."""
        while self._back:
            self._back.pop()()


def parents(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parent that holds a module, and under which name."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def decompose(model: nn.Module, patch: Patch) -> dict[str, str]:
    """Puts `MultiheadAttention` in the place of each nn.MultiheadAttention that allows it.

    Returns:
        name -> why it stays, for the others.
    """
    refused = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        reason = decompose_reason(module) if name else "it is the model itself"
        if reason:
            refused[name] = reason
            continue
        new = MultiheadAttention(module)
        for parent, attribute in list(parents(model, module)):
            patch.set(parent, attribute, new)
    return refused

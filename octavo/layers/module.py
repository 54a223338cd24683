"""What quantized modules have in common: codes and float32 scales that `.to` does not spoil."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from octavo.core.models import outside_inference_mode

__all__ = ["QuantizedModule", "module_options"]

_Moves = dict[int, tuple[torch.Tensor, torch.Tensor]]
_moves: weakref.WeakKeyDictionary[Callable[..., Any], _Moves] = weakref.WeakKeyDictionary()
"""What one call of `.to` has made of each buffer; it ends with the call."""


class QuantizedModule(nn.Module):
    """A module for inference whose weights are codes.

    `.to(dtype)` and `.half()` change the type in which it computes, but never its scales, which
    stay float32: a scale that float16 cannot hold would move every weight of a channel. Buffers
    that two modules share (tied weights) are still shared after `.to`.

    Attributes:
        float32: names of the buffers that stay float32.
        record: names of the buffers of its quantized weight: values, scale and zero point.
        operators: names of those that it computes with, as far as they have C for CPUs.
    """

    float32: tuple[str, ...] = ()
    record: tuple[str, ...] = ("weight", "weight_scale", "zero_point")
    operators: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """Arguments that make a module of the same form, as JSON can hold them.

        Of an argument that is a buffer too, whether it is there.
        """
        names = list(inspect.signature(type(self)).parameters)
        return {
            name: self._buffers[name] is not None if name in self._buffers else getattr(self, name)
            for name in names
            if name not in ("device", "dtype")
        }

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        known = inspect.signature(type(self)).parameters
        given = self.config().items()
        return ", ".join(f"{key}={value!r}" for key, value in given if value != known[key].default)

    @outside_inference_mode()
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        moved = _moves.setdefault(fn, {})
        for name, old in self._buffers.items():
            if old is None:
                continue
            if id(old) not in moved:
                moved[id(old)] = old, _convert(fn, old, keep=name in self.float32)
            self._buffers[name] = moved[id(old)][1]
        return self


def module_options(kind: type[nn.Module], module: nn.Module) -> dict[str, Any]:
    """Those arguments of a class that a module of another one has as attributes."""
    names = inspect.signature(kind).parameters
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _convert(
    fn: Callable[[torch.Tensor], torch.Tensor], old: torch.Tensor, *, keep: bool
) -> torch.Tensor:
    new = fn(old)
    if not keep or new.dtype == old.dtype:
        return new
    if old.is_meta or new.is_meta:
        return torch.empty_like(new, dtype=old.dtype)
    return old.to(new.device)

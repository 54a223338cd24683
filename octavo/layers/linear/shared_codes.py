"""Quantized values that layers share, where they are given the same tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.kernels.dynamic_quantize import schema as dynamic_quantize

__all__ = ["SharedInput"]

Quantized = tuple[torch.Tensor, torch.Tensor]


class SharedInput:
    """Quantizes for the layers of a module, each tensor once in a call of that module.

    Queries, keys and values of a self-attention are layers over the same tokens: three dynamic
    quantizations would give the same values; and a norm can quantize its result for the layer
    behind it. Nothing is kept between calls, when a caller may have written into its tensor.
    Threads that call one module at once may quantize anew, and never get another tensor's values.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:  # noqa: ARG002
        """A forward pre-hook of the module."""
        self._last = ()

    def end(self, module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:  # noqa: ARG002
        """A forward hook of the module."""
        self._last = None

    def quantized(self, x: torch.Tensor) -> Quantized:
        """Values int8 and per-token scales of x, from the layer before if that had the same x."""
        last = self._last
        if last and last[0] is x:
            shared: Quantized = last[1]
            return shared
        made: Quantized = dynamic_quantize.OPERATOR(x, None, True)
        self.put(x, made)
        return made

    def put(self, x: torch.Tensor, quantized: Quantized) -> None:
        """Keeps what somebody has made of x, within a call of the module."""
        if self._last is not None:
            self._last = (x, quantized)

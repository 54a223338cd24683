"""Codes that layers of one module share, where they are given the same tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["SharedCodes"]

Codes = tuple[torch.Tensor, torch.Tensor]


class SharedCodes:
    """Quantizes for the layers of a module, each tensor once in a call of that module.

    Queries, keys and values of a self-attention are layers over the same tokens: three dynamic
    quantizations would give the same codes. Nothing is kept between calls, when a caller may have
    written into its tensor. Threads that call one module at once may quantize anew, and never get
    codes of another tensor.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, ...] | None = None

    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:  # noqa: ARG002
        """A forward pre-hook of the module."""
        self._last = ()

    def end(self, module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:  # noqa: ARG002
        """A forward hook of the module."""
        self._last = None

    def codes(self, x: torch.Tensor, quantize: Callable[[torch.Tensor], Codes]) -> Codes:
        """What `quantize` makes of x, as it was made for the layer before if that had the same x.

        Args:
            x: what a layer was given.
            quantize: gives codes and scales; layers that share have the same one.
        """
        last = self._last
        if last and last[0] is x and last[1] is quantize:
            shared: Codes = last[2]
            return shared
        made = quantize(x)
        if last is not None:
            self._last = (x, quantize, made)
        return made

"""LayerNorm(dropout(linear(x)) + residual), with which the blocks of transformers' encoders end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from octavo.core.hooks import any_global_hooks, has_hooks
from octavo.kernels.add_norm.schema import add_norm
from octavo.kernels.common.epilogue import FLOATS
from octavo.layers.linear.shared_codes import SharedInput

__all__ = ["AddNorm", "Roles"]


class Roles(NamedTuple):
    """Names of what an `AddNorm` is made of.

    Attributes:
        linear: of the layer.
        norm: of the nn.LayerNorm.
        dropout: of the nn.Dropout, or nothing.
        x: of the layer's input among the arguments.
        residual: of what is added, likewise.
    """

    linear: str
    norm: str
    dropout: str
    x: str
    residual: str


class AddNorm(nn.Module):
    """Stands for a module that computes norm(dropout(linear(x)) + residual) and nothing else.

    It has that module's children under their names, and its arguments. Sum and norm are one
    operator, `octavo.kernels.add_norm`; hooks on the norm, autocast, and inputs of several dtypes
    make them two calls of torch again.

    Args:
        children: the layers by name.
        roles: which of them is what.
        stands_for: name of the module's class.

    Attributes:
        shared: takes what the next layer would quantize; None where that is not known.
    """

    shared: SharedInput | None = None

    operators = ("add_norm",)

    def __init__(self, children: dict[str, nn.Module], roles: Roles, stands_for: str) -> None:
        super().__init__()
        self.roles, self.stands_for = roles, stands_for
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """From x [..., K] and a residual [..., N] to [..., N], called like the module."""
        x, residual = args if len(args) == 2 and not kwargs else self._bound(args, kwargs)
        y: torch.Tensor = self._modules[self.roles.linear](x)  # type: ignore[misc]
        if self.roles.dropout:
            y = self._modules[self.roles.dropout](y)  # type: ignore[misc]
        norm: Any = self._modules[self.roles.norm]
        if not _fits(norm, y, residual):
            result: torch.Tensor = norm(y + residual)
            return result
        shared = self.shared if y.dtype == torch.float32 else None
        gradient = torch.is_grad_enabled() and (y.requires_grad or residual.requires_grad)
        quantize = shared is not None and not gradient
        y, codes, scale = add_norm(
            y, residual, norm.weight, norm.bias, eps=norm.eps, quantize=quantize
        )
        if shared is not None and quantize:
            shared.put(y, (codes, scale))
        return y

    def _bound(
        self, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        names = (self.roles.x, self.roles.residual)
        given = dict(zip(names, args, strict=False))
        if len(args) > 2 or given.keys() & kwargs.keys() or {*given, *kwargs} != {*names}:
            raise TypeError(
                f"{self.stands_for}.forward() takes {' and '.join(names)}; it was given "
                f"{len(args)} without a name, and {', '.join(kwargs) or 'none by name'}"
            )
        given.update(kwargs)
        return given[names[0]], given[names[1]]

    def extra_repr(self) -> str:
        """Whose place it takes."""
        return f"of {self.stands_for}"


def _fits(norm: nn.Module, y: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether the operator computes what the norm would, and nobody would miss the norm's call."""
    return (
        type(norm) is nn.LayerNorm
        and not has_hooks(norm)
        and not any_global_hooks()
        and norm.normalized_shape == y.shape[-1:]
        and isinstance(residual, torch.Tensor)
        and residual.shape == y.shape
        and y.dtype in FLOATS
        and all(
            one is None or (one.dtype == y.dtype and one.device == y.device)
            for one in (residual, norm.weight, norm.bias)
        )
        and not torch.is_autocast_enabled(y.device.type)
    )

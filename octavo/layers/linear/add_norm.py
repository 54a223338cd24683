"""LayerNorm(linear(x) + residual), with which the blocks of transformers' encoders end.

Torch goes through memory once for the sum and again for the norm, and asks the system for new
memory each time: beside an INT8 product that counts. On a CPU the C here does both where the
product lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from octavo.core.hooks import has_hooks
from octavo.kernels.int8_linear.schema import body_for, dynamic_linear
from octavo.kernels.native.library import FLOAT, INT, POINTER, SIZE, Library, pointer, threads_for
from octavo.kernels.native.memory import new_result
from octavo.layers.linear.int8 import Int8Linear

__all__ = ["AddNorm"]

LANES = 16
LIBRARY = Library(
    Path(__file__).parents[2] / "kernels" / "add_norm" / "native.c",
    {"octavo_add_norm": [*[POINTER] * 4, FLOAT, POINTER, SIZE, SIZE, INT]},
)


class AddNorm(nn.Module):
    """Stands for a module whose code is LayerNorm(dropout(linear(x)) + residual).

    It has that module's children under their names. Where C can run and no gradient is wanted, the
    sum and the norm are computed in C, and differ from torch's in the last bits; any other call
    runs the module's own code. Compilers see one operator, `octavo::add_norm`.

    Args:
        kind: class of the module.
        children: its layers by name.
        roles: names of its linear layer, its norm, and its dropout or nothing.
    """

    def __init__(
        self, kind: type[nn.Module], children: dict[str, nn.Module], roles: tuple[str, str, str]
    ) -> None:
        super().__init__()
        self.kind, self.roles = kind, roles
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """From x [..., K] and a residual [..., N] to [..., N], called like the module."""
        parts = self._parts()
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        if parts and not kwargs and len(tensors) == len(args) == 2:
            if torch.compiler.is_compiling():
                if _traces(parts[1], *args):
                    return _traced(*parts, *args)
            elif _fits(*parts, *args):
                return _in_place(*parts, *args)
        return self.kind.forward(self, *args, **kwargs)

    def _parts(self) -> tuple[Int8Linear, nn.LayerNorm] | None:
        """The layers, if nobody would see that they are not called themselves."""
        linear, norm, dropout = (self._modules.get(name) for name in self.roles)
        if type(linear) is not Int8Linear or type(norm) is not nn.LayerNorm:
            return None  # somebody has put another layer there
        if norm.normalized_shape != (linear.out_features,) or not linear.is_dynamic:
            return None
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        if any(one is not None and has_hooks(one) for one in (linear, norm, dropout)):
            return None
        if dropout is not None and dropout.training:
            return None
        return linear, norm

    def extra_repr(self) -> str:
        """Whose place it takes."""
        return f"of {self.kind.__name__}"


def _fits(linear: Int8Linear, norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether `_in_place` can take these."""
    floats = _floats(residual, norm)
    return (
        body_for(x, linear.weight, linear.weight_scale, linear.bias, *floats) == "native"
        and residual.shape == (*x.shape[:-1], linear.out_features)
        and all(one.dtype == torch.float32 and one.is_cpu for one in floats)
        and all(one.is_contiguous() for one in floats)
        and not LIBRARY.why_not()
    )


def _floats(residual: torch.Tensor, norm: nn.LayerNorm) -> list[torch.Tensor]:
    parts: tuple[torch.Tensor | None, ...] = residual, norm.weight, norm.bias
    return [one for one in parts if one is not None]


def _in_place(
    linear: Int8Linear, norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    y = dynamic_linear(
        "native", x, linear.weight, linear.weight_scale, linear.bias, linear.activation
    )
    return _in_c(y, residual, norm.weight, norm.bias, norm.eps, y)


def _traces(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether a compiler should see the operator."""
    floats = x, *_floats(residual, norm)
    return (
        all(one.dtype == torch.float32 and one.device.type == "cpu" for one in floats)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in floats))
        and not torch.is_autocast_enabled("cpu")
        and not LIBRARY.why_not()
    )


def _traced(
    linear: Int8Linear, norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.octavo.add_norm(
        linear(x), residual, norm.weight, norm.bias, norm.eps
    )
    return y


def _in_c(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> torch.Tensor:
    n = x.shape[-1]
    LIBRARY.octavo_add_norm(
        x.data_ptr(),
        residual.data_ptr(),
        pointer(weight),
        pointer(bias),
        eps,
        out.data_ptr(),
        x.numel() // n,
        n,
        threads_for(x.numel() // LANES),
    )
    return out


def _run(*given: Any) -> torch.Tensor:
    """The operator, which also runs where a program that was exported is loaded."""
    x, residual, weight, bias, eps = given
    tensors = [one for one in (x, residual, weight, bias) if one is not None]
    plain = all(one.is_cpu and one.dtype == torch.float32 for one in tensors)
    if not plain or x.shape != residual.shape or not x.numel() or LIBRARY.why_not():
        return _in_torch(*given)
    x, residual = x.contiguous(), residual.contiguous()
    weight, bias = (None if one is None else one.contiguous() for one in (weight, bias))
    return _in_c(x, residual, weight, bias, eps, new_result(*x.shape))


def _in_torch(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> torch.Tensor:
    return functional.layer_norm(x + residual, x.shape[-1:], *rest)


torch.library.define(
    "octavo::add_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
torch.library.impl("octavo::add_norm", "CompositeExplicitAutograd")(_run)
torch.library.register_fake("octavo::add_norm")(_in_torch)

"""What happens to activations before they are quantized: a norm or an activation function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["ACTIVATIONS", "LayerNorm", "Prologue", "RmsNorm"]

ACTIVATIONS = ("none", "gelu", "gelu-tanh", "silu", "silu-mul")


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis (arXiv 1910.07467).

    Attributes:
        weight: floating [K], or none for 1.
        eps: added to the mean square.
    """

    weight: torch.Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (arXiv 1607.06450).

    Attributes:
        weight: floating [K], or none for 1.
        bias: floating [K], or none for 0.
        eps: added to the variance, which is the biased one.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Prologue:
    """The steps before quantization as the operators' flat schemas hold them.

    Attributes:
        norm: "none", "rms" or "layer"; not together with an activation.
        weight: of the norm, [K].
        bias: of the norm, [K].
        eps: of the norm.
        activation: one of ACTIVATIONS; "silu-mul" takes [..., 2K] and gives [..., K].
        smooth: the divisor that comes last, [K].
    """

    norm: str = "none"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0
    activation: str = "none"
    smooth: torch.Tensor | None = None

    def width(self, columns: int) -> int:
        """Length of the rows that are quantized, from that of the rows given."""
        return columns // 2 if self.activation == "silu-mul" else columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K] of floating x; x itself where there is nothing to do."""
        values = _activate(x.float(), self.activation)
        if self.norm != "none":
            shape = [values.shape[-1]]
            weight, bias = (
                None if value is None else value.detach().float()
                for value in (self.weight, self.bias)
            )
            if self.norm == "rms":
                values = functional.rms_norm(values, shape, weight, self.eps)
            else:
                values = functional.layer_norm(values, shape, weight, bias, self.eps)
        return values if self.smooth is None else values / self.smooth.detach().float()


def _activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu-tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "silu":
        return functional.silu(x)
    if activation == "silu-mul":
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)
    return x

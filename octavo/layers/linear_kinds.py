"""Linear layers by whatever class: nn.Linear, and transformers' Conv1D, whose weight is [K, N]."""

from __future__ import annotations

from torch import nn

__all__ = ["as_linear", "is_linear"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, with which GPT-2 computes its products."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether `as_linear` knows a module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """A linear layer as nn.Linear: itself, or one that shares the memory of its parameters.

    Args:
        module: one that `is_linear`.
    """
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight.detach().T, module.bias.detach()  # type: ignore[operator]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.train(module.training)

"""What pipelines do with any model: run it on a batch, and see how much it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from octavo.core.errors import InputError

__all__ = [
    "evaluating",
    "held_bytes",
    "in_evaluation",
    "outside_inference_mode",
    "run_batch",
]


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made here can be written to and kept track of, also where the caller infers.

    Kernels keep what they make of a weight beside it, and see by its version whether it changed;
    a tensor that was made in inference mode has none.
    """
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    with in_evaluation(model), torch.no_grad():
        yield


def run_batch(model: nn.Module, batch: Any, name: str) -> None:
    """Calls a model.

    Args:
        model: to call.
        batch: its argument, a tuple or list of its arguments, or a mapping of keyword arguments.
        name: of the batch, for messages.

    Raises:
        InputError: the batch does not fit the model.
    """
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{name} ({_kind(batch)}) does not fit the model: {error}") from error


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"keyword arguments {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} arguments; if one is the labels, leave it out"
    return type(batch).__name__


def held_bytes(module: nn.Module, *, recurse: bool = True) -> int:
    """Bytes of the parameters and buffers of a module; shared ones count once."""
    held = [*module.parameters(recurse), *module.buffers(recurse)]
    unique = {id(tensor): tensor for tensor in held}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())

"""octavo::linear_attention_backward, the gradient of octavo::linear_attention.

An operator of its own, so that a compiler keeps it whole: its loops follow the data.
"""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation
from octavo.kernels.linear_attention.backward import linear_attention_backward
from octavo.kernels.linear_attention.reference import Options, State, empty_state

__all__ = ["backward", "keep"]

TENSORS = 7
"""Arguments of the operator that are tensors: q, k, v, and those of `Options`."""
Tensors = tuple[torch.Tensor, ...]


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001 - torch's signature
    """Saves what the gradient needs: all arguments but the backend."""
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.options = inputs[TENSORS:-1]


def backward(
    ctx: Any, grad_out: torch.Tensor, grad_kv: torch.Tensor, grad_normalizer: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the operator's arguments."""
    tokens, others = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    options = Options(*others, *ctx.options)
    grads = _OPERATOR(*tokens, options, grad_out, State(grad_kv, grad_normalizer))
    of_initial = (None, None) if options.initial is None else grads[3:]
    return *grads[:3], None, None, *of_initial, *[None] * 5


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    grad_out: torch.Tensor,
    grads: State,
) -> None:
    """They come from a call that was validated."""


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    grad_out: torch.Tensor,
    grads: State,
) -> Tensors:
    last = grads if options.return_state else None
    *found, first = linear_attention_backward(q, k, v, options, grad_out, last)
    return *found, *first


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, *_: object
) -> Tensors:
    return *(torch.empty_like(one) for one in (q, k, v)), *empty_state(q, v, options)


_OPERATOR = Operator(
    "linear_attention_backward",
    _check,
    (Implementation("reference", lambda *_: "", _run, "last"),),
    _fake,
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
)

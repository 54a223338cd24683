"""octavo::linear_attention_backward, and how it becomes the gradient of octavo::linear_attention.

An operator of its own, so that a compiler keeps it whole: its loops follow the data.
"""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.linear_attention.backward import linear_attention_backward
from octavo.kernels.linear_attention.reference import Options, State, empty_state

__all__ = ["OPTIONS", "register_gradient"]

OPTIONS = (
    "Tensor? key_padding_mask, Tensor? cu_seqlens, Tensor? kv, Tensor? normalizer, "
    "str feature_map, bool causal, bool return_state, float eps"
)
"""The fields of `Options` in the schemas of both operators."""


def register_gradient(operator: Any) -> None:
    """Makes the operator, octavo::linear_attention, differentiable."""
    operator.register_autograd(_backward, setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:-1]


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_kv: torch.Tensor, grad_normalizer: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    tokens, others = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    grads = torch.ops.octavo.linear_attention_backward(
        *tokens, grad_out, grad_kv, grad_normalizer, *others, *ctx.options
    )
    of_initial = (None, None) if others[-1] is None else grads[3:]
    return *grads[:3], None, None, *of_initial, *[None] * 5


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    grad_kv: torch.Tensor,
    grad_normalizer: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    options = Options(*rest)
    last = State(grad_kv, grad_normalizer) if options.return_state else None
    *grads, first = linear_attention_backward(q, k, v, options, grad_out, last)
    return *grads, *first


_operator = torch.library.custom_op(
    "octavo::linear_attention_backward",
    _run,
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor grad_kv, Tensor grad_normalizer, "
        f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_operator.register_fake
def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    first = empty_state(q, v, Options(*rest[3:]))
    return *(torch.empty_like(one) for one in (q, k, v)), *first

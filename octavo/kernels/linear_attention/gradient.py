"""octavo::linear_attention_backward, and how it becomes the gradient of octavo::linear_attention.

An operator of its own, so that a compiler keeps it whole: its loops follow the data.
"""

from __future__ import annotations

from typing import Any

import torch

from octavo.kernels.linear_attention.backward import linear_attention_backward
from octavo.kernels.linear_attention.reference import Options, State

__all__ = ["register_gradient"]


def register_gradient(operator: Any) -> None:
    """Makes the operator, octavo::linear_attention, differentiable."""
    operator.register_autograd(_backward, setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001 - torch's signature
    *tensors, feature_map, causal, return_state, eps, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = feature_map, causal, return_state, eps


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_kv: torch.Tensor, grad_normalizer: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.octavo.linear_attention_backward(
        *ctx.saved_tensors, grad_out, grad_kv, grad_normalizer, *ctx.options
    )
    grad_q, grad_k, grad_v, grad_initial, grad_first = grads
    if ctx.saved_tensors[-1] is None:
        grad_initial = grad_first = None
    return grad_q, grad_k, grad_v, None, None, grad_initial, grad_first, *[None] * 5


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    kv: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_kv: torch.Tensor,
    grad_normalizer: torch.Tensor,
    feature_map: str,
    causal: bool,
    return_state: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    initial = None if kv is None or normalizer is None else State(kv, normalizer)
    options = Options(feature_map, causal, return_state, eps, key_padding_mask, cu_seqlens, initial)
    last = State(grad_kv, grad_normalizer) if return_state else None
    of_q, of_k, of_v, first = linear_attention_backward(q, k, v, options, grad_out, last)
    return of_q, of_k, of_v, first.kv, first.normalizer


_operator = torch.library.custom_op(
    "octavo::linear_attention_backward",
    _run,
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor? cu_seqlens, "
        "Tensor? kv, Tensor? normalizer, Tensor grad_out, Tensor grad_kv, "
        "Tensor grad_normalizer, str feature_map, bool causal, bool return_state, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_operator.register_fake
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    _mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (sequences, *q.shape[2:])
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty((*shape, v.shape[-1]), dtype=dtype),
        q.new_empty(shape, dtype=dtype),
    )

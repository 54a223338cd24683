"""Gradients of linear attention by its formula, in chunks as the reference: O(T) memory.

With ones behind the values, everything before the division is one linear map of states
[D, E + 1]. A first sweep over the queries gives their gradients and those of that map's results;
a second one, backwards, carries the gradient of the state and gives those of keys and values.
"""

from __future__ import annotations

import torch

from octavo.kernels.linear_attention.reference import (
    Options,
    Span,
    State,
    chunks,
    divide,
    joined,
    key_features,
    parted,
    query_features,
    spans,
    values_and_ones,
)

__all__ = ["linear_attention_backward"]


def linear_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    grad_out: torch.Tensor,
    grad_state: State | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, State]:
    """Gradients of q, k, v and the initial state.

    Args:
        q: [B, Tq, H, D].
        k: [B, Tk, H, D].
        v: [B, Tk, H, E].
        options: of the call.
        grad_out: [B, Tq, H, E].
        grad_state: of the returned state; None where none was returned.
    """
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    state = joined(options.initial, q, v, options)
    back = joined(grad_state, q, v, options)
    for span in spans(q, k, options):
        one = _Span(q, k, v, options, span, state[span.states], back[span.states], grads)
        one.run(grad_out)
    return (*grads, parted(back))


class _Span:
    """The sweeps over one span; states and gradients are updated in place."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: Options,
        span: Span,
        state: torch.Tensor,
        back: torch.Tensor,
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        self._q, self._k, self._v = q, k, v
        self._options, self._span = options, span
        self._state, self._back = state, back
        self._grad_q, self._grad_k, self._grad_v = grads

    def run(self, grad_out: torch.Tensor) -> None:
        """Fills the gradients; leaves that of the initial state in `back`."""
        causal = self._options.causal
        if not causal:
            for keys in chunks(self._span.keys):
                self._add_to_state(*self._of_keys(keys))
        rows = list(chunks(self._span.queries))
        grads = [self._queries(one, grad_out) for one in rows]
        if not causal:
            for one, grad in zip(rows, grads, strict=True):
                self._add_to_back(one, grad)
            for keys in chunks(self._span.keys):
                self._keys(keys, None)
            return
        for one, grad in zip(reversed(rows), reversed(grads), strict=True):
            self._keys(one, grad)
            self._add_to_back(one, grad)

    def _of_keys(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            key_features(self._k, rows, self._options),
            values_and_ones(self._v, rows, self._options),
        )

    def _add_to_state(self, features: torch.Tensor, values: torch.Tensor) -> None:
        self._state += features.mT @ values

    def _add_to_back(self, rows: range, grad: torch.Tensor) -> None:
        queries, _ = query_features(self._q, rows, self._options)
        self._back += queries.mT @ grad

    def _queries(self, rows: range, grad_out: torch.Tensor) -> torch.Tensor:
        """Stores the gradients of some queries; gives that of [numerator, normaliser]."""
        options = self._options
        queries, divisor = query_features(self._q, rows, options)
        sums = queries @ self._state
        if options.causal:
            features, values = self._of_keys(rows)
            sums += (queries @ features.mT).tril_() @ values
        result, inverse = divide(sums, options.eps)
        grad = _rows(grad_out, rows).transpose(1, 2).to(sums.dtype) * inverse
        grad = torch.cat([grad, -(grad * result).sum(-1, keepdim=True)], -1)
        found = grad @ self._state.mT
        if options.causal:
            found += (grad @ values.mT).tril_() @ features
            self._add_to_state(features, values)
        x = _rows(self._q, rows)
        slope = _slope(x, queries, divisor, options.feature_map)
        _rows(self._grad_q, rows).copy_((found * slope).transpose(1, 2))
        return grad

    def _keys(self, rows: range, grad: torch.Tensor | None) -> None:
        """Stores the gradients of some keys and values.

        Args:
            rows: which.
            grad: causal: of the results of the same rows; later rows are in `back` already.
        """
        options = self._options
        features, values = self._of_keys(rows)
        of_keys = values @ self._back.mT
        of_values = features @ self._back
        if grad is not None:
            queries, _ = query_features(self._q, rows, options)
            of_keys += (grad @ values.mT).tril_().mT @ queries
            of_values += (queries @ features.mT).tril_().mT @ grad
        x = _rows(self._k, rows)
        slope = _slope(x, features, torch.ones_like(features[..., :1]), options.feature_map)
        if options.key_padding_mask is not None:
            kept = _rows(options.key_padding_mask, rows)[:, None, :, None]
            slope, of_keys = slope.masked_fill(~kept, 0), of_keys.masked_fill(~kept, 0)
        _rows(self._grad_k, rows).copy_((of_keys * slope).transpose(1, 2))
        _rows(self._grad_v, rows).copy_(of_values[..., :-1].transpose(1, 2))


def _rows(x: torch.Tensor, rows: range) -> torch.Tensor:
    return x[:, rows.start : rows.stop]


def _slope(
    x: torch.Tensor, features: torch.Tensor, divisor: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """Derivative of features phi(x) / divisor, [B, H, rows, D], the divisor held fixed."""
    x = x.transpose(1, 2)
    inverse = divisor.reciprocal()
    if feature_map == "elu+1":
        return torch.where(x >= 0, inverse, features)
    return torch.where(x > 0, inverse, 0) if feature_map == "relu" else inverse

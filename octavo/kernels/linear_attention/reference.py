"""The oracle and the path of CPUs: chunks of the sequence, one after another, on a running state.

The normaliser is the last column of the state: values get a column of ones, and numerator and
denominator come out of the same products. Float64 inputs are computed in float64, all others in
float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = [
    "EPS",
    "FEATURE_MAPS",
    "Options",
    "Span",
    "State",
    "chunks",
    "divide",
    "empty_state",
    "joined",
    "key_features",
    "linear_attention",
    "linear_attention_step",
    "parted",
    "query_features",
    "spans",
    "values_and_ones",
    "working_dtype",
]

FEATURE_MAPS = ("elu+1", "relu", "identity")
EPS = 1e-30
"""Normalisers up to this, with queries whose largest feature is 1, count as vanished. It is small
enough for keys of -50, whose features are 2e-22, and far enough from the smallest float32 that
numerators above it keep their bits."""
CHUNK = 128


class State(NamedTuple):
    """What a sequence leaves behind: all that later tokens need of it.

    Attributes:
        kv: sum of phi(k_s) v_s^T, float32 [B or N, H, D, E].
        normalizer: sum of phi(k_s), float32 [B or N, H, D].
    """

    kv: torch.Tensor
    normalizer: torch.Tensor


class Options(NamedTuple):
    """Arguments of `schema.linear_attention` beside q, k and v, in the operator's order; see there.

    The initial state is `kv` and `normalizer`, or neither.
    """

    key_padding_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    kv: torch.Tensor | None
    normalizer: torch.Tensor | None
    feature_map: str
    causal: bool
    return_state: bool
    eps: float

    @property
    def initial(self) -> State | None:
        """The state that comes before."""
        if self.kv is None or self.normalizer is None:
            return None
        return State(self.kv, self.normalizer)

    def sequences(self, q: torch.Tensor) -> int:
        """How many there are, batches or packed."""
        return q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


@dataclass(frozen=True)
class Span:
    """Tokens that attend to each other, in all heads.

    Attributes:
        states: their place on the first axis of states.
        queries: their place on the second axis of q.
        keys: their place on the second axis of k and v.
    """

    states: slice
    queries: range
    keys: range


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `schema.linear_attention`; the state is two tensors, empty where it is not asked for."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    state = joined(options.initial, q, v, options)
    for span in spans(q, k, options):
        own = state[span.states]
        if not options.causal:
            for keys in chunks(span.keys):
                features = key_features(k, keys, options)
                own += features.mT @ values_and_ones(v, keys, options)
        for rows in chunks(span.queries):
            queries, _ = query_features(q, rows, options)
            sums = queries @ own
            if options.causal:
                features = key_features(k, rows, options)
                values = values_and_ones(v, rows, options)
                sums += (queries @ features.mT).tril_() @ values
                own += features.mT @ values
            result, _ = divide(sums, options.eps)
            out[:, rows.start : rows.stop] = result.transpose(1, 2)
    if not options.return_state:
        return out, state.new_empty(0), state.new_empty(0)
    return out, *parted(state)


def linear_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State, feature_map: str
) -> torch.Tensor:
    """See `schema.linear_attention_step`."""
    keys = phi(k.to(state.kv.dtype), feature_map)
    state.kv.add_(keys[..., None] * v[..., None, :])
    state.normalizer.add_(keys)
    queries, _ = _scaled(q.to(state.kv.dtype), feature_map)
    numerator = (queries[..., None, :] @ state.kv)[..., 0, :]
    normalizer = (queries * state.normalizer).sum(-1, keepdim=True)
    out, _ = divide(torch.cat([numerator, normalizer], -1), EPS)
    return out.to(q.dtype)


def phi(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Features of x, elementwise."""
    if feature_map == "elu+1":  # and not elu(x) + 1, which cancels to 0 in short floats
        return torch.where(x >= 0, x + 1, x.exp())
    return x.relu() if feature_map == "relu" else x


def key_features(k: torch.Tensor, rows: range, options: Options) -> torch.Tensor:
    """Features of some keys, [B, H, rows, D]; 0 for those that are masked."""
    features = phi(_heads(k, rows), options.feature_map)
    return _masked(features, rows, options)


def query_features(
    q: torch.Tensor, rows: range, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of some queries over the largest of each, [B, H, rows, D], and the divisor.

    A factor of a query's features leaves its result as it is, so this changes the range alone:
    the largest is 1. With "elu+1" and a query below 0 the features are exp(x - max(x)), since what
    they would be divided by may be less than the smallest float; the divisor given is 1.
    """
    return _scaled(_heads(q, rows), options.feature_map)


def values_and_ones(v: torch.Tensor, rows: range, options: Options) -> torch.Tensor:
    """Some values and a one behind each, [B, H, rows, E + 1]; 0 for those that are masked."""
    values = _heads(v, rows)
    return _masked(torch.cat([values, torch.ones_like(values[..., :1])], -1), rows, options)


def divide(sums: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., E + 1] -> all but the last over the last, 0 where that vanishes; and 1 / last or 0."""
    normalizer = sums[..., -1:]
    vanished = normalizer.abs() <= eps
    inverse = normalizer.masked_fill(vanished, 1).reciprocal().masked_fill(vanished, 0)
    return sums[..., :-1] * inverse, inverse


def joined(state: State | None, q: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """The state as one new tensor [B or N, H, D, E + 1]; zeros where there is no state."""
    if state is not None:
        return torch.cat([state.kv, state.normalizer[..., None]], -1)
    return q.new_zeros(options.sequences(q), *q.shape[2:], v.shape[3] + 1, dtype=working_dtype(q))


def parted(state: torch.Tensor) -> State:
    """What `joined` has joined, in new memory, as an operator has to return it."""
    both = state[..., :-1], state[..., -1]
    return State(*(one.clone(memory_format=torch.contiguous_format) for one in both))


def empty_state(q: torch.Tensor, v: torch.Tensor, options: Options) -> State:
    """Memory for a state, as an operator returns it."""
    shape, dtype = (options.sequences(q), *q.shape[2:]), working_dtype(q)
    return State(q.new_empty((*shape, v.shape[-1]), dtype=dtype), q.new_empty(shape, dtype=dtype))


def spans(q: torch.Tensor, k: torch.Tensor, options: Options) -> Iterator[Span]:
    """The packed sequences one after another; without any, all batches at once."""
    if options.cu_seqlens is None:
        yield Span(slice(None), range(q.shape[1]), range(k.shape[1]))
        return
    ends = options.cu_seqlens.tolist()
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        rows = range(start, stop)
        yield Span(slice(number, number + 1), rows, rows)


def chunks(rows: range) -> Iterator[range]:
    """The rows, a few at a time."""
    for start in rows[::CHUNK]:
        yield range(start, min(start + CHUNK, rows.stop))


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """In which sums are held: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads(x: torch.Tensor, rows: range) -> torch.Tensor:
    """Rows of [B, T, H, D] as [B, H, rows, D], in the type that is worked in."""
    return x[:, rows.start : rows.stop].transpose(1, 2).to(working_dtype(x))


def _masked(x: torch.Tensor, rows: range, options: Options) -> torch.Tensor:
    if options.key_padding_mask is None:
        return x
    kept = options.key_padding_mask[:, None, rows.start : rows.stop, None]
    return x.masked_fill(~kept, 0)


def _scaled(x: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    if feature_map == "elu+1":
        peak = x.amax(-1, keepdim=True)
        divisor = (peak + 1).clamp_min(1)
        return torch.where(x >= 0, x + 1, (x - peak.clamp_max(0)).exp()) / divisor, divisor
    features = phi(x, feature_map)
    divisor = features.abs().amax(-1, keepdim=True)
    divisor = divisor.masked_fill(divisor == 0, 1)
    return features / divisor, divisor

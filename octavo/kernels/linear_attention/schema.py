"""octavo::linear_attention, and octavo::linear_attention_step for decoding."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.common.epilogue import FLOATS, check_alike, check_tensor
from octavo.kernels.dispatch.operator import Operator
from octavo.kernels.dispatch.select import Implementation, triton_implementation, triton_reason
from octavo.kernels.linear_attention import gradient, reference
from octavo.kernels.linear_attention.reference import (
    EPS,
    FEATURE_MAPS,
    Options,
    State,
    empty_state,
    working_dtype,
)

__all__ = ["State", "linear_attention", "linear_attention_step"]

MAX_HEAD = 256
"""The longest keys and values of a head that the Triton kernels take."""
MAX_TOKEN = 1 << 23
"""Values of all heads of a token below which their kernels' offsets in a block have 32 bits."""
_check = functools.partial(check_tensor, x_name="q")


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "elu+1",
    causal: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    eps: float = EPS,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, State]:
    """Attention with a kernel of features in the place of softmax (arXiv 2006.16236).

    out_t = phi(q_t)^T S / (phi(q_t)^T z) with S = sum_s phi(k_s) v_s^T and z = sum_s phi(k_s),
    over all keys, or with `causal` over s <= t; an initial state is added to both sums. Queries
    are not scaled otherwise. Sums and normaliser are float32 whatever the inputs are.

    Where |phi(q_t)^T z| <= eps * max|phi(q_t)| the result is 0: all keys are masked, or "relu" has
    left nothing of them. Nothing is added to other normalisers. Those of "identity" have either
    sign and come close to 0 by chance, where results are as large as the quotient then is.

    Differentiable in q, k, v and the initial state, once.

    Args:
        q: float16, bfloat16 or float32 [B, Tq, H, D]; any strides. float64 on a CPU.
        k: [B, Tk, H, D] of the same dtype; causal: Tk = Tq.
        v: [B, Tk, H, E] of the same dtype.
        feature_map: phi: "elu+1" (x + 1 from 0 on, else exp(x)), "relu" or "identity".
        causal: whether a token sees itself and those before it only.
        key_padding_mask: bool [B, Tk]: True keeps a key, False leaves it out, whatever it holds.
        cu_seqlens: int32 [N + 1], on the device of q: N sequences packed into B = 1, sequence n
            being rows cu_seqlens[n] to cu_seqlens[n + 1]; the first is 0, the last T = Tq = Tk,
            and none is less than the one before it. Only on a CPU is that checked.
        initial_state: what came before; float32 (float64 for float64), of B or N sequences.
        return_state: also give the state after the last key.
        eps: see above; 0 or more.
        backend: "auto", "triton" (D and E up to 256) or "reference"; see `octavo.kernels`.

    Returns:
        [B, Tq, H, E] in the dtype of q; with `return_state` that and the `State`, in new memory.

    Raises:
        InputError: a wrong dtype, shape, device or name.
        UnsupportedError: the backend asked for cannot run this.
    """
    kv, normalizer = (None, None) if initial_state is None else initial_state
    options = Options(
        key_padding_mask, cu_seqlens, kv, normalizer, feature_map, causal, return_state, eps
    )
    out, kv, normalizer = OPERATOR(q, k, v, options, backend=backend)
    return (out, State(kv, normalizer)) if return_state else out


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: State,
    *,
    feature_map: str = "elu+1",
    backend: str = "auto",
) -> torch.Tensor:
    """One more token of causal `linear_attention`: adds it to the state and gives its result.

    Not differentiable. On a GPU it may be captured in a CUDA graph.

    Args:
        q: float16, bfloat16 or float32 [B, H, D]; any strides. float64 on a CPU.
        k: [B, H, D] of the same dtype.
        v: [B, H, E] of the same dtype.
        state: contiguous float32 (float64 for float64) of B sequences; updated in place.
        feature_map: as in `linear_attention`.
        backend: as in `linear_attention`.

    Returns:
        [B, H, E] in the dtype of q.

    Raises:
        InputError: a wrong dtype, shape, device or name, or a state that is not contiguous.
        UnsupportedError: the backend asked for cannot run this.
    """
    out: torch.Tensor = STEP_OPERATOR(q, k, v, state, feature_map, backend=backend)
    return out


def _check_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> None:
    _check_tokens(q, k, v)
    _check_feature_map(options.feature_map)
    batch, count = q.shape[:2]
    if k.shape[:1] != q.shape[:1] or k.shape[2:] != q.shape[2:] or v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are "
            "[B, Tq, H, D], [B, Tk, H, D] and [B, Tk, H, E]"
        )
    if (options.causal or options.cu_seqlens is not None) and k.shape[1] != count:
        raise InputError(
            f"q has {count} tokens and k {k.shape[1]}; causal attention and packed sequences "
            "need as many"
        )
    if not (options.eps >= 0 and math.isfinite(options.eps)):
        raise InputError(f"eps is {options.eps}; it must be 0 or more, and finite")
    mask = options.key_padding_mask
    _check("key_padding_mask", mask, [(batch, k.shape[1])], q, (torch.bool,))
    if options.cu_seqlens is not None:
        sequences = max(options.sequences(q), 0)
        _check("cu_seqlens", options.cu_seqlens, [(sequences + 1,)], q, (torch.int32,))
        if batch != 1:
            raise InputError(f"B is {batch}; packed sequences are rows of one batch: reshape them")
    if (options.kv is None) != (options.normalizer is None):
        raise InputError("initial_state has one of kv and normalizer; give both, or None")
    if options.initial is not None:
        _check_state(options.initial, options.sequences(q), q, v)


def _check_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State, feature_map: str
) -> None:
    _check_tokens(q, k, v, step=True)
    _check_feature_map(feature_map)
    if k.shape != q.shape or v.shape[:2] != q.shape[:2]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are "
            "[B, H, D], [B, H, D] and [B, H, E]"
        )
    _check_state(state, q.shape[0], q, v)
    for name, value in zip(State._fields, state, strict=True):
        if not value.is_contiguous():
            raise InputError(
                f"state.{name} has strides {list(value.stride())}, and is updated in place; "
                "make it contiguous first"
            )


def _check_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, step: bool = False) -> None:
    axes = "[B, H, D]" if step else "[B, T, H, D]"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype not in FLOATS and not (
            value.dtype == torch.float64 and value.device.type != "cuda"
        ):
            raise InputError(
                f"{name} is {value.dtype} on {value.device}; use float16, bfloat16 or float32"
            )
        check_alike(name, value, q, "q")
        if value.ndim != axes.count(",") + 1 or 0 in value.shape[-1:]:
            raise InputError(f"{name} is {list(value.shape)}; it must be {axes}, its last not 0")


def _check_feature_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise InputError(
            f"feature_map {feature_map!r} is unknown; use one of {', '.join(FEATURE_MAPS)}"
        )


def _check_state(state: State, sequences: int, q: torch.Tensor, v: torch.Tensor) -> None:
    dtypes, shape = (working_dtype(q),), (sequences, *q.shape[-2:])
    _check("state.kv", state.kv, [(*shape, v.shape[-1])], q, dtypes)
    _check("state.normalizer", state.normalizer, [shape], q, dtypes)


def _check_lengths(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """What the values are, where looking at them costs nothing."""
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise InputError(
            f"cu_seqlens is {ends}; it must rise from 0 to the {tokens} tokens that q has"
        )


def _fake(
    q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if options.return_state:
        return out, *empty_state(q, v, options)
    dtype = working_dtype(q)
    return out, q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype)


def _fake_step(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _reason(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: object) -> str:
    """Why the kernels cannot take these, or nothing."""
    longest = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float64:
        return "the kernels have no float64"
    if longest > MAX_HEAD:
        return f"heads of {q.shape[-1]} and {v.shape[-1]} are longer than {MAX_HEAD}"
    if q.shape[-2] * longest >= MAX_TOKEN:
        return f"{q.shape[-2]} heads of {longest} are {MAX_TOKEN} values per token or more"
    return triton_reason(q, (8, 0))


def _of_lengths(one: Implementation) -> Implementation:
    """Looks at the lengths first, which are values and so belong to each call."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Any:
        if options.cu_seqlens is not None:
            _check_lengths(options.cu_seqlens, q.shape[1])
        return one.run(q, k, v, options)

    return replace(one, run=run)


OPERATOR = Operator(
    "linear_attention",
    _check_call,
    (
        _of_lengths(triton_implementation("linear_attention", _reason)),
        _of_lengths(Implementation("reference", lambda *_: "", reference.linear_attention, "last")),
    ),
    _fake,
    returns="(Tensor, Tensor, Tensor)",
    gradient=(gradient.backward, gradient.keep),
)
STEP_OPERATOR = Operator(
    "linear_attention_step",
    _check_step,
    (
        triton_implementation("linear_attention_step", _reason, "linear_attention"),
        Implementation("reference", lambda *_: "", reference.linear_attention_step, "last"),
    ),
    _fake_step,
    updated=("state_kv", "state_normalizer"),
)

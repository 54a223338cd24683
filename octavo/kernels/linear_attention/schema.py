"""octavo::linear_attention, and octavo::linear_attention_step for decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.dispatch.select import Body, is_plain_call, select, why_not_triton
from octavo.kernels.linear_attention import reference
from octavo.kernels.linear_attention.gradient import OPTIONS, register_gradient
from octavo.kernels.linear_attention.reference import (
    EPS,
    FEATURE_MAPS,
    Options,
    State,
    empty_state,
    working_dtype,
)

__all__ = ["State", "linear_attention", "linear_attention_step"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD = 256
"""The longest keys and values of a head that the Triton kernels take."""
MAX_TOKEN = 1 << 23
"""Values of all heads of a token below which their kernels' offsets in a block have 32 bits."""


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
        backend: "auto", "triton" (D and E up to 256) or "reference"; one that is named runs or is
            refused.

    Returns:
        [B, Tq, H, E] in the dtype of q; with `return_state` that and the `State`, in new memory.

    Raises:
        InputError: a wrong dtype, shape, device or name.
        UnsupportedError: the backend asked for cannot run this.
    """
    _check_tokens(q, k, v)
    _check_feature_map(feature_map)
    batch, count = q.shape[:2]
    if k.shape[:1] != q.shape[:1] or k.shape[2:] != q.shape[2:] or v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; they are "
            "[B, Tq, H, D], [B, Tk, H, D] and [B, Tk, H, E]"
        )
    same = causal or cu_seqlens is not None
    if same and k.shape[1] != count:
        raise InputError(
            f"q has {count} tokens and k {k.shape[1]}; causal attention and packed sequences "
            "need as many"
        )
    if not (eps >= 0 and math.isfinite(eps)):
        raise InputError(f"eps is {eps}; it must be 0 or more, and finite")
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, torch.bool, (batch, k.shape[1]), q)
    sequences = batch
    if cu_seqlens is not None:
        sequences = cu_seqlens.numel() - 1
        _check("cu_seqlens", cu_seqlens, torch.int32, (max(sequences, 0) + 1,), q)
        if batch != 1:
            raise InputError(f"B is {batch}; packed sequences are rows of one batch: reshape them")
    if initial_state is not None:
        _check_state(initial_state, sequences, q, v)
    kv, normalizer = (None, None) if initial_state is None else initial_state
    tensors = (q, k, v, key_padding_mask, cu_seqlens, kv, normalizer)
    call = _run if is_plain_call(*tensors) else torch.ops.octavo.linear_attention
    out, kv, normalizer = call(*tensors, feature_map, causal, return_state, eps, backend)
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
    tensors = (q, k, v, *state)
    call = _run_step if is_plain_call(*tensors) else torch.ops.octavo.linear_attention_step
    out: torch.Tensor = call(*tensors, feature_map, backend)
    return out


def _check_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, step: bool = False) -> None:
    axes = "[B, H, D]" if step else "[B, T, H, D]"
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dtype not in FLOATS and not (
            value.dtype == torch.float64 and value.device.type != "cuda"
        ):
            raise InputError(
                f"{name} is {value.dtype} on {value.device}; use float16, bfloat16 or float32"
            )
        if value.dtype != q.dtype:
            raise InputError(f"{name} is {value.dtype} and q {q.dtype}; convert one of them")
        if value.ndim != axes.count(",") + 1 or 0 in value.shape[-1:]:
            raise InputError(f"{name} is {list(value.shape)}; it must be {axes}, its last not 0")
        if value.device != q.device:
            raise InputError(f"{name} is on {value.device} and q on {q.device}; move one of them")


def _check_feature_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise InputError(
            f"feature_map {feature_map!r} is unknown; use one of {', '.join(FEATURE_MAPS)}"
        )


def _check_state(state: State, sequences: int, q: torch.Tensor, v: torch.Tensor) -> None:
    dtype = working_dtype(q)
    kv, normalizer = state
    shape = (sequences, *q.shape[-2:])
    _check("state.kv", kv, dtype, (*shape, v.shape[-1]), q)
    _check("state.normalizer", normalizer, dtype, shape, q)


def _check(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], q: torch.Tensor
) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)}; it must be {dtype} {list(shape)}"
        )
    if value.device != q.device:
        raise InputError(f"{name} is on {value.device} and q on {q.device}; move one of them")


def _check_lengths(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """What the values are, where looking at them costs nothing."""
    if cu_seqlens.device.type != "cpu":
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise InputError(
            f"cu_seqlens is {ends}; it must rise from 0 to the {tokens} tokens that q has"
        )


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *given, backend = rest
    options = Options(*given)
    if options.cu_seqlens is not None:
        _check_lengths(options.cu_seqlens, q.shape[1])
    body = select("linear_attention", _BODIES, backend, q, k, v, options)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = body.run(q, k, v, options)
    return found


_operator = torch.library.custom_op(
    "octavo::linear_attention",
    _run,
    mutates_args=(),
    schema=(f"(Tensor q, Tensor k, Tensor v, {OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)"),
)


@_operator.register_fake
def _fake(
    q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = Options(*rest[:-1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if options.return_state:
        return out, *empty_state(q, v, options)
    dtype = working_dtype(q)
    return out, q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=dtype)


register_gradient(_operator)


def _run_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    normalizer: torch.Tensor,
    feature_map: str,
    backend: str,
) -> torch.Tensor:
    arguments = (q, k, v, State(kv, normalizer), feature_map)
    body = select("linear_attention_step", _STEP_BODIES, backend, *arguments)
    out: torch.Tensor = body.run(*arguments)
    return out


_step_operator = torch.library.custom_op(
    "octavo::linear_attention_step",
    _run_step,
    mutates_args=("kv", "normalizer"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!) normalizer, str feature_map, "
        "str backend) -> Tensor"
    ),
)


@_step_operator.register_fake
def _fake_step(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_rest: object) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _why_not(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: object) -> str:
    """Why the kernels cannot take these, or nothing."""
    longest = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float64:
        return "the kernels have no float64"
    if longest > MAX_HEAD:
        return f"heads of {q.shape[-1]} and {v.shape[-1]} are longer than {MAX_HEAD}"
    if q.shape[-2] * longest >= MAX_TOKEN:
        return f"{q.shape[-2]} heads of {longest} are {MAX_TOKEN} values a token or more"
    return why_not_triton(q, (8, 0))


def _triton(name: str) -> Callable[..., Any]:
    """A launcher by its name; Triton is imported with the first call."""

    def run(*arguments: Any) -> Any:
        from octavo.kernels.linear_attention import triton

        return getattr(triton, name)(*arguments)

    return run


_BODIES = (
    Body("triton", _why_not, _triton("linear_attention")),
    Body("reference", lambda *_: "", reference.linear_attention, "last"),
)
_STEP_BODIES = (
    Body("triton", _why_not, _triton("linear_attention_step")),
    Body("reference", lambda *_: "", reference.linear_attention_step, "last"),
)

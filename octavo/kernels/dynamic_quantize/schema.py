"""octavo::dynamic_quantize: symmetric int8 codes of activations, with scales found at run time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from octavo.core.errors import InputError
from octavo.kernels.dispatch.select import Body, is_plain_call, run, why_not_triton
from octavo.kernels.dispatch.tracing import is_inlined, wants_gradient
from octavo.kernels.dynamic_quantize import native, reference
from octavo.kernels.dynamic_quantize.prologue import ACTIVATIONS, LayerNorm, Prologue, RmsNorm

__all__ = ["LayerNorm", "RmsNorm", "add_dynamic_quantize", "dynamic_quantize"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def dynamic_quantize(
    x: torch.Tensor,
    *,
    norm: RmsNorm | LayerNorm | None = None,
    activation: str = "none",
    smooth: torch.Tensor | None = None,
    granularity: str = "per-token",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes activations to symmetric int8 with scales of their own.

    y = norm(x) or activation(x), codes = saturate(round_half_even(y / smooth / scale)) and
    scale = max|y / smooth| / 127, all in float32. A row that is all zero gets the scale 1/127; one
    with NaN gets the scale NaN, so that nothing hides it.

    Args:
        x: float16, bfloat16 or float32 [..., K], [..., 2K] for "silu-mul"; any strides.
        norm: over the last axis, before quantization; not together with an activation.
        activation: "none", "gelu", "gelu-tanh", "silu", or "silu-mul": silu of the first half of
            the last axis, times the second half.
        smooth: what SmoothQuant (arXiv 2211.10438) divides by; floating, [K].
        granularity: "per-token" (a scale for each vector along the last axis) or "per-tensor".
        backend: "auto", "triton", "native" (C, for CPUs with AVX-512 VNNI) or "reference"; one that
            is named runs or is refused.

    Returns:
        codes int8 [..., K] and scales float32, [...] per token and [] per tensor.

    Raises:
        InputError: a wrong dtype, shape or device, a norm and an activation at once.
        UnsupportedError: the backend asked for cannot run this.
    """
    prologue = _checked(x, norm, activation, smooth, granularity)
    per_token = granularity == "per-token"
    if is_inlined(x, backend):
        if native.why_not(x, prologue, per_token) or wants_gradient(backend, x):
            return reference.dynamic_quantize(x, prologue, per_token)
        codes, scale = torch.ops.octavo.native_quantize_rows(x)
        return codes, scale
    plain = is_plain_call(x, prologue.weight, prologue.bias, smooth)
    call = _run if plain else torch.ops.octavo.dynamic_quantize
    result: tuple[torch.Tensor, torch.Tensor] = call(x, *_flat(prologue), per_token, backend)
    return result


def add_dynamic_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    *,
    norm: RmsNorm | LayerNorm | None = None,
    smooth: torch.Tensor | None = None,
    granularity: str = "per-token",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream and quantizes the norm of the sum: a pre-norm block's entry.

    The sum is made in float32 and rounded to the stream's dtype once; what is normalised is that
    rounded sum, so the result is that of `dynamic_quantize` on the stream which is returned.

    Args:
        x: float16, bfloat16 or float32 [..., K]; any strides.
        residual: of the same shape, in any of these dtypes; it stays as it is.
        norm: over the last axis, after the sum.
        smooth: as for `dynamic_quantize`.
        granularity: as for `dynamic_quantize`.
        backend: as for `dynamic_quantize`.

    Returns:
        codes and scales as of `dynamic_quantize`, and x + residual in the residual's dtype.

    Raises:
        InputError: a wrong dtype, shape or device.
        UnsupportedError: the backend asked for cannot run this.
    """
    prologue = _checked(x, norm, "none", smooth, granularity)
    if residual.shape != x.shape or residual.dtype not in FLOATS:
        raise InputError(
            f"residual is {residual.dtype} {list(residual.shape)}; it must be float16, bfloat16 or "
            f"float32 {list(x.shape)}"
        )
    _same_device("residual", residual, x)
    if is_inlined(x, backend):
        return reference.add_dynamic_quantize(x, residual, prologue, granularity == "per-token")
    plain = is_plain_call(x, residual, prologue.weight, prologue.bias, smooth)
    call = _add_run if plain else torch.ops.octavo.add_dynamic_quantize
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = call(
        x, residual, *_flat(prologue), granularity == "per-token", backend
    )
    return result


def _checked(
    x: torch.Tensor,
    norm: RmsNorm | LayerNorm | None,
    activation: str,
    smooth: torch.Tensor | None,
    granularity: str,
) -> Prologue:
    if granularity not in ("per-token", "per-tensor"):
        raise InputError(f"granularity {granularity!r} is unknown; use per-token or per-tensor")
    if x.dtype not in FLOATS:
        raise InputError(f"x is {x.dtype}; dynamic_quantize takes float16, bfloat16 or float32")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x has shape {list(x.shape)}; its last axis must hold values")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )
    if activation == "silu-mul" and x.shape[-1] % 2:
        raise InputError(
            f"x has shape {list(x.shape)}; for silu-mul its last axis must hold two halves"
        )
    if norm is not None and activation != "none":
        raise InputError(
            f"{type(norm).__name__} and {activation} at once; quantize after one of them"
        )
    prologue = _prologue(norm, activation, smooth)
    for name, value in (
        ("norm.weight", prologue.weight), ("norm.bias", prologue.bias), ("smooth", smooth)
    ):  # fmt: skip
        _check_vector(name, value, x, prologue.width(x.shape[-1]))
    return prologue


def _prologue(
    norm: RmsNorm | LayerNorm | None, activation: str, smooth: torch.Tensor | None
) -> Prologue:
    if norm is None:
        return Prologue(activation=activation, smooth=smooth)
    if not isinstance(norm, (RmsNorm, LayerNorm)):
        raise InputError(f"norm is {norm!r}; give RmsNorm(...), LayerNorm(...) or None")
    if not (norm.eps >= 0 and math.isfinite(norm.eps)):
        raise InputError(f"norm.eps is {norm.eps}; it must be finite and not negative")
    if isinstance(norm, RmsNorm):
        return Prologue("rms", norm.weight, None, norm.eps, smooth=smooth)
    return Prologue("layer", norm.weight, norm.bias, norm.eps, smooth=smooth)


def _check_vector(name: str, value: torch.Tensor | None, x: torch.Tensor, width: int) -> None:
    if value is None:
        return
    if tuple(value.shape) != (width,) or not value.dtype.is_floating_point:
        raise InputError(
            f"{name} is {value.dtype} {list(value.shape)}; x of shape {list(x.shape)} needs "
            f"a floating tensor of [{width}]"
        )
    _same_device(name, value, x)


def _same_device(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    if value.device != x.device:
        raise InputError(f"{name} is on {value.device} and x on {x.device}; move one of them")


_STEPS = (
    "str norm, Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, Tensor? smooth, "
    "bool per_token, str backend"
)
_Flat = tuple[str, torch.Tensor | None, torch.Tensor | None, float, str, torch.Tensor | None]


def _flat(prologue: Prologue) -> _Flat:
    p = prologue
    return p.norm, p.weight, p.bias, p.eps, p.activation, p.smooth


def _run(x: torch.Tensor, *steps: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *prologue, per_token, backend = steps
    arguments = (x, Prologue(*prologue), per_token)
    codes, scale = run("dynamic_quantize", _BODIES, backend, arguments)
    return codes, scale


_operator = torch.library.custom_op(
    "octavo::dynamic_quantize",
    _run,
    mutates_args=(),
    schema=f"(Tensor x, {_STEPS}) -> (Tensor, Tensor)",
)


@_operator.register_fake
def _fake(x: torch.Tensor, *steps: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *prologue, per_token, _ = steps
    width = Prologue(*prologue).width(x.shape[-1])
    return (
        x.new_empty((*x.shape[:-1], width), dtype=torch.int8),
        x.new_empty(x.shape[:-1] if per_token else (), dtype=torch.float32),
    )


def _add_run(
    x: torch.Tensor, residual: torch.Tensor, *steps: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *prologue, per_token, backend = steps
    arguments = (x, residual, Prologue(*prologue), per_token)
    codes, scale, total = run("add_dynamic_quantize", _ADD_BODIES, backend, arguments)
    return codes, scale, total


_add_operator = torch.library.custom_op(
    "octavo::add_dynamic_quantize",
    _add_run,
    mutates_args=(),
    schema=f"(Tensor x, Tensor residual, {_STEPS}) -> (Tensor, Tensor, Tensor)",
)


@_add_operator.register_fake
def _add_fake(
    x: torch.Tensor, residual: torch.Tensor, *steps: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale = _fake(x, *steps)
    return codes, scale, residual.new_empty(residual.shape)


def _triton(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from octavo.kernels.dynamic_quantize import triton

        return getattr(triton, name)(*arguments)

    return call


def _bodies(name: str, *others: Body) -> tuple[Body, ...]:
    return (
        Body("triton", lambda x, *_: why_not_triton(x), _triton(name)),
        *others,
        Body("reference", lambda *_: "", getattr(reference, name), "last"),
    )


_NATIVE = Body("native", native.why_not, native.dynamic_quantize)
_BODIES, _ADD_BODIES = _bodies("dynamic_quantize", _NATIVE), _bodies("add_dynamic_quantize")
